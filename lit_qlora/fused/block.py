"""A block's forward and backward pass, written by hand so that little is launched, read twice or kept.

The residual stream travels as a pair, x and y with the stream being x + y, so that each norm adds and normalises in one
pass. Every quantised weight is dequantised once in the forward and once in the backward pass. What is kept in between
is chosen by the block's `recompute`:

    none     everything that the backward pass reads
    mlp      not the products of gate and up
    attn     the attention's output and the residual stream behind it; qkv, gate and up are computed again
    offload  as attn, with both and the block's input on the host; with `sends_qkv` qkv too
    full     the block's input only

Norms behind attention and MLP, where a family has them, read what the products gave, which is kept too (`raw`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.attention import Heads, Layout, attention, attention_backward
from lit_qlora.fused.group import Group, norm_of
from lit_qlora.fused.large_rank import through_mlp
from lit_qlora.fused.offload import Offload
from lit_qlora.fused.qkv_transforms import Shaping, pull_back
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.mlp import mlp_backward, mlp_forward
from lit_qlora.kernels.norm import Norm, add_norm, apply_norm, norm_backward
from lit_qlora.kernels.rope import rotate_, rotate_backward
from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import Recompute

ACTIVATIONS = {
    "swiglu": Activation("silu", gated=True),
    "geglu": Activation("gelu", gated=True),
    "geglu_tanh": Activation("gelu_tanh", gated=True),
    "gelu": Activation("gelu", gated=False),
    "gelu_tanh": Activation("gelu_tanh", gated=False),
}
"""What each kind of config.ffn is, of those that are handled."""


Ropes = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines, (P, R / 2) float32, of blocks without a sliding window and with one."""


@dataclass
class Pass:
    """What the blocks of a forward pass, and of its backward pass, have in common.

    Attributes:
        positions: (T,) int32, rows of the rope tables.
        query_scale: (T, 1, 1) float32 or None.
        workspaces: for dequantised weights: any, qkv kept through a block's backward pass, projection likewise.
        seed: of the dropout, see kernels.dropout; None for none.
    """

    layout: Layout
    positions: Tensor
    ropes: Ropes
    query_scale: Tensor | None
    workspaces: tuple[Tensor | None, Tensor | None, Tensor | None]
    offload: Offload
    seed: Tensor | None
    keep: bool
    """Whether there will be a backward pass."""
    stay: bool
    """Whether weights may stay from the backward pass to the next forward pass; see FastSizes.stay."""


@dataclass
class Kept:
    """What a block keeps for its backward pass; a number stands for a tensor on the host.

    `numbers` are those of a norm's rows.
    """

    x: Tensor | int
    below: int
    """Number of what the block below has put on the host last, -1 if it does not offload."""
    z_down: Tensor | None = None
    numbers_1: Tensor | None = None
    z_qkv: Tensor | None = None
    qkv: Tensor | int | None = None
    attended: Tensor | int | None = None
    attention: Any = None
    z_projection: Tensor | None = None
    raw_1: Tensor | int | None = None
    middle: Tensor | int | None = None
    numbers_2: Tensor | None = None
    z_gate_up: Tensor | None = None
    gate_up: Tensor | None = None
    raw_2: Tensor | int | None = None


