"""The experts of a block: their weights and adapters stacked, and both passes through router, experts and sum by hand.

Per choice (a token and one of its experts), rows sorted by expert, w its weight, s = alpha / r, D dropout:

    Z = D(X) s A^T              of gate and up, rows of X gathered by the kernels
    [G | U] = X W^T + Z B^T     saved;  H = w f(G, U)
    Z' = D(H) s A'^T            of down
    Y = H W'^T + Z' B'^T        out = sum of Y over each token's choices

    dZ' = dY B';  dH = dY W' + D(dZ' s A')          dY is the token's own, gathered
    dw = <dH, f(G, U)>;  dG, dU overwrite G and U, and in the same read dA' and dB
    dZ = [dG | dU] B;  dX = [dG | dU] W + D(dZ s A)     summed over each token's choices, and what came through scores

Experts that read weighted tokens have H = f(w G, w U): their gate and up are linear, so nothing else changes.

The host asks nothing of the device. Weights are dequantised once in each pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.fused.ahead import Ahead
from lit_qlora.fused.group import Layers
from lit_qlora.fused.kernel_block import ACTIVATIONS
from lit_qlora.fused.large_rank import in_float32
from lit_qlora.fused.mlp import DenseMlp, Mlp, SavedMlp
from lit_qlora.fused.offload import OnHost
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.fused.routing import Routing
from lit_qlora.fused.shared_gate import SavedGate, SharedGate
from lit_qlora.fused.stacked import StackedExperts, base_of
from lit_qlora.fused.uneven import PaddedB
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.experts import Choices, combine, of_tokens
from lit_qlora.kernels.experts_lora import MOST_RANK, Folds, add_gradient, project
from lit_qlora.kernels.experts_mlp import mlp_backward
from lit_qlora.kernels.experts_products import LowRank, gate_up, product
from lit_qlora.kernels.norm import Norm, add_norm, norm_backward
from lit_qlora.lora.layer import LoRALinear, shares_a
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import KINDS, MoE

FUNCTIONS = {ffn: activation.function for ffn, activation in ACTIVATIONS.items() if activation.gated} | {
    "swiglu_clamped": "clamped"
}
"""The kernels' name for each kind of ModelConfig.ffn that experts may have."""


