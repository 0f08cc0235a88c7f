"""A block's forward and backward pass, written by hand so that little is launched, read twice or saved.

The residual stream travels as a pair, x and y; their sum is the stream. So each norm adds and normalises in one pass.
Every quantised weight is dequantised once in the forward and once in the backward pass. The block's `recompute` chooses
the activations that are saved in between:

    none     all that the backward pass reads
    mlp      not the products of gate and up
    attn     the attention's output and the residual stream behind it; qkv, gate and up are recomputed
    offload  as attn, with both and the block's input on the host; with `sends_qkv` qkv too
    full     the block's input only
    full-offload  as full, with the input on the host

The MLP of a long row recomputes a slice of tokens at a time, see sliced.

Norms behind attention and MLP, where a family has them, read the products before them, which are saved too (`raw`).
Blocks that read the keys and values of an earlier one, which are always saved, add their gradients to that block's.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused import sliced
from lit_qlora.fused.attention import Heads, attention, attention_backward
from lit_qlora.fused.experts import ExpertMlp
from lit_qlora.fused.experts_beside import MlpBeside
from lit_qlora.fused.group import Group, Layers
from lit_qlora.fused.kernel_block import KernelBlock, attention_layers, heads_of
from lit_qlora.fused.memory import FULL, ON_HOST
from lit_qlora.fused.mlp import DenseMlp, Mlp
from lit_qlora.fused.offload import OnHost
from lit_qlora.fused.passes import Backward, Lent, Pass
from lit_qlora.fused.per_layer import OwnInput
from lit_qlora.fused.qkv_transforms import Shaping, pull_back
from lit_qlora.kernels.dropout import Dropout, drop
from lit_qlora.kernels.gate import gate_backward, gate_forward
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import apply_norm, post_norm_backward
from lit_qlora.kernels.qk_norm_rope import HeadNorm, Rotation, norm_rotate, norm_rotate_backward
from lit_qlora.kernels.rope import rotate_, rotate_backward
from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import Recompute

NO_WORKSPACES = (None, None, None)


@dataclass
class SavedBlock:
    """Activations of a block: saved by its forward pass, completed and used up by its backward pass.

    `out`, the attention's part of the stream, and the matrices, each [W | B] in its workspace, are recomputed only.
    """

    x: Tensor | OnHost
    below: OnHost | None
    """The last tensor that the block below has on the host, if it offloads."""
    statistics_1: Tensor | None = None
    z_qkv: Tensor | None = None
    qkv: Tensor | OnHost | None = None
    attended: Tensor | OnHost | None = None
    attention: Any = None
    z_projection: Tensor | None = None
    raw_1: Tensor | OnHost | None = None
    middle: Tensor | OnHost | None = None
    mlp: Any = None
    raw_2: Tensor | OnHost | None = None
    out: Tensor | None = None
    matrix_qkv: Tensor | None = None
    matrix_projection: Tensor | None = None


class Block(KernelBlock):
    """The two passes of a block, around an attention of one kind or another.

    Attributes:
        groups: the weights.
        recompute: see the module.
        sends_qkv: see FastSizes.sends_qkv.
        fetches_below: the block below offloads.
        is_last: no block is above it, whose backward pass would hide copies of what it reads first.
        goes_back: it has a backward pass, because it or a block below it learns.
    """

    def __init__(
        self, block: Any, config: ModelConfig, dtype: torch.dtype, number: int, like: Tensor, fp8: bool
    ) -> None:
        super().__init__(block, config, number, like)
        self.mlp: Mlp
        if block.beside is not None:
            self.mlp = MlpBeside(block, self.norm_2, config, dtype, number, like)
        elif config.has_experts(number):
            self.mlp = ExpertMlp(block.mlp, self.norm_2, config, dtype, number)
        else:
            self.mlp = DenseMlp(block.mlp, self.norm_2, config, dtype, number, fp8)
        self.own = None if block.per_layer is None else OwnInput(block.per_layer, config, dtype, number, fp8)
        self.groups: tuple[Layers, ...] = (*self.mlp.groups, *(self.own.groups if self.own else ()))
        self._behind_attention = len(self.groups)
        self.recompute: Recompute = "none"
        self.sends_qkv = self.fetches_below = self.is_last = False
        self.goes_back = True
        self.keeps_raw_1 = self.post_1.statistics > 0
        self.keeps_raw_2 = self.post_2.statistics > 0 or (
            isinstance(self.mlp, DenseMlp) and self.mlp.down.gains is not None
        )

    def forward(self, stream: list[Tensor], run: Pass) -> SavedBlock | None:
        """Replace the (T, E) pair in `stream`; the saved activations, None where no backward pass will follow.

        The first block, and one behind a block with a scale, finds x alone. The pair is taken out of the list, so that
        its memory is free as soon as it is not needed.
        """
        saves = run.saves and self.goes_back
        policy: Recompute = self.recompute if saves else "full"
        saved, x, raw_1 = self._attend(stream, run, policy)
        out = drop(apply_norm(self.post_1, raw_1), self._drops(1, run))
        if policy not in FULL and self.keeps_raw_1:
            saved.raw_1 = run.save(raw_1, policy)
        del raw_1
        middle, statistics_2, normed = self.mlp.norm(x, None if self.parallel else out)
        beside = out if self.parallel else None
        del out, x
        if policy not in FULL and not self.parallel:
            saved.middle = self._save(middle, run, policy, first=True)
        if policy == "full-offload":
            run.offload.wait_for_copies(1)  # those of the blocks before, which would lie beside a slice of the MLP
        handed = [normed]
        del normed
        keeps = self._keeps_mlp(run, policy)
        if keeps:
            run.offload.wait_for_copies(3)  # all but qkv's, beside the two that are held
            raw_2, saved.mlp = self.mlp.forward(handed, statistics_2, middle, run, saves=True)
        else:
            raw_2, saved.mlp = sliced.forward(self.mlp, handed, statistics_2, middle, run)
        y = drop(apply_norm(self.post_2, raw_2), self._drops(2, run))
        if saves and self.keeps_raw_2:
            saved.raw_2 = self._save(raw_2, run, policy, first=True)
            if y is raw_2 and not (beside is None and self.own is None and self.scale is None):
                y = y.clone()  # it changes in place
        if beside is not None:
            y.add_(beside)
        together = [middle, y] if self.own is None and self.scale is None else [y.add_(middle)]
        if self.own is not None:
            together = [self.own.forward(together[0], run)]
        if self.scale is not None:
            together[0].mul_(self.scale)
        if policy not in ON_HOST or keeps:
            run.offload.wait_for_copies()  # the copies of the blocks before, which have arrived by now
        stream += together
        return saved if saves else None

    def backward(
        self, d_out: Tensor, saved: SavedBlock, run: Pass, pending: Pending, wants_dx: bool, carries: bool = False
    ) -> Tensor | None:
        """The gradient of the block's input stream from that of its output stream, both (T, E).

        `d_out` is used up. The gradients of the adapters are added to those of the groups. With `wants_dx` False only
        they are wanted. With `carries` the dequantised weights are carried over to the next forward pass.
        """
        back = Backward(run, pending, NO_WORKSPACES if carries else run.workspaces)
        if self.scale is not None:
            d_out = d_out.mul_(self.scale)
        run.offload.wait_for_copies()  # those of the last block, which have arrived by now
        for tensor in (saved.raw_2, saved.middle, saved.qkv):  # the last is the largest, and read last
            run.offload.fetch(tensor)
        if self.recompute in FULL:
            self._recompute(saved, back)
        if self.own is not None:
            d_out = self.own.backward(self._behind_mlp(saved, back), d_out, back)
        d_middle = self._mlp_backward(d_out, saved, back)
        if not (wants_dx or self._attention_learns):
            pending.flush()
            return None
        d_attended = d_out if self.parallel else d_middle
        return self._attend_backward(d_attended, d_middle if wants_dx else None, saved, back)

    @abstractmethod
    def _attend(self, stream: list[Tensor], run: Pass, policy: Recompute) -> tuple[SavedBlock, Tensor, Tensor]:
        """Return the saved activations, the block's input, and attention's output before a norm behind it.

        `stream` is that of forward. A tensor for the host leaves as soon as it is there, since the copies take about as
        long as all the rest.
        """

    @abstractmethod
    def _attend_again(self, saved: SavedBlock, back: Backward) -> Tensor:
        """Complete `saved` from the block's input; return attention's output before a norm behind it."""

    @abstractmethod
    def _attend_backward(
        self, d_out: Tensor, d_stream: Tensor | None, saved: SavedBlock, back: Backward
    ) -> Tensor | None:
        """The gradient of the block's input; None where that is not wanted.

        Args:
            d_out: gradient of the norm behind attention, or of attention without one.
            d_stream: what does not come through attention; None where no gradient of the input is wanted.
        """

    def _save_input(self, x: Tensor, run: Pass, policy: Recompute) -> Tensor | OnHost:
        return self._save(x, run, policy, first=policy in FULL or self.parallel)

    def _save(self, tensor: Tensor, run: Pass, policy: Recompute, first: bool) -> Tensor | OnHost:
        """Save; what the backward pass reads first would be waited for in the last block, and stays there."""
        holds = first and self.is_last and policy in ON_HOST
        return run.offload.hold(tensor) if holds else run.save(tensor, policy)

    def _keeps_mlp(self, run: Pass, policy: Recompute) -> bool:
        """Tell whether gate and up are saved, instead of recomputed."""
        return policy == "none" or (policy == "offload" and self.is_last and run.keeps_mlp)

    @property
    def _attention_learns(self) -> bool:
        return any(group.rank for group in self.groups[: -self._behind_attention])

    def _drops(self, which: int, run: Pass) -> Dropout:
        """The dropout of attention's weights (0), of its output (1) and of the MLP's (2)."""
        return run.dropout(1 + 3 * self.number + which)

    def _query_scale(self, run: Pass) -> Tensor | None:
        return run.query_scale if self.scaled else None

    def _recompute(self, saved: SavedBlock, back: Backward) -> None:
        """The attention's half of the block again, from its input."""
        raw_1 = self._attend_again(saved, back)
        saved.raw_1 = raw_1 if self.keeps_raw_1 else None
        again = None if self.parallel else apply_norm(self.post_1, raw_1)
        saved.out = None if again is None else drop(again, self._drops(1, back.forward))

    def _behind_mlp(self, saved: SavedBlock, back: Backward) -> Tensor:
        """The stream behind the MLP again, from what its backward pass reads, which is on the device then."""
        get = back.forward.offload.get
        if saved.middle is None:
            assert saved.out is not None
            saved.x = get(saved.x)
            saved.middle, saved.out = saved.x + saved.out, None
        assert saved.raw_2 is not None
        saved.middle, saved.raw_2 = get(saved.middle), get(saved.raw_2)
        return drop(apply_norm(self.post_2, saved.raw_2), self._drops(2, back.forward)).add_(saved.middle)

    def _mlp_backward(self, d_out: Tensor, saved: SavedBlock, back: Backward) -> Tensor:
        """The gradient of the stream between attention and MLP."""
        get = back.forward.offload.get
        raw_2 = None if saved.raw_2 is None else get(saved.raw_2)
        stream: list[Tensor | OnHost]
        if saved.middle is not None:
            stream = [saved.middle]
        else:
            saved.x = get(saved.x)
            stream = [saved.x] if saved.out is None else [saved.x, saved.out]
        d_y = [post_norm_backward(self.post_2, raw_2, drop(d_out, self._drops(2, back.forward)))]
        if isinstance(self.mlp, DenseMlp):
            self.mlp.down.add_grad_lengths(d_y[0], raw_2)
        del raw_2
        saved.raw_2 = saved.middle = saved.out = None
        ahead = (saved.attended, saved.x if saved.qkv is None else None, saved.raw_1)
        if isinstance(saved.mlp, list):
            return sliced.backward(self.mlp, d_y, stream, saved.mlp, d_out, back, ahead, keeps=self.parallel)
        return self.mlp.backward(d_y, stream, saved.mlp, d_out, back, ahead)

    def _d_raw_1(self, d_out: Tensor, saved: SavedBlock, back: Backward) -> tuple[Tensor, Tensor | None]:
        """The gradient of attention's output before a norm behind it, and that output if it is kept."""
        raw, saved.raw_1 = saved.raw_1, None
        raw_1 = None if raw is None else back.forward.offload.get(raw)
        return post_norm_backward(self.post_1, raw_1, drop(d_out, self._drops(1, back.forward))), raw_1


