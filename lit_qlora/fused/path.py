"""The model on the fast path: its blocks and head, where its adapters lie, and its forward and backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.fused.attention import Layout
from lit_qlora.fused.block import Block, FusedBlock, SavedBlock
from lit_qlora.fused.delta_rule import has_kernels
from lit_qlora.fused.documents import Documents
from lit_qlora.fused.experts import dequantize_ahead
from lit_qlora.fused.graphs import Graphs
from lit_qlora.fused.group import Copies, Group, Layers
from lit_qlora.fused.head import Head, Labelled
from lit_qlora.fused.kernel_block import norm_of, takes_torch
from lit_qlora.fused.memory import (
    COPY_BY_BLOCK,
    FULL,
    ON_HOST,
    FastSizes,
    adapters_met,
    lowest_learning,
    rope_rows,
)
from lit_qlora.fused.micro_batch import Eager, Inputs, Loss, SavedPass, Work
from lit_qlora.fused.offload import Offload, to_device
from lit_qlora.fused.passes import Pass, Ropes, Shared, Workspaces
from lit_qlora.fused.per_layer import OwnEmbeddings
from lit_qlora.fused.support import GROWING
from lit_qlora.fused.torch_block import TorchBlock
from lit_qlora.fused.trained_rows import rows_of
from lit_qlora.fused.uneven import PaddedB, differ
from lit_qlora.kernels.dropout import drop
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import add_norm, apply_norm
from lit_qlora.kernels.scale import scale_
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.attention import query_scale, tree_mask, window_of
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, IGNORE, times
from lit_qlora.model.lesson import Lesson
from lit_qlora.model.mlp import Seen
from lit_qlora.model.rope import rope_table, rotates_locally
from lit_qlora.report import tell
from lit_qlora.settings import Recompute
from lit_qlora.sharded import RowParts


def kind_of(block: Any, config: ModelConfig) -> type[Block]:
    """The kind of block that computes a block of the plain model."""
    return TorchBlock if takes_torch(block, config) else FusedBlock


class Fused:
    """The fast path of one model.

    Attributes:
        recompute: the policy of each block; see lit_qlora.fused.block.
        graphs: CUDA graphs of micro-batches of few tokens, if there are any.
        carries: dequantised weights may be carried over from a backward pass to the next forward pass.
        cached_blocks: blocks whose quantised weights are also kept dequantised for the whole run; the last ones.
        copies_by_block: the adapters are copied to 16 bit block by block, in each pass.
        lowest: the number of the first block with a backward pass; nothing below it learns.
    """

    graphs: Graphs | None = None
    ropes: Ropes | None = None
    carries = True
    _carried = False

    def __init__(
        self,
        model: GPT,
        fp8: bool = False,
        cached_blocks: int = 0,
        ahead: bool = True,
        copies_at_once: bool = False,
    ) -> None:
        config = model.config
        self.model, self.config = model, config
        self.chunk = config.sliding_window if config.chunked_window else None
        self.dtype, self.device = model.embed.weight.dtype, model.embed.weight.device
        like = model.embed.weight.detach()[0]
        self.blocks: list[Block] = [
            kind_of(block, config)(block, config, self.dtype, i, like, fp8) for i, block in enumerate(model.blocks)
        ]
        self.rows, head_rows = rows_of(model)
        head_norm, head = norm_of(model.norm, like, config.logit_multiplier), Group([model.head], self.dtype)
        self.head = Head(head_norm, head, config.logit_softcap, head_rows)
        self.embed_norm = norm_of(model.embed_norm, like)
        self.own = None if model.per_layer is None else OwnEmbeddings(model.per_layer, config, self.dtype)
        self.outside: tuple[Layers, ...] = (*([self.own.group] if self.own else []), self.head.group)
        self.groups = [*(group for block in self.blocks for group in block.groups), *self.outside]
        self.lowest = lowest_learning(model)
        for block in self.blocks[: self.lowest]:
            block.goes_back = False
        self.fp8, self.offload, self.pending = fp8, Offload(), Pending()
        self.workspaces: Workspaces = (None, None, None)
        self.ropes = None if config.rope_scaling in GROWING else self._tables(1)
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        experts = (block.mlp.experts for block in self.blocks)
        self._routers = [each.routing.router for each in experts if each is not None]
        self._lay_out_adapters()
        self._lay_out_copies(by_block=self._is_large and not copies_at_once)
        for group in self.groups:
            if isinstance(group, Group):
                group.measure()
        self._dequantizes_ahead = ahead
        self.sizes, self.cached_blocks = self._sizes(), min(cached_blocks, len(self.blocks))
        # The last ones: their weights could not be carried over; see FastSizes.carries.
        for block in self.blocks[len(self.blocks) - self.cached_blocks :]:
            for group in block.groups:
                group.cache()
        self.ahead = dequantize_ahead([block.mlp for block in self.blocks], self.lowest) if ahead else []
        self.set_recompute(["none"] * len(self.blocks))
        if (gathers := model.gathers) is not None:  # a copy would keep the bytes of whatever was gathered last
            stored = (tensor for block in self.blocks for group in block.groups for tensor in group.stored)
            assert all(map(gathers.holds, stored)), "stacks are views of slabs, see lit_qlora.sharded.slab"

    def _sizes(self) -> FastSizes:
        adapted = max(adapters_met(block, self.config) for block in self.model.blocks)
        rank = max(group.stack.r for group in self.groups)
        quantized = any(group.quantized for block in self.blocks for group in block.groups)
        head = self.head.group.weight is not None
        carried = tuple(
            2.0 * sum(g.n * g.width for g in block.groups if isinstance(g, Group) and g.quantized and self.carries)
            for block in self.blocks
        )
        ahead, lowest = self._dequantizes_ahead, self.lowest
        known = (rank, adapted, quantized, head, self.fp8, ahead)
        delta = bool(self.config.delta_layers) and not self.config.state_space
        kernels = delta and has_kernels(self.device, self.config.delta_key_size)
        kinds = {"drops": self.model.dropout > 0, "dora": bool(self.every_length), "delta_kernels": kernels}
        return FastSizes(self.config, *known, lowest=lowest, carried=carried, **kinds)

    def _tables(self, count: int) -> Ropes:
        """The tables of `count` positions or more; longer ones take the place of shorter ones."""
        if self.ropes is None or len(self.ropes[0][0]) < count:
            rows = torch.arange(rope_rows(self.config, count), device=self.device)
            self.ropes = self._ropes(rows[None], None)
        return self.ropes

    def _ropes(self, positions: Tensor, segments: Tensor | None) -> Ropes:
        """The tables of blocks without a sliding window and with one, a row for each of `positions` (B, T)."""

        def table(local: bool) -> tuple[Tensor, Tensor]:
            cos, sin = rope_table(self.config, positions, local, segments)
            return to_device(cos.flatten(0, 2), self.device), to_device(sin.flatten(0, 2), self.device)

        whole = table(local=False)
        return whole, table(local=True) if rotates_locally(self.config) else whole

    def _lay_out_adapters(self) -> None:
        """Move the adapters into one float32 tensor, stacked by group, and make buffers for their 16-bit copies."""
        adapted = [group for group in self.groups if group.rank]
        self.size_a = size_a = sum(group.size_a for group in adapted)
        self.flat: list[tuple[nn.Parameter, Tensor]] = []
        self.master = torch.zeros(size_a + sum(group.size_b for group in adapted), device=self.device)
        self.gradient = torch.zeros_like(self.master)
        self.every_a: list[tuple[nn.Parameter, Tensor]] = []
        self.every_b: list[tuple[nn.Parameter, Tensor]] = []
        self.has_gaps = self.rows is not None or self.model.score is not None
        first_a, first_b = 0, size_a
        for group in adapted:
            at_a, at_b = slice(first_a, first_a + group.size_a), slice(first_b, first_b + group.size_b)
            a, group.grad_a = (whole[at_a].view(group.rank, group.k) for whole in (self.master, self.gradient))
            b, group.grad_b = (whole[at_b].view(-1, group.stack.r) for whole in (self.master, self.gradient))
            self._lay_out_group(group, a, b)
            first_a, first_b = at_a.stop, at_b.stop
        self.padded = [padded for group in adapted for padded in group.padded]
        in_blocks = [group for block in self.blocks for group in block.groups if isinstance(group, Group)]
        self.sums = [one for group in in_blocks for one in group.sums]
        written = {one.total.data_ptr() for one in self.sums}
        both = [tensor for group in adapted for tensor in (group.grad_a, group.grad_b)]
        self._added = [tensor for tensor in both if tensor.data_ptr() not in written] if written else [self.gradient]
        dora = [group.gains for group in adapted if isinstance(group, Group) and group.gains is not None]
        self.every_length = [pair for gains in dora for pair in gains.lengths]
        self.carries = not dora

    def _lay_out_group(self, group: Layers, a: Tensor, b: Tensor) -> None:
        """Move the adapters of a group into its stacked A and B, where smaller ones are padded."""
        slots = [slot for slot in group.stack.slots if slot >= 0]
        shared, row_b, even = set(), 0, not differ(group.adapters)
        self.has_gaps |= not even or len(group.adapters) < len(group.adapted)
        gains = group.gains_of_layers if isinstance(group, Group) else [None] * len(slots)
        for layer, slot, own in zip(group.adapted, slots, gains, strict=True):
            of_b = slice(row_b, row_b + int(layer.out_features))  # type: ignore[arg-type]
            row_b = of_b.stop
            if not isinstance(layer, LoRALinear):
                continue
            r, row_a = len(layer.lora_a), slot * group.stack.r
            if layer.lora_a not in shared:
                self.every_a.append(_moved(layer.lora_a, a[row_a : row_a + r], group.grad_a[row_a : row_a + r]))
                shared.add(layer.lora_a)
            if even:
                self.every_b.append(_moved(layer.lora_b, b[of_b], group.grad_b[of_b]))
            else:
                factor = layer.scale / group.scale
                group.padded.append(PaddedB.of(layer, factor, b[of_b, :r], group.grad_b[of_b, :r], own))
                self.every_b.append((layer.lora_b, group.padded[-1].gradient))

    @property
    def _is_large(self) -> bool:
        """True if 16-bit copies of all adapters take much memory."""
        return self.master.numel() >= COPY_BY_BLOCK

    def _lay_out_copies(self, by_block: bool) -> None:
        """Make the buffers for the 16-bit copies: of all adapters, or of those of a block at a time."""
        self.copies_by_block = by_block
        parts = [*(block.groups for block in self.blocks), self.outside]
        parts = parts if by_block else [tuple(self.groups)]
        sizes = [(sum(group.size_a for group in part), sum(group.size_b for group in part)) for part in parts]
        low = torch.empty(max(a + b for a, b in sizes), dtype=self.dtype, device=self.device)
        all_a = self.master[: self.size_a].split([a for a, _ in sizes])
        all_b = self.master[self.size_a :].split([b for _, b in sizes])
        self.copies = [
            Copies(part, a, b, low[: len(a)], low[len(a) : len(a) + len(b)])
            for part, a, b in zip(parts, all_a, all_b, strict=True)
        ]

    def _copy_block(self, part: int, beside: bool = True) -> None:
        """Copy the adapters of a block, or of all outside of blocks (-1), unless all were copied at once."""
        if self.copies_by_block:
            self.copies[part].refresh(beside)

    def set_recompute(self, policies: Sequence[Recompute]) -> None:
        """Set the policy of each block, and make the workspaces that they need."""
        if self.graphs is not None:
            self.graphs.clear()  # they hold the workspaces' addresses
        for group in self.groups:
            group.carried = None
        for block, policy in zip(self.blocks, policies, strict=True):
            block.recompute = policy
            block.sends_qkv = self.sizes.sends_qkv(block.number)
        self.blocks[-1].is_last = True
        for below, block in pairwise(self.blocks):
            block.fetches_below = below.goes_back and below.recompute in ON_HOST

        def space(groups: Sequence[Layers]) -> Tensor | None:
            most = max((group.workspace_size for group in groups), default=0)
            return torch.empty(most, dtype=self.dtype, device=self.device) if most else None

        keeps = bool(set(FULL) & set(policies)) and not self.fp8  # in FP8 the layout differs in the backward pass
        self.workspaces = (None, None, None)  # freed before the new ones are taken
        anything = space(self.groups)
        by_kernels = [block for block in self.blocks if isinstance(block, FusedBlock)]
        qkv = space([block.qkv for block in by_kernels]) if keeps else anything
        projection = space([block.projection for block in by_kernels]) if keeps else anything
        self.workspaces = (anything, qkv, projection)

    def replay(self, graph: Callable[[], None], backward: bool) -> None:
        """Launch a captured pass; buffers get its first weights before it, and note its last weights after it."""
        self._settle()
        for ahead in self.ahead:
            ahead.expect(backward)
        graph()
        for ahead in self.ahead:
            ahead.left(backward)

    @property
    def recompute(self) -> list[Recompute]:
        """The policy of each block."""
        return [block.recompute for block in self.blocks]

    @property
    def extra_bytes(self) -> int:
        """Bytes of the weights that are cached, carried over or dequantised ahead."""
        return sum(group.extra_bytes for group in self.groups) + sum(ahead.buffer.nbytes for ahead in self.ahead)

    @property
    def can_release(self) -> bool:
        """True if weights are cached, or sometimes carried over; see FastPath."""
        return self.extra_bytes > 0 or self._carried

    def release(self) -> None:
        """Free the cached weights, and carry none over from now on; see FastPath."""
        freed = f"{self.extra_bytes / 2**30:.2f} GiB"
        tell(f"  memory  cached weights are released: {freed} are free again, which costs speed alone")
        for group in self.groups:
            group.release()
        for ahead in self.ahead:
            ahead.wait()
        self.ahead, self.sizes = [], replace(self.sizes, ahead=False)
        self.cached_blocks = 0
        self.carries = self._carried = False
        if self._is_large and not self.copies_by_block:
            self._lay_out_copies(by_block=True)  # which takes less memory, too
        self.set_recompute(self.recompute)  # which makes workspaces, and forgets graphs that read the freed weights

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """As GPT.loss. A batch on the host needs no answer from the device, so nothing waits for it."""
        with torch.autocast(self.device.type, enabled=False):  # every operation has its dtype
            return self._loss(tokens, labels, weights, positions, segments, lesson)

    def _loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        lesson: Lesson | None,
    ) -> Tensor:
        learns, seed = self._state()
        layout = None
        if self.model.rows is not None:
            tokens, labels, weights, positions, layout = self._cut(tokens, labels, weights, positions, segments)
        if not learns:
            labelled = Labelled.of(labels, weights, lesson=lesson).to(self.device)
            return self._evaluated(self.inputs(tokens, labelled, seed, positions, segments, saves=False, layout=layout))
        self._attach_gradients()
        work: Work | None = None
        if self.graphs is not None and self._watched is None and lesson is None and layout is None:
            work = self.graphs.work(tokens, labels, weights, seed, positions, segments)
        if work is None:
            labelled = Labelled.of(labels, weights, lesson=lesson).to(self.device)
            work = Eager(self, self.inputs(tokens, labelled, seed, positions, segments, layout=layout))
        return self._learned(work)

    def _cut(
        self, tokens: Tensor, labels: Tensor, weights: Tensor | None, positions: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Layout]:
        """Tokens, labels, weights and positions that this process computes, and the layout of whole rows."""
        rows = self.model.rows
        assert isinstance(rows, RowParts)
        assert self.ropes is not None, "the angles would depend on what is elsewhere"
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        layout = Layout.of_parts(len(tokens), tokens.size(1), segments, self.device, rows, self.chunk)
        weights = None if weights is None else rows.part(weights)
        return rows.part(tokens), rows.part(labels, IGNORE), weights, rows.part(positions), layout

    def token_losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """As GPT.token_losses, for a batch on the host; the head may not learn."""
        assert not self.head.group.rank
        assert self.head.rows is None
        with torch.autocast(self.device.type, enabled=False):
            learns, seed = self._state()
            shared = positions if seen_until is not None else None
            layout = Layout.of(len(tokens), tokens.size(1), segments, self.device, shared, self.chunk)
            labelled = Labelled.of(labels, None).to(self.device)
            inputs = self.inputs(tokens, labelled, seed, positions, saves=learns, layout=layout)
            inputs = replace(inputs, by_token=True)
            if not learns:
                return self._evaluated(inputs).view(tokens.shape)
            self._attach_gradients()
            return self._learned(Eager(self, inputs)).view(tokens.shape)

    def states(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """The last stream (N, E) at labelled tokens, before the last norm, for a batch on the host; see GPT.scores."""
        with torch.autocast(self.device.type, enabled=False):
            learns, seed = self._state()
            shared = positions if seen_until is not None else None
            layout = Layout.of(len(tokens), tokens.size(1), segments, self.device, shared, self.chunk)
            picked = (labels.flatten() >= 0).nonzero()[:, 0]
            labelled = Labelled(picked, labels.flatten()[picked], None).to(self.device)
            inputs = self.inputs(tokens, labelled, seed, positions, saves=learns, layout=layout)
            inputs = replace(inputs, states=True)
            if not learns:
                return self._evaluated(inputs)
            self._attach_gradients()
            return self._learned(Eager(self, inputs))

    def _evaluated(self, inputs: Inputs) -> Tensor:
        """The loss or losses without a backward pass."""
        result = self.forward(inputs)[0]
        self._show(inputs.run.seen or [])
        return result

    def _learned(self, work: Work) -> Tensor:
        """The loss or losses in autograd's graph."""
        result: Tensor
        result, *scores = Loss.apply(self.anchor, work)
        self._show([(one, chosen) for one, (_, chosen) in zip(scores, work.seen, strict=True)])
        return result

    def _show(self, seen: Seen) -> None:
        """Show what the routers computed to whoever looks."""
        if (watched := self._watched) is not None:
            watched += seen

    def _state(self) -> tuple[bool, int | None]:
        """Tell if a backward pass will follow, and draw the seed of the dropout if there is any."""
        learns = torch.is_grad_enabled() and bool(self.every_a)
        # Dropout's seed comes from torch's generator on the host, so that a restored one repeats it.
        drops = self.model.training and (self.model.dropout or any(group.p for group in self.groups))
        return learns, int(torch.randint(1, 2**31 - 1, ())) if drops else None

    @property
    def _watched(self) -> Seen | None:
        """The list for what routers compute, which they share; None where nobody looks."""
        return self._routers[0].seen if self._routers else None

    def inputs(
        self,
        tokens: Tensor,
        labelled: Labelled,
        seed: int | None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        saves: bool = True,
        carries: bool = True,
        layout: Layout | None = None,
    ) -> Inputs:
        """A micro-batch on the device.

        Args:
            tokens, positions, segments: (B, T), see GPT.loss.
            seed: of the dropout; None for none.
            saves: see Pass.
            carries: see Pass.
            layout: replaces segments.
        """
        table_rows, run = self._pass(
            tokens, positions, segments, seed=seed, saves=saves, carries=carries, layout=layout
        )
        run.keeps_mlp = labelled.lesson is None and self.sizes.keeps_mlp(tokens.numel())
        return Inputs(to_device(tokens.flatten(), self.device), table_rows, labelled, run)

    def _pass(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        seen_until: Tensor | None = None,
        seed: int | None = None,
        saves: bool = False,
        carries: bool = False,
        layout: Layout | None = None,
    ) -> tuple[Tensor | None, Pass]:
        """Rows of the table of learned positions if there is one, and the state that the blocks share; see inputs."""
        rows, length = tokens.shape
        count = self._positions(layout.length if layout else length, positions)
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(rows, length)
        layout = layout or Layout.of(rows, length, segments, self.device, chunk=self.chunk)
        if seen_until is not None:
            on_device = (to_device(positions, self.device), to_device(seen_until, self.device))
            seen = window_of(self.config, on_device[0], length)
            windows = {block.window: seen if block.windowed else None for block in self.blocks}
            masks = {window: tree_mask(seen, *on_device) for window, seen in windows.items()}
            layout = replace(layout, masks=masks, chunks=None)
        table_rows, scale = self.of_positions(positions)
        run = Pass(
            layout=layout,
            positions=to_device(
                table_rows if self.ropes else torch.arange(len(table_rows), dtype=torch.int32), self.device
            ),
            ropes=self._tables(count) if self.ropes else self._ropes(positions, segments),
            query_scale=None if scale is None else to_device(scale, self.device),
            workspaces=self.workspaces,
            offload=self.offload,
            seed=None if seed is None else torch.full((1,), seed, dtype=torch.int64, device=self.device),
            saves=saves,
            carries=carries,
            seen=None if self._watched is None else [],
            p=self.model.dropout,
        )
        return None if self.model.positions is None else to_device(table_rows, self.device), run

    def _positions(self, length: int, positions: Tensor | None) -> int:
        """The positions that tables need for rows of `length` tokens; a graph of them has other rows later.

        Where `positions` lie on a GPU, which is not asked, they may be any.
        """
        most = self.config.block_size
        if positions is None:
            return min(length, most)
        return most if positions.is_cuda else max(min(length, most), int(positions.max()) + 1)

    def of_positions(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """For positions (B, T) the rows of the tables, (T,) int32, and the queries' factors, (T, 1, 1) or None."""
        scale = query_scale(self.config, positions, rotates=False)  # no model scales rotated blocks alone
        return positions.flatten().int(), None if scale is None else scale.flatten()[:, None, None]

    def flatten(self, group_of: Callable[[nn.Parameter], Any]) -> Sequence[nn.Parameter]:
        """All A and all B as two parameters, where there are experts, or as more where groups change; see FastPath.

        None where adapters do not lie end to end.
        """
        self.flat, whole = [], self.config.n_expert and not self.has_gaps
        for side in (self.every_a, self.every_b) if whole else ():
            for _, run in groupby(side, key=lambda pair: group_of(pair[0])):
                first, *rest = (parameter for parameter, _ in run)
                begin = (first.data_ptr() - self.master.data_ptr()) // self.master.element_size()
                part = slice(begin, begin + first.numel() + sum(parameter.numel() for parameter in rest))
                self.flat.append((nn.Parameter(self.master[part]), self.gradient[part]))
        return [whole for whole, _ in self.flat]

    def _attach_gradients(self) -> None:
        """Make each adapter's .grad a view of the one gradient, zero where the optimizer has set it to None."""
        first, home = self.every_a[0]
        if first.grad is home and all(whole.grad is not None for whole, _ in self.flat):
            return
        every = (*self.every_a, *self.every_b, *self.every_length, *self._every_row)
        for one in self.sums:
            one.fresh = True
        for tensor in (*self._added, *self._gradients[1:]):
            tensor.zero_()
        for whole, gradient in self.flat:
            whole.grad = gradient
        if first.grad is home:
            return
        if any(parameter.grad is not None for parameter, _ in every):
            self._settle()
        for parameter, gradient in every:
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _settle(self) -> None:
        """Make gradients zero that are zero: none were added since the optimizer has set them to None."""
        for one in self.sums:
            one.settle()

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> tuple[Tensor, SavedPass]:
        """The loss, and the activations for the backward pass."""
        run = inputs.run
        stream, saved = self._blocks(inputs.tokens, inputs.positions, run)
        if inputs.states:
            picked = inputs.labelled.indices
            assert picked is not None
            states = sum(part.index_select(0, picked) for part in stream)
            assert isinstance(states, Tensor)
            return states, SavedPass(inputs.tokens, None, saved, [], self.offload.passes, picked)
        group = self.head.group
        self._copy_block(-1, beside=self.own is None)  # else they were copied before the blocks, too
        dropout = group.dropout(run.seed, 4 * len(self.blocks))
        hits = None if inputs.by_token else self.model.hits
        losses, d_out, gradients = self.head.losses(
            stream, inputs.labelled, self.workspaces[0], dropout, run.saves, hits
        )
        loss = inputs.labelled.spread(losses, len(inputs.tokens)) if inputs.by_token else losses.sum()
        return loss, SavedPass(inputs.tokens, d_out, saved, gradients, self.offload.passes)

    def _blocks(
        self, tokens: Tensor, table_rows: Tensor | None, run: Pass
    ) -> tuple[list[Tensor], list[SavedBlock | None]]:
        """For tokens (T,) what the last norm reads, (T, E) or a pair to add; and what each block saves."""
        if not self.copies_by_block:
            self.copies[0].refresh()
        if self.head.rows is not None:
            self.head.rows.refresh()
        rows = self.model.embed(tokens.view(run.layout.rows, -1))  # with noise, if there is any
        x = apply_norm(self.embed_norm, times(rows.flatten(0, 1), self.config.embedding_multiplier))
        del rows
        if self.model.positions is not None:
            assert table_rows is not None
            x = x + F.embedding(table_rows, self.model.positions.weight.detach())
        run.shared = Shared()
        if self.own is not None:
            self._copy_block(-1)
            learns = run.saves and (self.own.group.rank > 0 or self.rows is not None)
            run.shared = Shared(self.own.forward(tokens, x, run), x if learns else None)
        x = drop(x, run.dropout(0))
        if run.saves:
            self.offload.reset()
        run.documents = Documents.of(run.layout, self.device) if self.config.state_layers else None
        stream = [x]
        del x
        saved: list[SavedBlock | None] = []
        if (gathers := self.model.gathers) is not None:
            gathers.begin()
        for i, block in enumerate(self.blocks):
            if gathers is not None:
                gathers.need(i)
            self._copy_block(i)
            saved.append(block.forward(stream, run))
        return stream, saved

    @torch.no_grad()
    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """As GPT.hidden, without dropout or gradients; the arguments may lie on the host."""
        table_rows, run = self._pass(tokens, positions, segments, seen_until)
        (x, *y), _ = self._blocks(to_device(tokens.flatten(), self.device), table_rows, run)
        out = torch.empty_like(x)
        add_norm(x, y[0] if y else None, self.head.norm, out)
        return out.view(*tokens.shape, -1)

    @torch.no_grad()
    def backward(self, d_loss: Tensor, saved: SavedPass, run: Pass) -> None:
        """Add the adapters' gradients.

        Raises:
            RuntimeError: if another forward pass has overwritten the tensors on the host.
        """
        if set(ON_HOST) & set(self.recompute) and saved.number != self.offload.passes:
            raise RuntimeError(
                "With activations on the host a loss needs its backward pass before the next one is computed."
            )
        self.pending.waiting.clear()  # of a pass that failed
        for gradient, more in saved.head_gradients:
            gradient.add_(more.mul_(d_loss))
        d = self._d_stream(d_loss, saved)
        carried = [False] * len(self.blocks)
        if run.carries and self.carries and self.sizes.quantized and not self.fp8:
            carried = self.sizes.carries(self.recompute, len(run.positions), self.cached_blocks)
            self._carried |= any(carried)
        learns = self.rows is not None
        for i in reversed(range(self.lowest, len(self.blocks))):
            one = saved.blocks.pop()
            assert one is not None
            assert d is not None
            if self.model.gathers is not None:
                self.model.gathers.need(i)
            self._copy_block(i, beside=False)
            d = self.blocks[i].backward(
                d, one, run, self.pending, wants_dx=i > self.lowest or learns, carries=carried[i]
            )
        self.pending.flush()
        self._settle()
        d = None if d is None else drop(d, run.dropout(0))
        shared, run.shared = run.shared, Shared()  # a graph would keep their memory
        if self.own is not None and shared.embedded is not None:
            assert shared.own is not None
            self._copy_block(-1, beside=False)
            more = self.own.backward(saved.tokens, shared.embedded, shared.own, run)
            d = None if d is None else d.add_(more)
        if self.rows is not None and d is not None:
            self.rows.add_gradient(saved.tokens, d)
        for padded in self.padded:
            padded.collect()

    def _d_stream(self, d_loss: Tensor, saved: SavedPass) -> Tensor | None:
        """The gradient at the last stream, (T, E), given that of the loss, or of the states that were wanted."""
        if saved.picked is not None:
            d = torch.zeros(len(saved.tokens), d_loss.size(1), dtype=self.dtype, device=self.device)
            return d.index_copy_(0, saved.picked, d_loss.to(self.dtype))
        d_out, saved.d_out = saved.d_out, None
        assert d_out is not None
        return scale_(d_out, d_loss)

    @property
    def counts(self) -> list[Tensor]:
        """See Capturable."""
        self._settle()
        taken = [router.taken for router in self._routers]
        return [*self._gradients, *(count for count in (self.model.hits, *taken) if count is not None)]

    @property
    def _gradients(self) -> list[Tensor]:
        """All tensors of gradients."""
        rows = [gradient for _, gradient in self._every_row]
        lengths = [gradient for _, gradient in self.every_length]
        return [self.gradient, *rows, *lengths, *(padded.gradient for padded in self.padded)]

    @property
    def _every_row(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The trained rows of embedding and head, which may be the same, with their gradients."""
        kinds = [kind for kind in (self.rows, self.head.rows) if kind is not None]
        return list({kind.rows: (kind.rows, kind.gradient) for kind in kinds}.values())

    def graph_bytes(self, tokens: int) -> int:
        """Bytes of the pool of CUDA graphs of up to so many tokens; an estimate."""
        return int(self.sizes.graphs(self.recompute, tokens))


def _moved(parameter: nn.Parameter, home: Tensor, gradient: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Let a parameter lie in `home` from now on; it and its gradient."""
    home.copy_(parameter.data)
    parameter.data = home
    return parameter, gradient
