"""A block's forward and backward pass, written by hand so that little is launched, read twice or kept.

The residual stream travels as a pair, x and y with the stream being x + y, so that each norm adds and normalises in one
pass. Every quantised weight is dequantised once in the forward and once in the backward pass. What is kept in between
is chosen by the block's `recompute`:

    none     everything that the backward pass reads
    mlp      not gate and up
    attn     the attention's output and the residual stream behind it; qkv, gate and up are computed again
    offload  as attn, with both and the block's input on the host
    full     the block's input only
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.attention import Heads, Layout, attention, attention_backward
from lit_qlora.fused.group import Group
from lit_qlora.fused.offload import Offload
from lit_qlora.kernels.norm import add_norm, norm_backward
from lit_qlora.kernels.rope import rotate_, rotate_backward
from lit_qlora.kernels.swiglu import swiglu, swiglu_backward
from lit_qlora.kernels.thin import Pending, grad_a, grad_b, project, rank_update
from lit_qlora.settings import Recompute


@dataclass
class Pass:
    """What the blocks of a forward pass, and of its backward pass, have in common.

    Attributes:
        positions: (T,) int32; cos, sin: (P, R / 2) float32.
        workspaces: for dequantised weights: any, qkv kept through a block's backward pass, projection likewise.
        seed: of the dropout, 0 for none.
    """

    layout: Layout
    positions: Tensor
    cos: Tensor
    sin: Tensor
    workspaces: tuple[Tensor | None, Tensor | None, Tensor | None]
    offload: Offload
    seed: int
    keep: bool
    """Whether there will be a backward pass."""


@dataclass
class Kept:
    """What a block keeps for its backward pass; a number stands for a tensor on the host."""

    x: Tensor | int
    z_down: Tensor | None
    rstd_1: Tensor | None = None
    z_qkv: Tensor | None = None
    qkv: Tensor | None = None
    attended: Tensor | int | None = None
    attention: Any = None
    z_projection: Tensor | None = None
    middle: Tensor | int | None = None
    rstd_2: Tensor | None = None
    z_gate_up: Tensor | None = None
    gate_up: Tensor | None = None


class FusedBlock:
    """The weights of a block in groups, and its two passes."""

    def __init__(self, block: Any, heads: Heads, eps: float, dtype: torch.dtype, number: int) -> None:
        attn, mlp = block.attn, block.mlp
        self.qkv = Group([attn.query, attn.key, attn.value], dtype)
        self.projection = Group([attn.projection], dtype)
        self.gate_up = Group([mlp.gate, mlp.up], dtype)
        self.down = Group([mlp.down], dtype)
        self.groups = (self.qkv, self.projection, self.gate_up, self.down)
        self.norm_1: Tensor = block.norm_1.weight.detach()
        self.norm_2: Tensor = block.norm_2.weight.detach()
        self.heads, self.eps, self.number = heads, eps, number
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor, y: Tensor | None, run: Pass) -> tuple[Tensor, Tensor, Kept | None]:
        """(T, E) pair -> (T, E) pair, and what is kept."""
        keeps = self.recompute if run.keep else "full"
        x, rstd_1, z_qkv, qkv, _ = self._qkv(x, y, run, 0)
        attended, extra = attention(qkv, self.heads, run.layout)
        out, z_projection, _ = self._project(attended, run, 0)
        kept = Kept(x=run.offload.put(x) if run.keep and keeps == "offload" else x, z_down=None)
        if keeps in ("none", "mlp"):
            kept.rstd_1, kept.z_qkv, kept.qkv = rstd_1, z_qkv, qkv
        if keeps != "full":
            kept.attended = run.offload.put(attended) if keeps == "offload" else attended
            kept.attention, kept.z_projection = extra, z_projection
        del qkv, attended, extra
        middle, rstd_2, z_gate_up, gate_up, _ = self._gate_up(x, out, run)
        del out
        if keeps != "full":
            kept.middle = run.offload.put(middle) if keeps == "offload" else middle
        if keeps == "none":
            kept.rstd_2, kept.z_gate_up, kept.gate_up = rstd_2, z_gate_up, gate_up
        h = self.down.empty_input(x.size(0))
        if self.down.a is None:
            swiglu(gate_up, h)
        else:
            kept.z_down = project(gate_up, self.down.a, h, swiglu=True, dropout=self._dropout(self.down, 3, run))
        del gate_up
        y = self.down.product(h, self.down.matrix(run.workspaces[0]))
        return middle, y, kept if run.keep else None

    def backward(self, d_out: Tensor, kept: Kept, run: Pass, pending: Pending, wants_dx: bool) -> Tensor | None:
        """The gradient of the block's input stream from that of its output stream, both (T, E).

        The gradients of the adapters are added to those of the groups. With `wants_dx` False only they are wanted.
        """
        again = self.recompute
        off, any_space = run.offload, run.workspaces[0]
        x = kept.x
        matrix_qkv = matrix_projection = matrix_gate_up = out = None
        rstd_1, z_qkv, qkv = kept.rstd_1, kept.z_qkv, kept.qkv
        attended, extra, z_projection = kept.attended, kept.attention, kept.z_projection
        middle = off.get(kept.middle) if isinstance(kept.middle, int) else kept.middle
        if again == "full":
            assert isinstance(x, Tensor)
            _, rstd_1, z_qkv, qkv, matrix_qkv = self._qkv(x, None, run, 1)
            attended, extra = attention(qkv, self.heads, run.layout)
            out, z_projection, matrix_projection = self._project(attended, run, 2)

        # down and SwiGLU
        down, gate_up = self.down, self.gate_up
        if kept.z_down is not None:
            grad_b(d_out, kept.z_down, down.grad_b, down.stack, down.table, pending)
        dh = torch.mm(d_out, down.matrix(any_space))
        if again == "none":
            rstd_2, z_gate_up, products = kept.rstd_2, kept.z_gate_up, kept.gate_up
            kept.gate_up = None
        else:
            stream = middle if middle is not None else x
            assert isinstance(stream, Tensor)
            middle, rstd_2, z_gate_up, products, matrix_gate_up = self._gate_up(stream, out, run)
            del out, stream
        assert isinstance(middle, Tensor)
        assert products is not None
        assert rstd_2 is not None
        swiglu_backward(
            products, dh, down.a, down.grad_a if down.rank else None, z_gate_up,
            gate_up.grad_b if gate_up.rank else None, gate_up.stack, down.scale, pending, self._dropout(down, 3, run),
        )  # fmt: skip
        del dh
        for number in (attended, x):  # the product below hides the copies
            if isinstance(number, int):
                off.fetch(number)
        dn = torch.mm(products, matrix_gate_up if matrix_gate_up is not None else gate_up.matrix(any_space))
        del products
        dropout = self._dropout(gate_up, 2, run)
        if gate_up.a is not None:
            grad_a(middle, dn[:, gate_up.k :], gate_up.grad_a, gate_up.scale, pending, rstd_2, self.norm_2, dropout)
        if isinstance(kept.middle, int):
            off.fetch(kept.middle - 3)  # the block below; its large buffers are free now
        d_middle = norm_backward(dn, middle, self.norm_2, rstd_2, z_gate_up, gate_up.a, d_out, dropout)
        del dn, middle, d_out

        # projection and attention
        group = self.projection
        if z_projection is not None:
            grad_b(d_middle, z_projection, group.grad_b, group.stack, group.table, pending)
        da = torch.mm(d_middle, matrix_projection if matrix_projection is not None else group.matrix(any_space))
        attended = off.get(attended) if isinstance(attended, int) else attended
        x = off.get(x) if isinstance(x, int) else x
        assert attended is not None
        dropout = self._dropout(group, 1, run)
        if group.a is not None:
            grad_a(attended, da[:, group.k :], group.grad_a, group.scale, pending, dropout=dropout)
        d_attended = rank_update(da, group.a, group.k, dropout)
        del da
        if qkv is None:
            _, rstd_1, z_qkv, qkv, matrix_qkv = self._qkv(x, None, run, 0)
        assert rstd_1 is not None
        gradients = attention_backward(d_attended, qkv, attended, extra, self.heads, run.layout)
        del qkv, attended, d_attended
        kept.qkv = None
        d_qkv = rotate_backward(*gradients, run.positions, run.cos, run.sin)
        del gradients
        group, dropout = self.qkv, self._dropout(self.qkv, 0, run)
        if z_qkv is not None:
            grad_b(d_qkv, z_qkv, group.grad_b, group.stack, group.table, pending)
        if not wants_dx and not group.rank:
            pending.flush()
            return None
        dn = torch.mm(d_qkv, matrix_qkv if matrix_qkv is not None else group.matrix(any_space))
        del d_qkv
        if group.a is not None:
            grad_a(x, dn[:, group.k :], group.grad_a, group.scale, pending, rstd_1, self.norm_1, dropout)
        pending.flush()
        if not wants_dx:
            return None
        return norm_backward(dn, x, self.norm_1, rstd_1, z_qkv, group.a, d_middle, dropout)

    def _qkv(
        self, x: Tensor, y: Tensor | None, run: Pass, space: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """The stream, its rstd, Z, the rotated qkv, and [W | B] as it lies in workspace number `space`."""
        group = self.qkv
        normed = group.empty_input(x.size(0))
        x, rstd = add_norm(x, y, self.norm_1, normed, self.eps)
        z = None if group.a is None else project(normed, group.a, normed, dropout=self._dropout(group, 0, run))
        matrix = group.matrix(run.workspaces[space])
        qkv = group.product(normed, matrix)
        heads = self.heads
        rotate_(qkv, run.positions, run.cos, run.sin, heads.query + heads.key, heads.size)
        return x, rstd, z, qkv, matrix

    def _project(self, attended: Tensor, run: Pass, space: int) -> tuple[Tensor, Tensor | None, Tensor]:
        group, z = self.projection, None
        if group.a is not None:
            both = group.empty_input(attended.size(0))
            z = project(attended, group.a, both, copy=True, dropout=self._dropout(group, 1, run))
            attended = both
        matrix = group.matrix(run.workspaces[space])
        return group.product(attended, matrix), z, matrix

    def _gate_up(self, x: Tensor, y: Tensor | None, run: Pass) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        group = self.gate_up
        normed = group.empty_input(x.size(0))
        x, rstd = add_norm(x, y, self.norm_2, normed, self.eps)
        z = None if group.a is None else project(normed, group.a, normed, dropout=self._dropout(group, 2, run))
        matrix = group.matrix(run.workspaces[0])
        return x, rstd, z, group.product(normed, matrix), matrix

    def _dropout(self, group: Group, which: int, run: Pass) -> Any:
        return group.dropout((run.seed + 4 * self.number + which) % 2**31 if run.seed else 0)