class FusedBlock:
    """The weights of a block in groups, and its two passes."""

    def __init__(
        self, block: Any, config: ModelConfig, dtype: torch.dtype, number: int, like: Tensor, fp8: bool
    ) -> None:
        attn, mlp = block.attn, block.mlp
        self.activation = ACTIVATIONS[config.ffn]
        self.qkv = Group([attn.query, attn.key, attn.value], dtype, fp8)
        self.projection = Group([attn.projection], dtype, fp8)
        self.gate_up = Group([mlp.gate, mlp.up] if self.activation.gated else [mlp.up], dtype, fp8)
        self.down = Group([mlp.down], dtype, fp8)
        self.groups = (self.qkv, self.projection, self.gate_up, self.down)
        self.parallel, share = config.parallel_residual, config.residual_multiplier
        self.norm_1 = norm_of(block.norm_1, like)
        self.norm_2 = self.norm_1 if config.shared_norm else norm_of(block.norm_2, like)
        self.post_1, self.post_2 = (norm_of(norm, like, share) for norm in (block.post_norm_1, block.post_norm_2))
        windowed = config.windowed(number)
        self.heads = Heads(
            config.n_head,
            config.n_kv_head,
            config.head_size,
            config.attention_scale,
            config.sliding_window if windowed else None,
        )
        self.shaping = Shaping(attn, config, self.heads)
        self.rotates, self.windowed, self.interleaved = config.rotates(number), windowed, config.rope_interleaved
        self.number = number
        self.recompute: Recompute = "none"
        self.sends_qkv = self.fetches_below = False

    def forward(self, stream: list[Tensor], run: Pass) -> Kept | None:
        """Put a (T, E) pair in the place of the one in `stream`, of which the first block finds x alone; what is kept.

        The pair is taken out of the list, so that its memory is free as soon as it is not needed.
        """
        x, y = stream[0], stream[1] if len(stream) > 1 else None
        stream.clear()
        keeps, space = self.recompute if run.keep else "full", run.workspaces[0]
        below = run.offload.count - 1 if self.fetches_below else -1

        def keep(tensor: Tensor | None) -> Tensor | int | None:
            return run.offload.put(tensor) if keeps == "offload" and tensor is not None else tensor

        # What is to be on the host leaves as soon as it is there, since the copies take about as long as all the rest.
        x, numbers_1, normed = self._norm(self.qkv, self.norm_1, x, y)
        del y
        first = keep(x)
        assert first is not None
        kept = Kept(first, below)
        z_qkv, qkv = self._qkv(normed, run, space)[:2]  # no matrix is held on to, which may have stayed
        del normed
        if keeps in ("none", "mlp") or (keeps == "offload" and self.sends_qkv):
            kept.numbers_1, kept.z_qkv, kept.qkv = numbers_1, z_qkv, keep(qkv)
        attended, extra = attention(self._shaped(qkv, run)[0], self.heads, run.layout)
        if keeps != "full":
            kept.attended, kept.attention = keep(attended), extra
        raw_1, z_projection = self._project(attended, run, space)[:2]
        if keeps != "full":
            kept.z_projection = z_projection
        del qkv, attended, extra
        out = apply_norm(self.post_1, raw_1)
        if keeps != "full" and self.post_1.number:
            kept.raw_1 = keep(raw_1)
        del raw_1
        middle, numbers_2, normed = self._norm(self.gate_up, self.norm_2, x, None if self.parallel else out)
        beside = out if self.parallel else None
        del out, x
        if keeps != "full" and not self.parallel:
            kept.middle = keep(middle)
        z_gate_up, gate_up = self._gate_up(normed, run, space)[:2]
        del normed
        if keeps == "none":
            kept.numbers_2, kept.z_gate_up, kept.gate_up = numbers_2, z_gate_up, gate_up
        h = self.down.empty_input(middle.size(0))
        if self.down.a is None:
            mlp_forward(gate_up, h, self.activation)
        kept.z_down = self.down.project(gate_up, h, self._dropout(self.down, 3, run), self.activation)
        del gate_up
        raw_2 = self.down.product(h, self.down.matrix(space))
        y = apply_norm(self.post_2, raw_2)
        if run.keep and self.post_2.number:
            kept.raw_2 = keep(raw_2)
        if beside is not None:
            y.add_(beside)
        if keeps != "offload":
            run.offload.let_go()  # of what the blocks before have sent, which has arrived by now
        stream += [middle, y]
        return kept if run.keep else None

    def backward(
        self, d_out: Tensor, kept: Kept, run: Pass, pending: Pending, wants_dx: bool, stay: bool = False
    ) -> Tensor | None:
        """The gradient of the block's input stream from that of its output stream, both (T, E).

        The gradients of the adapters are added to those of the groups. With `wants_dx` False only they are wanted.
        With `stay` the dequantised weights are there in the next forward pass.
        """
        again = self.recompute
        off, spaces = run.offload, (None, None, None) if stay else run.workspaces
        any_space = spaces[0]

        def get(value: Any) -> Any:
            return off.get(value) if isinstance(value, int) else value

        x = kept.x
        matrix_qkv = matrix_projection = matrix_gate_up = out = None
        numbers_1, z_qkv, qkv = kept.numbers_1, kept.z_qkv, kept.qkv
        if isinstance(qkv, int):  # the largest, which all products of the MLP are to hide
            off.fetch(qkv)
        attended, extra, z_projection = kept.attended, kept.attention, kept.z_projection
        raw_1, raw_2, middle = kept.raw_1, get(kept.raw_2), get(kept.middle)
        if self.parallel:
            middle = x = get(x)
        if again == "full":
            assert isinstance(x, Tensor)
            _, numbers_1, normed = self._norm(self.qkv, self.norm_1, x, None)
            z_qkv, qkv, matrix_qkv = self._qkv(normed, run, spaces[1])
            del normed
            attended, extra = attention(self._shaped(qkv, run)[0], self.heads, run.layout)
            raw_1, z_projection, matrix_projection = self._project(attended, run, spaces[2])
            out = apply_norm(self.post_1, raw_1)

        # down and the activation
        down, gate_up = self.down, self.gate_up
        d_mlp = self._post_backward(self.post_2, raw_2, d_out)
        down.learn_b(d_mlp, kept.z_down, pending)
        dh = down.product_back(d_mlp, any_space)
        del d_mlp, raw_2
        if again == "none":
            numbers_2, z_gate_up, products = kept.numbers_2, kept.z_gate_up, kept.gate_up
            kept.gate_up = None
        else:
            stream = middle if middle is not None else x
            assert isinstance(stream, Tensor)
            middle, numbers_2, normed = self._norm(self.gate_up, self.norm_2, stream, None if self.parallel else out)
            del out, stream
            z_gate_up, products, matrix_gate_up = self._gate_up(normed, run, any_space)
            del normed
        assert products is not None
        assert numbers_2 is not None
        through = through_mlp if down.wide or gate_up.wide else mlp_backward
        through(
            products, dh, self.activation, down.a, down.grad_a if down.rank else None, z_gate_up,
            gate_up.grad_b if gate_up.rank else None, gate_up.stack, down.scale, pending, self._dropout(down, 3, run),
        )  # fmt: skip
        del dh
        for number in (attended, x if qkv is None else None, raw_1):  # the product below hides the copies
            if isinstance(number, int):
                off.fetch(number)
        dn = gate_up.product_back(products, any_space, matrix_gate_up)
        del products
        dropout = self._dropout(gate_up, 2, run)
        gate_up.learn_a(middle, dn, pending, dropout, self.norm_2, numbers_2)
        d_middle = gate_up.d_stream(dn, middle, self.norm_2, numbers_2, z_gate_up, d_out, dropout)
        del dn, middle

        # projection and attention
        group = self.projection
        d_attention = self._post_backward(self.post_1, get(raw_1), d_out if self.parallel else d_middle)
        del d_out, raw_1
        group.learn_b(d_attention, z_projection, pending)
        da = group.product_back(d_attention, any_space, matrix_projection)
        del d_attention
        attended = get(attended)
        dropout = self._dropout(group, 1, run)
        group.learn_a(attended, da, pending, dropout)
        d_attended = group.d_input(da, dropout)
        del da
        if qkv is None:
            x = get(x)
            _, numbers_1, normed = self._norm(self.qkv, self.norm_1, x, None)
            z_qkv, qkv, matrix_qkv = self._qkv(normed, run, any_space)
            del normed
        elif isinstance(x, int):
            off.fetch(x)
        assert numbers_1 is not None
        kept.qkv, qkv = None, get(qkv)
        d_qkv = self._attention_backward(d_attended, qkv, attended, extra, run)
        del qkv, attended, d_attended
        off.fetch(kept.below)  # the large buffers are free now
        x = get(x)
        group, dropout = self.qkv, self._dropout(self.qkv, 0, run)
        group.learn_b(d_qkv, z_qkv, pending)
        if not wants_dx:
            if group.rank:
                group.learn_a(x, group.d_z(d_qkv), pending, dropout, self.norm_1, numbers_1)
            pending.flush()
            return None
        dn = group.product_back(d_qkv, any_space, matrix_qkv)
        del d_qkv
        group.learn_a(x, dn, pending, dropout, self.norm_1, numbers_1)
        pending.flush()
        return group.d_stream(dn, x, self.norm_1, numbers_1, z_qkv, d_middle, dropout)

    @staticmethod
    def _norm(group: Group, norm: Norm, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, its rows' numbers, and a group's input [X | Z] with X alone."""
        normed = group.empty_input(x.size(0))
        return *add_norm(x, y, norm, normed), normed

    def _qkv(self, normed: Tensor, run: Pass, space: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Z, qkv, and [W | B] as group.matrix made it.

        Where there is nothing but rotation, qkv is rotated already.
        """
        group = self.qkv
        z = group.project(normed, normed, self._dropout(group, 0, run))
        matrix = group.matrix(space)
        qkv = group.product(normed, matrix)
        if self.shaping.does_nothing:
            self._rotate(qkv, run)
        return z, qkv, matrix

    def _rotate(self, qkv: Tensor, run: Pass) -> None:
        if self.rotates:
            heads, (cos, sin) = self.heads, run.ropes[self.windowed]
            rotate_(qkv, run.positions, cos, sin, heads.query + heads.key, heads.size, self.interleaved)

    def _shaped(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """Queries, keys and values as attention takes them, from what _qkv returns; and as they were rotated."""
        shaping = self.shaping
        if shaping.does_nothing:
            return qkv, qkv
        rotated = shaping.before(qkv, run.query_scale) if shaping.before else qkv.clone()
        self._rotate(rotated, run)
        return shaping.after(rotated, None) if shaping.after else rotated, rotated

    def _attention_backward(self, d_out: Tensor, qkv: Tensor, attended: Tensor, extra: Any, run: Pass) -> Tensor:
        """The gradient of what the product with the stacked weights gave, (T, (H + 2 K) D)."""
        shaped, rotated = self._shaped(qkv, run)
        parts = attention_backward(d_out, shaped, attended, extra, self.heads, run.layout)
        if self.shaping.after:
            parts = self.heads.split(pull_back(self.shaping.after, rotated, None, torch.cat(parts, dim=1).flatten(1)))
        del shaped, rotated
        if self.rotates:
            d_qkv = rotate_backward(*parts, run.positions, *run.ropes[self.windowed], self.interleaved)
        else:
            d_qkv = torch.cat(parts, dim=1).flatten(1)
        return pull_back(self.shaping.before, qkv, run.query_scale, d_qkv) if self.shaping.before else d_qkv

    def _project(self, attended: Tensor, run: Pass, space: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        group, z = self.projection, None
        if group.a is not None:
            both = group.empty_input(attended.size(0))
            z = group.project(attended, both, self._dropout(group, 1, run), copy=True)
            attended = both
        matrix = group.matrix(space)
        return group.product(attended, matrix), z, matrix

    def _gate_up(self, normed: Tensor, run: Pass, space: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Z, the branches' products, and [W | B]."""
        group = self.gate_up
        z = group.project(normed, normed, self._dropout(group, 2, run))
        matrix = group.matrix(space)
        return z, group.product(normed, matrix), matrix

    @staticmethod
    def _post_backward(norm: Norm, raw: Tensor | None, d_out: Tensor) -> Tensor:
        if norm.changes_nothing:
            return d_out
        raw = d_out if raw is None else raw  # not read by a norm that only multiplies
        return norm_backward(d_out, raw, norm, add_norm(raw, None, norm, torch.empty_like(raw))[1])

    def _dropout(self, group: Group, which: int, run: Pass) -> Any:
        return group.dropout(run.seed, 4 * self.number + which)