class FusedBlock(Block):
    """A block whose attention is computed by kernels, with both passes by hand.

    Attributes:
        gates: columns of the product with the stacked weights that gate the attention's output; None without a gate.
        reuses, lends: it reads the keys and values of an earlier block of its kind, or later ones read its own.
        own_heads: the heads in its own product; `heads` are those of its attention.
    """

    def __init__(
        self, block: Any, config: ModelConfig, dtype: torch.dtype, number: int, like: Tensor, fp8: bool
    ) -> None:
        super().__init__(block, config, dtype, number, like, fp8)
        self.qkv, self.projection = (Group(layers, dtype, fp8) for layers in attention_layers(block.attn))
        self.groups = (self.qkv, self.projection, *self.groups)
        self.heads = heads_of(block.attn, config, self.windowed)
        self.reuses, self.lends, self.kind = config.reuses(number), config.lends(number), (self.windowed, self.rotates)
        self.own_heads = replace(self.heads, key=0) if self.reuses else self.heads
        keeps = self.qkv.gains is not None
        self.shaping = Shaping(block.attn, config, self.own_heads, self.scaled, like, keeps)
        self.keeps_raw_1 |= self.projection.gains is not None
        gate = block.attn.query_gate
        self.gates = None if gate is None else slice(self.qkv.n - gate.out_features, self.qkv.n)

    def _attend(self, stream: list[Tensor], run: Pass, policy: Recompute) -> tuple[SavedBlock, Tensor, Tensor]:
        """See Block."""
        x, y = stream[0], stream[1] if len(stream) > 1 else None
        stream.clear()
        x, statistics_1, normed = self.qkv.normed(self.norm_1, x, y)
        del y
        below = run.offload.latest if self.fetches_below else None
        keeps = self._keeps_mlp(run, policy)  # then attention's output is read first
        saved = SavedBlock(self._save_input(x, run, policy), below)
        z_qkv, qkv = self._qkv(normed, run, run.workspaces[0])[:2]  # without the matrix, which may be carried over
        del normed
        if policy in ("none", "mlp") or (policy == "offload" and self.sends_qkv):
            saved.statistics_1, saved.z_qkv, saved.qkv = statistics_1, z_qkv, self._save(qkv, run, policy, not keeps)
        q, k, v = self._shaped(qkv, run)
        if self.lends:
            run.shared.lent[self.kind] = Lent(k, v)
        room = None if policy == "offload" else self._room(len(x))  # a copy to the host takes rows that touch
        attended, extra = attention(q, k, v, self._heads(run), run.layout, self._columns(room))
        del q, k, v
        if policy not in FULL:
            saved.attended, saved.attention = self._save(attended, run, policy, keeps), extra
        raw_1, z_projection = self._project(attended, room, qkv, run, run.workspaces[0])[:2]
        if policy not in FULL:
            saved.z_projection = z_projection
        return saved, x, raw_1

    def _attend_again(self, saved: SavedBlock, back: Backward) -> Tensor:
        """See Block."""
        run, (_, space_qkv, space_projection) = back.forward, back.workspaces
        self._recompute_qkv(saved, back, space_qkv)
        assert isinstance(saved.qkv, Tensor)
        room = self._room(len(saved.qkv))
        saved.attended, saved.attention = attention(
            *self._shaped(saved.qkv, run), self._heads(run), run.layout, self._columns(room)
        )
        raw_1, saved.z_projection, saved.matrix_projection = self._project(
            saved.attended, room, saved.qkv, run, space_projection
        )
        return raw_1

    def _recompute_qkv(self, saved: SavedBlock, back: Backward, space: Tensor | None) -> None:
        saved.x = back.forward.offload.get(saved.x)
        _, saved.statistics_1, normed = self.qkv.normed(self.norm_1, saved.x, None)
        saved.z_qkv, saved.qkv, saved.matrix_qkv = self._qkv(normed, back.forward, space)

    def _attend_backward(
        self, d_out: Tensor, d_stream: Tensor | None, saved: SavedBlock, back: Backward
    ) -> Tensor | None:
        """See Block."""
        back.forward.offload.fetch(saved.x)  # the MLP's large tensors are freed
        if self.gates is not None:
            self._fetch_qkv(saved, back)
            if back.workspaces[0] is not None:
                saved.matrix_qkv = None  # the workspace is for the projection's weights now
        # In a list, from which the next part takes it, so that its memory is free early.
        gradient = [self._projection_backward(d_out, saved, back)]
        gradient.append(self._attention_backward(gradient, saved, back))
        return self._qkv_backward(gradient, d_stream, saved, back)

    def _projection_backward(self, d_out: Tensor, saved: SavedBlock, back: Backward) -> Tensor:
        """The gradient of the attention's output."""
        group, get = self.projection, back.forward.offload.get
        d_y, raw = self._d_raw_1(d_out, saved, back)
        group.add_grad_lengths(d_y, raw)
        del raw
        group.add_grad_b(d_y, saved.z_projection, back.pending)
        saved.z_projection = None  # it may lie beside `attended`, whose memory is free early
        da, dz = group.back(d_y, back.workspaces[0], saved.matrix_projection)
        del d_y
        assert saved.attended is not None
        saved.attended, dropout = get(saved.attended), self._dropout(group, 1, back.forward)
        read = saved.attended
        if self.gates is not None:
            assert isinstance(saved.qkv, Tensor)
            read = torch.empty_like(read)
            gate_forward(saved.attended, saved.qkv[:, self.gates], read)
        group.add_grad_a(read, dz, back.pending, dropout)
        del read
        return group.d_input(da, dz, dropout)

    def _attention_backward(self, d_attended: list[Tensor], saved: SavedBlock, back: Backward) -> Tensor:
        """The gradient of what the product with the stacked weights gave, as wide."""
        self._fetch_qkv(saved, back)
        qkv = saved.qkv
        assert isinstance(qkv, Tensor)
        assert isinstance(saved.attended, Tensor)
        d_qkv = None
        if self.gates is not None:
            d_qkv = torch.empty_like(qkv)
            gate_backward(d_attended[0], saved.attended, qkv[:, self.gates], d_qkv[:, self.gates])
        d_qkv = self._d_qkv(d_attended.pop(), qkv, saved.attended, saved.attention, back.forward, d_qkv)
        self.qkv.add_grad_lengths(d_qkv, qkv)
        saved.qkv = saved.attended = None
        return d_qkv

    def _fetch_qkv(self, saved: SavedBlock, back: Backward) -> None:
        """Bring qkv into `saved`: computed again, or from the host."""
        off = back.forward.offload
        if saved.qkv is None:
            self._recompute_qkv(saved, back, back.workspaces[0])
        else:
            saved.qkv = off.get(saved.qkv)

    def _qkv_backward(
        self, gradient: list[Tensor], d_middle: Tensor | None, saved: SavedBlock, back: Backward
    ) -> Tensor | None:
        """The gradient of the block's input, which `d_middle` is part of; None where that is None."""
        run, pending, group, d_qkv = back.forward, back.pending, self.qkv, gradient.pop()
        run.offload.fetch(saved.below)  # the large buffers are free now
        statistics, dropout = saved.statistics_1, self._dropout(group, 0, run)
        assert statistics is not None
        group.add_grad_b(d_qkv, saved.z_qkv, pending)
        if d_middle is None:
            if group.rank:
                x = run.offload.get(saved.x)
                group.add_grad_a(x, group.d_z(d_qkv), pending, dropout, self.norm_1, statistics)
            pending.flush()
            return None
        dn = group.product_back(d_qkv, back.workspaces[0], saved.matrix_qkv)
        del d_qkv
        x = run.offload.get(saved.x)  # not before: the product hides its copy
        d_x = group.normed_backward(dn, x, self.norm_1, statistics, saved.z_qkv, d_middle, dropout, pending)
        pending.flush()
        return d_x

    def _qkv(self, normed: Tensor, run: Pass, space: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Z, qkv, and [W | B] as group.matrix made it.

        Where there is nothing but rotation, qkv is rotated already.
        """
        group = self.qkv
        z = group.project(normed, normed, self._dropout(group, 0, run))
        matrix = group.matrix(space)
        qkv = group.product(normed, matrix, z)
        if self.shaping.does_nothing:
            self._rotate(qkv, run)
        return z, qkv, matrix

    def _rotate(self, qkv: Tensor, run: Pass) -> None:
        if self.rotates:
            heads, (cos, sin) = self.own_heads, run.ropes[self.windowed]
            rotate_(qkv, run.positions, cos, sin, heads.query + heads.key, heads.size, self.interleaved)

    def _shaped(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them, from the result of _qkv."""
        q, k, v = self._shaped_own(qkv, run)
        if self.reuses:
            lent = run.shared.lent[self.kind]
            return q, lent.k, lent.v
        return q, k, v

    def _shaped_own(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.own_heads
        if self.shaping.does_nothing:
            return heads.split(qkv)
        if not self.shaping.has_kernel:
            return heads.split(self._shaped_by_torch(qkv, run)[0])
        return norm_rotate(qkv, *self._kernel_shaping(run), (heads.query, heads.key, heads.size))

    def _d_qkv(
        self, d_out: Tensor, qkv: Tensor, attended: Tensor, extra: Any, run: Pass, out: Tensor | None = None
    ) -> Tensor:
        """The gradient of the product with the stacked weights, in `out` if it has columns for gates already."""
        if not (self.shaping.does_nothing or self.shaping.has_kernel):
            return self._d_qkv_by_torch(d_out, qkv, attended, extra, run)
        parts = attention_backward(d_out, *self._shaped(qkv, run), attended, extra, self._heads(run), run.layout)
        if self.reuses or self.lends:
            parts = self._of_own(parts, run.shared.lent[self.kind])
        if self.shaping.has_kernel:
            return norm_rotate_backward(*parts, qkv, *self._kernel_shaping(run), out)
        return self._unrotated(parts, run)

    def _of_own(self, parts: tuple[Tensor, Tensor, Tensor], lent: Lent) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the block's own queries, keys and values, from those of its attention's."""
        d_q, d_k, d_v = parts
        if self.reuses:
            lent.add(d_k, d_v)
            return d_q, d_q[:, :0], d_q[:, :0]
        d_k, d_v = lent.total(d_k, d_v)
        return d_q, d_k, d_v

    def _kernel_shaping(self, run: Pass) -> tuple[HeadNorm | None, Rotation | None, Tensor | None]:
        rotation = Rotation(run.positions, *run.ropes[self.windowed], self.interleaved) if self.rotates else None
        scale = self._query_scale(run)
        return self.shaping.head_norm, rotation, None if scale is None else scale.flatten()

    def _shaped_by_torch(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """The stacked queries, keys and values as attention takes them, and as they were rotated."""
        shaping = self.shaping
        rotated = shaping.before(qkv, self._query_scale(run)) if shaping.before else qkv.clone()
        self._rotate(rotated, run)
        return shaping.after(rotated, None) if shaping.after else rotated, rotated

    def _d_qkv_by_torch(self, d_out: Tensor, qkv: Tensor, attended: Tensor, extra: Any, run: Pass) -> Tensor:
        shaped, rotated = self._shaped_by_torch(qkv, run)
        parts = attention_backward(d_out, *self.heads.split(shaped), attended, extra, self._heads(run), run.layout)
        if self.shaping.after:
            parts = self.heads.split(pull_back(self.shaping.after, rotated, None, torch.cat(parts, dim=1).flatten(1)))
        del shaped, rotated
        d_qkv = self._unrotated(parts, run)
        return pull_back(self.shaping.before, qkv, self._query_scale(run), d_qkv) if self.shaping.before else d_qkv

    def _unrotated(self, parts: tuple[Tensor, Tensor, Tensor], run: Pass) -> Tensor:
        """The stacked gradient before the rotation from those of queries, keys and values behind it."""
        if not self.rotates:
            return torch.cat(parts, dim=1).flatten(1)
        return rotate_backward(*parts, run.positions, *run.ropes[self.windowed], self.interleaved)

    def _room(self, tokens: int) -> Tensor | None:
        """[X | Z] of the projection for attention to write X, (T, K + R); None where X is something else."""
        direct = self.projection.a is not None and self.gates is None
        return self.projection.empty_input(tokens) if direct else None

    def _columns(self, room: Tensor | None) -> Tensor | None:
        return None if room is None else room[:, : self.projection.k]

    def _project(
        self, attended: Tensor, room: Tensor | None, qkv: Tensor, run: Pass, space: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The projection's output, Z, and [W | B] as group.matrix made it.

        Where attention has written into `room`, Z is a view of it too, so that it is saved once.
        """
        group, z = self.projection, None
        if group.a is not None or self.gates is not None:
            both = group.empty_input(attended.size(0)) if room is None else room
            lies_there = attended.data_ptr() == both.data_ptr()
            if self.gates is not None:
                gate_forward(attended, qkv[:, self.gates], both)
                attended = both
            z = group.project(attended, both, self._dropout(group, 1, run), copy=self.gates is None and not lies_there)
            z = both[:, group.k :] if lies_there else z
            attended = both
        matrix = group.matrix(space)
        return group.product(attended, matrix), z, matrix

    def _heads(self, run: Pass) -> Heads:
        """The sizes of attention, and what of its weights this pass drops."""
        dropout = self._drops(0, run)
        return replace(self.heads, dropout=dropout) if dropout.p else self.heads

    def _dropout(self, group: Group, which: int, run: Pass) -> Dropout:
        return group.dropout(run.seed, 4 * self.number + which)