class ExpertGroup(StackedExperts):
    """The layers of all experts of a block with inputs of one kind; each row meets those of its own expert. See Layers.

    Attributes:
        slots: number of the A of each layer of an expert, -1 for one without; parts: the same of the B.
        dense: (n_expert, N, K) that is not quantised, or is a cached weight. B does not lie beside it.
        carried: always None.
        ahead: what dequantises the weights in time; None to do it when they are asked for.
        turn: number of the block for `ahead`.
    """

    carried: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    grad_a: Tensor
    grad_b: Tensor
    ahead: Ahead | None = None
    turn = 0

    def __init__(self, experts: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        adapted = [any(isinstance(layer, LoRALinear) for layer in layers) for layers in zip(*experts, strict=True)]
        self.adapted = [layer for expert in experts for layer, has in zip(expert, adapted, strict=True) if has]
        self.adapters = [layer for layer in self.adapted if isinstance(layer, LoRALinear)]
        self.padded: list[PaddedB] = []
        r = max((adapter.lora_a.size(0) for adapter in self.adapters), default=0)
        super().__init__(experts, [r * has for has in adapted], dtype, tied=any(map(shares_a, experts)))
        self.slots = self.stack.slots[: len(adapted)]
        numbers = iter(range(len(adapted)))
        self.parts = tuple(next(numbers) if has else -1 for has in adapted)
        self.p = self.adapters[0].dropout.p if self.adapters else 0.0
        self.scale = self.adapters[0].scale if self.adapters else 1.0

    @property
    def size_a(self) -> int:
        """See Layers."""
        return self.rank * self.k

    @property
    def size_b(self) -> int:
        """See Layers."""
        return self.stack.adapted_rows * self.stack.r

    @property
    def quantized(self) -> bool:
        """See Layers."""
        return self.weight is not None

    @property
    def workspace_size(self) -> int:
        """Elements that `matrix` needs of a workspace."""
        return 0 if self.dense is not None or self.ahead is not None else self.elements

    def matrix(self, workspace: Tensor | None) -> Tensor:
        """W, (n_expert, N, K); a quantised one is written into `workspace`, which must not be in use, or was ahead."""
        if self.dense is not None:
            return self.dense
        if self.ahead is not None:
            return self.ahead.take(self.turn)
        assert workspace is not None
        out = workspace[: self.elements].view(self.shape)
        self.dequantize(out)
        return out

    def read(self, step: int) -> None:
        """Say that the last product with W of this pass is launched; blocks follow in steps of 1, or of -1 backward."""
        if self.ahead is not None and self.dense is None:
            self.ahead.read(self.turn, step)

    def cache(self) -> None:
        """See Layers."""
        if self.dense is None:
            self.dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.dequantize(self.dense)

    @property
    def extra_bytes(self) -> int:
        """See Layers."""
        return 0 if self.weight is None or self.dense is None else self.dense.nbytes

    def release(self) -> None:
        """See Layers; nothing is ahead from now on."""
        self.ahead = None
        if self.weight is not None:
            self.dense = None

    def dropout(self, seed: Tensor | None, number: int) -> Dropout:
        """Of the adapters' input, elements of (C, K)."""
        return NONE if seed is None or not self.p else Dropout(self.p, seed, number)

    # Views are made once: each costs the host as much as a tenth of a launch.

    @cached_property
    def a_of_experts(self) -> Tensor:
        """(n_expert, slots r, K)."""
        assert self.a is not None
        return self.a.view(self.shape[0], -1, self.k)

    @cached_property
    def output_parts(self) -> Tensor:
        """B^T of the layers of each A, as `project` takes it for dZ, (n_expert, slots, r, N of these layers)."""
        assert self.b is not None
        return self.b.view(self.shape[0], max(self.slots) + 1, -1, self.stack.r).mT

    @cached_property
    def b_of_layers(self) -> list[Tensor | None]:
        """B^T of each layer, (n_expert, r, N of a layer); None for one without an adapter."""
        assert self.b is not None
        each = self.b.view(self.shape[0], -1, self.shape[1] // len(self.slots), self.stack.r).mT
        return [each[:, part] if part >= 0 else None for part in self.parts]

    @cached_property
    def input_parts(self) -> Tensor:
        """A of all layers as one, as `project` takes it for Z, (n_expert, 1, slots r, K)."""
        return self.a_of_experts[:, None]

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of A^T (n_expert, K, slots r) and of B (n_expert, slots N, r)."""
        experts = self.shape[0]
        return self.grad_a.view(experts, -1, self.k).mT, self.grad_b.view(experts, -1, self.stack.r)


@dataclass
class SavedExperts:
    """Activations of Experts for its backward pass; the last two may be recomputed.

    Attributes:
        z_down, z: (C, r) and (C, slots r), see the module; branches: gate and up, (C, 2 F).
    """

    choices: Choices
    z_down: Tensor | None
    z: Tensor | None = None
    branches: Tensor | None = None


class Experts:
    """Router and experts of a block, from their common input to the sum over each token's choices."""

    def __init__(self, moe: MoE, dtype: torch.dtype, number: int) -> None:
        experts: list[Any] = list(moe.experts)
        # Dropout has other numbers than in the blocks, in the head and in shared experts.
        config = base_of(moe.router).config
        self.routing = Routing(moe.router, 4 * (config.n_layer + 1 + number) + 1)
        self.function, self.before = FUNCTIONS[config.ffn], config.router_before
        self.gate_up, self.down = (
            ExpertGroup([[getattr(expert, name) for name in names] for expert in experts], dtype) for names in KINDS
        )
        self.weights, self.number = (self.gate_up, self.down), number
        adapter = self.routing.adapter
        self.groups: tuple[Layers, ...] = self.weights if adapter is None else (*self.weights, adapter)

    @property
    def reads_input(self) -> bool:
        """True if the backward pass reads x even where gate and up are saved: for adapters, or to compute scores."""
        return bool(self.gate_up.rank) or self.routing.reads_input

    def forward(
        self, x: Tensor, more: Tensor | None, run: Pass, saves: bool, routed: Tensor | None = None
    ) -> tuple[Tensor, SavedExperts]:
        """The sum (T, E) over each token's experts, and of `more`; with `saves` all that the backward pass reads.

        Args:
            x: (T, E), rows contiguous.
            routed: what the router reads, if it is not x.
        """
        choices, down = self.routing.choices(x if routed is None else routed, run), self.down
        z, branches, h = self._gate_up(x, choices, run, branches=saves)[:3]
        self.gate_up.read(1)
        z_down = None
        if down.rank:
            z_down = project(h, down.input_parts, choices, dropout=self._dropout(down, run))
        y = product(h, down.matrix(run.workspaces[0]), choices, self._down_low_rank(z_down), down.bias)
        down.read(1)
        del h
        saved = SavedExperts(choices, z_down, z, branches) if saves else SavedExperts(choices, z_down)
        return combine(y, choices, more), saved

    def backward(
        self,
        d_y: Tensor,
        x: Tensor,
        saved: SavedExperts,
        back: Backward,
        ahead: Sequence[Tensor | OnHost | None] = (),
        routed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of x (T, E) and of `routed`, from that of the sum; those of the adapters are added in place.

        Args:
            ahead: see Mlp.backward.
            routed: see forward.
        """
        run, choices, matrix = back.forward, saved.choices, None
        folds = Folds(choices)
        dh, dz_down = self._down_backward(d_y, saved, run, folds)
        if saved.branches is None:
            saved.z, saved.branches, _, matrix = self._gate_up(x, choices, run, h=False)
        branches, saved.branches = saved.branches, None
        d_weights = of_tokens(self._activation_backward(branches, dh, dz_down, saved, run, folds), choices)
        del dh
        if self.down.bias is not None:
            all_experts = in_float32(d_y, self.down.bias.T)
            d_weights += all_experts.gather(1, choices.chosen.long())
        for tensor in ahead:
            run.offload.fetch(tensor)
        dx = self._gate_up_backward(x, branches, choices, run, matrix, folds)
        del branches
        folds.flush()
        d_routed = self.routing.backward(x if routed is None else routed, choices, d_weights, run)
        return (combine(dx, choices, d_routed), None) if routed is None else (combine(dx, choices), d_routed)

    def _gate_up(
        self, x: Tensor, choices: Choices, run: Pass, branches: bool = True, h: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Z, gate and up, h, and W; without `branches` or `h` an empty tensor instead."""
        group, z = self.gate_up, None
        low_rank: list[LowRank | None] = [None, None]
        if group.rank:
            z = project(x, group.input_parts, choices, gathered=True, dropout=self._dropout(group, run))
            each = z.split(group.stack.r, dim=1)
            pairs = zip(group.slots, group.b_of_layers, strict=True)
            low_rank = [None if b is None else LowRank(each[slot], b) for slot, b in pairs]
        matrix = group.matrix(run.workspaces[0])
        gate, up = low_rank
        made = gate_up(x, matrix, choices, self.function, (gate, up), group.bias, branches, h, self.before)
        return z, *made, matrix

    def _down_low_rank(self, z: Tensor | None) -> LowRank | None:
        return None if z is None else LowRank(z, self.down.output_parts[:, 0])

    def _down_backward(self, d_y: Tensor, saved: SavedExperts, run: Pass, folds: Folds) -> tuple[Tensor, Tensor | None]:
        """DH of each choice without its weight, and dZ of down; the gradient of down's B."""
        down, choices = self.down, saved.choices
        dz, low_rank = None, None
        if saved.z_down is not None:
            dz = project(d_y, down.output_parts, choices, gathered=True)
            add_gradient(d_y, saved.z_down, down.gradients[1], choices, gathered=True, folds=folds)
            low_rank = LowRank(dz, down.a_of_experts, self._dropout(down, run))
        dh = product(d_y, down.matrix(run.workspaces[0]), choices, low_rank, gathered=True, transposed=True)
        down.read(-1)
        return dh, dz

    def _activation_backward(
        self, branches: Tensor, dh: Tensor, dz_down: Tensor | None, saved: SavedExperts, run: Pass, folds: Folds
    ) -> Tensor:
        """Turn gate and up into their gradients; those of down's A and of their own B; parts of that of the weights."""
        group, down, choices, dropout = self.gate_up, self.down, saved.choices, self._dropout(self.down, run)
        gate, up = group.parts
        own = None if saved.z is None else (saved.z, group.gradients[1], (gate, up))
        of_down = None if dz_down is None else (dz_down, down.gradients[0].mT, down.scale)
        if max(group.stack.r, down.stack.r) <= MOST_RANK:
            return mlp_backward(
                branches, dh, choices, self.function, of_down, own, dropout, folds=folds, before=self.before
            )
        # More columns than one program can hold: h is written, over dh, and the sums are thin products.
        parts = mlp_backward(branches, dh, choices, self.function, dropout=dropout, h=dh, before=self.before)
        if dz_down is not None:
            add_gradient(dh, dz_down, down.gradients[0], choices, down.scale, folds=folds)
        if saved.z is not None:
            r, width = group.stack.r, dh.size(1)
            for half, slot, part in zip(branches.split(width, dim=1), group.slots, group.parts, strict=True):
                if slot >= 0:
                    gradient = group.gradients[1][:, part * width : part * width + width]
                    add_gradient(half, saved.z[:, slot * r : slot * r + r], gradient, choices, folds=folds)
        return parts

    def _gate_up_backward(
        self, x: Tensor, d_branches: Tensor, choices: Choices, run: Pass, matrix: Tensor | None, folds: Folds
    ) -> Tensor:
        """DX of each choice, (C, E); the gradient of A of gate and up."""
        group, low_rank = self.gate_up, None
        if group.rank:
            width, dropout = group.shape[1] // 2, self._dropout(group, run)
            adapted = d_branches if min(group.parts) >= 0 else d_branches.split(width, dim=1)[group.parts.index(0)]
            dz = project(adapted, group.output_parts, choices)
            gradient = group.gradients[0]
            add_gradient(x, dz, gradient, choices, group.scale, gathered=True, dropout=dropout, folds=folds)
            low_rank = LowRank(dz, group.a_of_experts, dropout)
        matrix = group.matrix(run.workspaces[0]) if matrix is None else matrix
        dx = product(d_branches, matrix, choices, low_rank, transposed=True)
        group.read(-1)
        return dx

    def _dropout(self, group: ExpertGroup, run: Pass) -> Dropout:
        return group.dropout(run.seed, 4 * self.number + 2 + (group is self.down))


@dataclass
class SavedExpertMlp:
    """Activations of the experts, of the shared one and of its gate.

    Attributes:
        statistics: of the stream, see Mlp.norm; None where the backward pass reads the experts' input, and norms again.
    """

    experts: SavedExperts
    shared: SavedMlp | None
    gate: SavedGate | None
    statistics: Tensor | None = None


class ExpertMlp:
    """See Mlp: experts, and one that every token goes to where there is one, with the norm before them.

    Their input is not saved: the stream and its norm give it.
    """

    def __init__(self, moe: MoE, norm: Norm, config: ModelConfig, dtype: torch.dtype, number: int) -> None:
        self.norm_2, self.width = norm, config.n_embd
        self.experts = Experts(moe, dtype, number)
        # Another number for dropout than those of the blocks and of the head.
        own = config.n_layer + 1 + number
        self.shared = None if moe.shared is None else DenseMlp(moe.shared, norm, config, dtype, own, fp8=False)
        self.gate = None if moe.shared_gate is None else SharedGate(moe.shared_gate, dtype, 4 * own)
        gate = () if self.gate is None else (self.gate.group,)
        self.groups = (*self.experts.groups, *(self.shared.groups if self.shared else ()), *gate)

    def norm(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See Mlp; with a shared expert the input has room for its Z behind it."""
        if self.shared is not None:
            return self.shared.norm(x, y)
        normed = torch.empty_like(x)
        return *add_norm(x, y, self.norm_2, normed), normed

    def forward(
        self, normed: list[Tensor], statistics: Tensor, stream: Tensor, run: Pass, saves: bool
    ) -> tuple[Tensor, SavedExpertMlp]:
        """See Mlp."""
        more, shared, gate, x = None, None, None, normed[0][:, : self.width]
        if self.shared is not None:
            more, shared = self.shared.forward(normed, statistics, stream, run, saves)
            if self.gate is not None:
                more, gate = self.gate.forward(x, more, run)
        normed.clear()
        out, experts = self.experts.forward(x, more, run, saves)
        reads = self.shared is not None or not saves or self.experts.reads_input
        return out, SavedExpertMlp(experts, shared, gate, None if reads else statistics)

    def backward(
        self,
        d_y: list[Tensor],
        stream: list[Tensor | OnHost],
        saved: SavedExpertMlp,
        d_out: Tensor,
        back: Backward,
        ahead: Sequence[Tensor | OnHost | None],
    ) -> Tensor:
        """See Mlp."""
        get = back.forward.offload.get
        x, y = get(stream[0]), get(stream[1]) if len(stream) > 1 else None
        stream.clear()
        if saved.statistics is None or y is not None:
            middle, statistics, normed = self.norm(x, y)
        else:
            middle, statistics, normed = x, saved.statistics, x  # nobody reads more of the last than its shape
        del x, y
        own = ahead if self.shared is None else ()
        dn, _ = self.experts.backward(d_y[0], normed[:, : self.width], saved.experts, back, own)
        if self.gate is not None and saved.gate is not None:
            d_y[0], through_gate = self.gate.backward(normed[:, : self.width], d_y[0], saved.gate, back)
            dn.add_(through_gate)
            del through_gate
        del normed
        d_middle = norm_backward(dn, middle, self.norm_2, statistics, residual=d_out)
        del dn
        if self.shared is None or saved.shared is None:
            d_y.clear()
            return d_middle
        handed: list[Tensor | OnHost] = [middle]
        del middle
        return self.shared.backward(d_y, handed, saved.shared, d_middle, back, ahead)


def dequantize_ahead(mlps: Sequence[Mlp], lowest: int) -> list[Ahead]:
    """Let the weights of experts, in the order of their blocks, be dequantised ahead where they are not cached.

    Args:
        lowest: the first block with a backward pass.
    """
    made = []
    for kind in range(len(KINDS)):
        groups = {i: mlp.experts.weights[kind] for i, mlp in enumerate(mlps) if mlp.experts is not None}
        waiting = {i: group for i, group in groups.items() if group.dense is None}
        if waiting:
            first = next(iter(waiting.values()))
            made.append(Ahead([*waiting.values()], first.dtype, first.device, sum(i < lowest for i in waiting)))
            for turn, group in enumerate(waiting.values()):
                group.ahead, group.turn = made[-1], turn
    return made
