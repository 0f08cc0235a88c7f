"""The MLP of a block for the newest tokens, or its mixture of experts, in few launches that ask nothing of the host.

Few tokens read the weights of their own experts alone, once for each choice. Many tokens choose nearly all experts, and
each several times. Then all weights are dequantised once, and every token goes through every expert. Such products are
bound by reading weights, so a token that did not choose the expert costs little.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.fused.kernel_block import ACTIVATIONS, mlp_layers, norm_of
from lit_qlora.fused.stacked import StackedExperts, base_of, why_not_stacked
from lit_qlora.generation.product import Product, RowAdapters, updates_of
from lit_qlora.kernels.chosen_experts import product
from lit_qlora.kernels.experts_dequantize import Matrices
from lit_qlora.kernels.mlp import mlp_forward
from lit_qlora.kernels.norm import apply_norm
from lit_qlora.kernels.stack import FourBit, Stack
from lit_qlora.lora.adapter_switch import SwitchedLinear
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import GATES, KINDS, MoE
from lit_qlora.quantize import NESTED_BLOCK

MOST_CHOICES = 3
"""Choices for each expert, on average, up to which each reads its own weights. By arithmetic for an H200: decoding a
weight in a register takes its multiprocessors 0.37 ps, dequantising it in memory and reading it again 1.05 ps."""


class DenseMlp:
    """down(activation(gate(x)) * up(x)), or without a gate."""

    mixture = None

    def __init__(self, mlp: Any, config: ModelConfig, dtype: torch.dtype, adapters: RowAdapters | None) -> None:
        self.activation = ACTIVATIONS[config.ffn]
        self.products = [Product(layers, dtype, adapters) for layers in mlp_layers(mlp)]

    def __call__(self, x: Tensor, stream: Tensor) -> Tensor:
        """(B, E), the norm of the stream (B, E) -> (B, E)."""
        gate_up, down = self.products
        branches = gate_up(x)
        h = branches.new_empty(len(x), branches.size(1) // self.activation.branches)
        mlp_forward(branches, h, self.activation)
        return down(h)


class ExpertMlp:
    """The experts that each token chooses, and one that all go to where there is one.

    Attributes:
        mixture: itself; of other MLPs the experts in it, or None.
    """

    def __init__(self, moe: MoE, config: ModelConfig, dtype: torch.dtype, adapters: RowAdapters | None) -> None:
        self.router, self.combine, self.before = moe.router, GATES[config.ffn], moe.before
        self.gate_up, self.down = (ChosenExperts(layers, dtype) for layers in _layers_of(moe))
        self.shared = None if moe.shared is None else DenseMlp(moe.shared, config, dtype, adapters)
        self.gate = None if moe.shared_gate is None else Product([moe.shared_gate], dtype, adapters)
        self.products = [*(self.shared.products if self.shared else ()), *([self.gate] if self.gate else ())]
        self.mixture = self

    def __call__(self, x: Tensor, stream: Tensor) -> Tensor:
        """See DenseMlp."""
        return self.mixed(x, x)

    def mixed(self, x: Tensor, routed: Tensor) -> Tensor:
        """(B, E), and what the router reads -> (B, E)."""
        shares, chosen = self.router(routed)
        if chosen.numel() > MOST_CHOICES * self.gate_up.shape[0]:
            out = self._by_all(x, shares, chosen)
        else:
            out = self._by_own(x, shares, chosen)
        if self.shared is not None:
            out += self.shared(x, x) if self.gate is None else torch.sigmoid(self.gate(x)) * self.shared(x, x)
        return out.to(x.dtype)

    def _by_own(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum over each token's experts, (B, E) float32."""
        into, out = (shares, torch.ones_like(shares)) if self.before else (None, shares)
        h = self.combine(*self.gate_up(x, chosen, into).chunk(2, dim=1)).to(x.dtype).contiguous()
        return self.down(h, chosen, out).unflatten(0, chosen.shape).sum(dim=1)

    def _by_all(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """The same, where every expert computes every token."""
        every = shares.new_zeros(len(x), self.gate_up.shape[0]).scatter_(1, chosen, shares).T[..., None]
        branches = self.gate_up.of_all(x)
        branches = every * branches if self.before else branches
        y = self.down.of_all(self.combine(*branches.chunk(2, dim=-1)).to(x.dtype))
        y = y.float() if self.before else every * y
        return torch.where(every == 0, 0, y).sum(dim=0)  # 16 bits may overflow where nobody has chosen


class MlpBeside:
    """See fused.experts_beside."""

    def __init__(self, block: Any, config: ModelConfig, like: Tensor, adapters: RowAdapters | None) -> None:
        beside = block.beside
        self.own_norm, self.post_experts, self.post_dense = (
            norm_of(module, like) for module in (beside.norm, beside.mlp_post_norm, beside.plain_post_norm)
        )
        self.dense = DenseMlp(block.mlp, config, like.dtype, adapters)
        self.mixture = ExpertMlp(beside.mlp, config, like.dtype, adapters)
        self.products = [*self.dense.products, *self.mixture.products]

    def __call__(self, x: Tensor, stream: Tensor) -> Tensor:
        """See DenseMlp."""
        mixed = self.mixture.mixed(apply_norm(self.own_norm, stream), stream)
        return apply_norm(self.post_dense, self.dense(x, stream)).add_(apply_norm(self.post_experts, mixed))


Mlp = DenseMlp | ExpertMlp | MlpBeside


def make_mlp(block: Any, config: ModelConfig, like: Tensor, adapters: RowAdapters | None) -> Mlp:
    """The MLP of a block of the plain model, on the device and in the dtype of `like`."""
    if block.beside is not None:
        return MlpBeside(block, config, like, adapters)
    kind = ExpertMlp if isinstance(block.mlp, MoE) else DenseMlp
    return kind(block.mlp, config, like.dtype, adapters)


class ChosenExperts(StackedExperts):
    """The layers of experts with inputs of one kind, with their adapters as they are when this is made.

    Attributes:
        workspace: where quantised weights of all of them are dequantised; None if that is not done.
    """

    workspace: Tensor | None = None

    def __init__(self, experts: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        updates = [updates_of(layers) for layers in experts]
        ranks = [0 if update is None else len(update[0]) for update in updates[0]]
        super().__init__(experts, ranks, dtype)
        count, adapted = len(experts), sum(rank > 0 for rank in ranks)
        slots = self.stack.slots[: len(ranks)]
        self.own = Stack(self.stack.rows[: len(ranks)], slots, max(ranks))
        self.own_table = self.own.table(self.device)
        self.of_a = Stack((self.own.rank,), (-1,), 0)
        self.table_of_a = self.of_a.table(self.device)
        found = [update for of_expert in updates for update in of_expert if update is not None]
        self.a = self.b = None
        if adapted:
            self.a = torch.cat([(scale * a).to(dtype) for a, _, scale in found]).view(count, -1, self.k)
            self.b = torch.cat([b.to(dtype) for _, b, _ in found]).view(count, self.own.adapted_rows, -1)
        self.matrices = self.dense if self.weight is None else _with_whole_blocks(self.weight)

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor | None = None) -> Tensor:
        """X (B, K), or of each choice (B k, K) -> (B k, N); with shares (B, k) times these, and in float32."""
        assert self.matrices is not None
        z = None if self.a is None else product(x, self.a, chosen, self.of_a, self.table_of_a)
        dtype = None if shares is None else torch.float32
        return product(x, self.matrices, chosen, self.own, self.own_table, self.bias, z, self.b, shares, dtype)

    def of_all(self, x: Tensor) -> Tensor:
        """X of every expert (B, K), or of each its own (n_expert, B, K) -> (n_expert, B, N)."""
        y = x @ self._dequantized().mT
        if self.bias is not None:
            y += self.bias[:, None]
        if self.a is not None and self.b is not None:
            z = x @ self.a.mT
            for rows, own, rows_b in self.own.slices:
                y[..., rows] += z[..., own] @ self.b[:, rows_b].mT
        return y

    def _dequantized(self) -> Tensor:
        """The weights, (n_expert, N, K)."""
        if self.dense is not None:
            return self.dense
        assert self.workspace is not None
        out = self.workspace[: self.elements].view(self.shape)
        self.dequantize(out)
        return out


def make_room(mlps: Iterable[Mlp], rows: int) -> None:
    """Give experts a workspace that all blocks share, if so many tokens need one."""
    mixtures = [mlp.mixture for mlp in mlps if mlp.mixture is not None]
    groups = [group for mlp in mixtures for group in (mlp.gate_up, mlp.down) if group.dense is None]
    if groups and rows * base_of(mixtures[0].router).config.n_expert_per_token > MOST_CHOICES * groups[0].shape[0]:
        most = max(groups, key=lambda group: group.elements)
        workspace = torch.empty(most.elements, dtype=most.dtype, device=most.device)
        for group in groups:
            group.workspace = workspace


def why_not_chosen(moe: MoE, dtype: torch.dtype, by_row: bool) -> str:
    """Why ExpertMlp cannot take a mixture, apart from its shared expert, or ''."""
    for experts in _layers_of(moe):
        layers = [layer for of_expert in experts for layer in of_expert]
        if reason := why_not_stacked(layers, dtype):
            return reason
        if reason := next(filter(None, (getattr(layer, "beyond_low_rank", "") for layer in layers)), ""):
            return reason
        if by_row and any(isinstance(layer, SwitchedLinear) for layer in layers):
            return "adapters on experts that differ between texts"
        ranks = [[0 if u is None else len(u[0]) for u in updates_of(of_expert)] for of_expert in experts]
        if len({tuple(of_expert) for of_expert in ranks}) > 1:
            return "adapters on some of the experts"
        if len({rank for rank in ranks[0] if rank}) > 1:
            return "adapters of different ranks"
    return ""


def _layers_of(moe: MoE) -> list[list[list[nn.Module]]]:
    """Of each kind of input, of each expert its layers."""
    return [[[getattr(expert, name) for name in names] for expert in moe.experts] for names in KINDS]


def _with_whole_blocks(weight: Matrices) -> Matrices:
    """The same, with decoded scales where a matrix does not fill whole blocks of codes, as the kernel wants them."""
    stored = weight.stored
    if not isinstance(stored, FourBit) or stored.nested is None:
        return weight
    each = len(stored.absmax) // weight.shape[0]
    if not each % NESTED_BLOCK:
        return weight
    code, outer, offset = stored.nested
    outer = outer.view(weight.shape[0], -1).repeat_interleave(NESTED_BLOCK, dim=1)[:, :each].flatten()
    scales = code[stored.absmax.long()] * outer + offset.repeat_interleave(each)
    return Matrices(FourBit(stored.packed, scales, stored.code, None), weight.shape)
