"""CUDA graphs for micro-batches of few tokens, whose kernels end before the host has launched the next.

A micro-batch is padded to the next length of a coarse grid, so that a few shapes stand for all. Padding lies behind the
row, where no token attends to it, and has no label. For packed rows the number of documents is padded too (with empty
documents); in large micro-batches also the number of tokens the head reads (with unlabelled ones). A shape that occurs
often is captured: each of its two passes becomes a graph, one launch. Padding and kernels are the same with and without
a graph, and so are the results. So it does not matter when a shape is captured, and a resumed run ends like one that
was not stopped.

There are no graphs for RoPE whose angles depend on the length of the text, nor for packed batches that are on the GPU
already. Rows are padded all the same with offloaded activations, whose copies run beside the kernels, and where memory
does not suffice: the results must not depend on the memory that is left.
"""

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.device import counting_graphs, forget_graphs
from lit_qlora.fused.ahead import Ahead
from lit_qlora.fused.attention import Layout
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.memory import ON_HOST
from lit_qlora.fused.micro_batch import Eager, Inputs, SavedPass, Trainable, Work
from lit_qlora.fused.offload import to_device
from lit_qlora.fused.passes import Ropes
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import IGNORE
from lit_qlora.model.mlp import Seen
from lit_qlora.report import tell
from lit_qlora.settings import Recompute

MOST_WORK = 1280 * 206_471_168  # tokens times a 7B's weights of a block: with more the host is faster than the GPU
MOST_TOKENS = 4096  # of any model, since attention and norms take no less time where there are fewer weights
MOST_SHAPES = 32  # the driver takes some MiB for each
DOCUMENTS = 16  # the number of documents in a micro-batch of packed rows is padded to a multiple of it
LONGEST = 256  # tokens of the longest document, at least
MANY = 1024  # tokens, from which on the head reads only labelled ones, their number padded to quarters
SIGHTINGS = 4  # of a shape before its capture, which takes as long as a few passes

Shape = tuple[int, int, int, int, int, bool, bool]
"""Rows, their padded length, documents (0 if not packed), tokens of the longest text, tokens that the head reads.
Then whether these have weights, and whether there is dropout."""
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures the kernels that a function launches, and returns a function that launches them again."""


def padded_length(length: int, parts: int = 16) -> int:
    """The next length of the grid: multiples of 512 / parts, from 512 on of the next power of two / parts."""
    step = max(512, 2 ** (length - 1).bit_length()) // parts
    return -(-length // step) * step


def row_width(model: ModelConfig, length: int, packed: bool) -> int:
    """The padded length of a row; the grid of packed rows is coarser, since their documents make more shapes."""
    return padded_length(length, 8) if packed else min(padded_length(length), model.block_size)


def most_tokens(model: ModelConfig) -> int:
    """Tokens of the largest micro-batch whose kernels end before the host has launched the next.

    A block with experts has twice the launches, and one with a delta net three times as many.
    """
    attended, cached = model.n_head * model.head_size, model.n_kv_head * model.head_size
    size, launches = model.ffn_size, 3 if model.delta_layers else 1
    if model.n_expert:
        beside = model.ffn_size if model.experts_beside else model.shared_expert_size
        size, launches = model.n_expert_per_token * model.expert_size + beside, launches + 1
    rows = 2 * (attended + cached) + (3 if "glu" in model.ffn else 2) * size
    most = min(MOST_TOKENS, launches * MOST_WORK // (model.n_embd * (rows + model.vocab_size // model.n_layer)))
    chunk = model.sliding_window if model.chunked_window else None
    return most if chunk is None else min(most, chunk)  # longer documents would have a second layout


@dataclass(frozen=True)
class PaddedBatch:
    """A padded micro-batch.

    Attributes:
        tokens: (B, T) int64.
        positions: (B, T) int64, ends: (documents + 1,) int32, see Layout; None where rows are not packed.
        longest: see Layout; of packed rows the next power of two, since a graph launches enough for every document to
            be as long.
    """

    tokens: Tensor
    labelled: Labelled
    positions: Tensor | None
    ends: Tensor | None
    longest: int

    @staticmethod
    def of(
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        length: int,
    ) -> "PaddedBatch":
        """From what GPT.loss takes, with rows of `length` tokens."""
        more = (0, length - tokens.size(1))
        tokens, labels = F.pad(tokens, more), F.pad(labels, more, value=IGNORE)
        weights = None if weights is None else F.pad(weights, more)
        count = tokens.numel()
        labelled = Labelled.of(labels, weights, count if count < MANY else -(-count // 4))
        if segments is None or positions is None:
            return PaddedBatch(tokens, labelled, None, None, length)
        positions, segments = F.pad(positions, more), F.pad(segments, more, value=-1)
        layout = Layout.of(len(tokens), length, segments, segments.device)
        assert layout.ends is not None
        empty = -(len(layout.ends) - 1) % DOCUMENTS
        ends = F.pad(layout.ends, (0, empty), value=count)
        longest = max(LONGEST, 2 ** (layout.longest - 1).bit_length())
        return PaddedBatch(tokens, labelled, positions, ends, longest)

    @property
    def documents(self) -> int:
        """Their number with the empty ones, or 0 where rows are not packed."""
        return 0 if self.ends is None else len(self.ends) - 1

    def to(self, device: torch.device) -> "PaddedBatch":
        """On a device, but for the positions, which the host needs for a replay."""
        ends = None if self.ends is None else to_device(self.ends, device)
        return PaddedBatch(to_device(self.tokens, device), self.labelled.to(device), self.positions, ends, self.longest)


class Capturable(Trainable, Protocol):
    """A model whose two passes can be captured."""

    config: ModelConfig
    device: torch.device

    @property
    def counts(self) -> Sequence[Tensor]:
        """Tensors that the two passes add to."""
        ...

    @property
    def ropes(self) -> Ropes | None:
        """See Pass; None where they depend on the length of the text."""
        ...

    @property
    def recompute(self) -> Sequence[Recompute]:
        """The policy of each block."""
        ...

    def inputs(
        self,
        tokens: Tensor,
        labelled: Labelled,
        seed: int | None,
        positions: Tensor | None = None,
        *,
        carries: bool = True,
        layout: Layout | None = None,
    ) -> Inputs:
        """A micro-batch on the device."""
        ...

    @property
    def ahead(self) -> Sequence[Ahead]:
        """Weights that are dequantised ahead."""
        ...

    def replay(self, graph: Callable[[], None], backward: bool) -> None:
        """Launch a captured pass."""
        ...

    def of_positions(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of positions (B, T) rows of the tables, (T,) int32, and the queries' factors, (T, 1, 1) or None."""
        ...

    def graph_bytes(self, tokens: int) -> int:
        """Bytes of the pool of graphs of up to so many tokens; an estimate."""
        ...


class Graphs:
    """The shapes that were seen, and the graphs that were captured.

    Attributes:
        most: tokens of the largest micro-batch that gets a graph, padding included. All graphs share one pool of
            memory, as large as one such micro-batch needs.
        off: why no shape is captured any more, or ''.
    """

    record: Record | None = None

    def __init__(self, model: Capturable, most: int, record: Record | None = None) -> None:
        self.model, self.most = model, min(most, most_tokens(model.config))
        self.given = record
        self.off = ""
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        some = self.record is not None
        self.seen: Counter[Shape] = Counter()
        self.captured: dict[Shape, Captured] = {}
        self.latest: weakref.ref[Replay] | None = None
        self.record = self.given
        if some:
            forget_graphs(self.model.device)

    def work(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        seed: int | None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Work | None:
        """The passes of a micro-batch (B, T) that is small enough, else None."""
        rows, length = tokens.shape
        width = row_width(self.model.config, length, segments is not None)
        if not length <= width <= self.most // rows or self.model.ropes is None:
            return None
        if (positions is None) != (segments is None) or (segments is not None and segments.is_cuda):
            return None
        batch = PaddedBatch.of(tokens, labels, weights, positions, segments, width)
        read = len(batch.labelled.labels)
        shape = (rows, width, batch.documents, batch.longest, read, weights is not None, seed is not None)
        self.seen[shape] += 1
        if shape not in self.captured and self.seen[shape] > SIGHTINGS and len(self.captured) < MOST_SHAPES:
            self._capture(shape, batch, seed)
        if shape in self.captured and self._is_free():
            replay = Replay(self.captured[shape], batch, seed)
            self.latest = weakref.ref(replay)
            return replay
        return Eager(self.model, self._inputs(batch.to(self.model.device), seed))

    def _is_free(self) -> bool:
        """Tell whether no loss waits for its backward pass; its activations would lie in the pool."""
        return self.latest is None or self.latest() is None

    def _inputs(self, batch: PaddedBatch, seed: int | None) -> Inputs:
        rows, length = batch.tokens.shape
        layout = Layout(rows, length, batch.longest, batch.ends)
        carries = bool(self.off) and not self.captured  # where there will be no graph
        return self.model.inputs(batch.tokens, batch.labelled, seed, batch.positions, carries=carries, layout=layout)

    def _capture(self, shape: Shape, batch: PaddedBatch, seed: int | None) -> None:
        if self.off or set(ON_HOST) & set(self.model.recompute):
            return
        self.record = self.record or Recorder(self.model.graph_bytes(self.most))
        batch = batch.to(self.model.device)
        try:
            self.captured[shape] = Captured(self.model, batch, self._inputs(batch, seed), self.record)
        except RuntimeError as error:  # no memory left, or an operation that cannot be captured
            self.off = str(error).partition("\n")[0]
            tell(f"  graphs  no more CUDA graphs from here on, which costs speed alone: {self.off}")


class Captured:
    """The two graphs of a shape, and the tensors that they read and write, whose addresses are part of them."""

    def __init__(self, model: Capturable, batch: PaddedBatch, inputs: Inputs, record: Record) -> None:
        self.model, self.batch, self.inputs = model, batch, inputs
        self.d_loss = torch.zeros((), device=model.device)
        self.loss = torch.zeros((), device=model.device)
        self.saved: SavedPass | None = None
        # Plans and handles of this thread are made on first use, which must not be in a capture. And weights that were
        # carried over, which no graph may read, are used up.
        before = [tensor.clone() for tensor in model.counts]
        try:
            self._forward()
            self._backward()
        finally:
            for tensor, value in zip(model.counts, before, strict=True):
                tensor.copy_(value)
            del before
        for ahead in model.ahead:
            ahead.expect(backward=False)
        try:
            self.forward = record(self._forward)
            self.backward = record(self._backward)
        finally:
            for ahead in model.ahead:
                ahead.forget()

    def _forward(self) -> None:
        loss, self.saved = self.model.forward(self.inputs)
        self.loss.copy_(loss)

    def _backward(self) -> None:
        saved, self.saved = self.saved, None
        assert saved is not None
        self.model.backward(self.d_loss, saved, self.inputs.run)


class Replay:
    """Trainable that are launched as graphs."""

    def __init__(self, captured: Captured, batch: PaddedBatch, seed: int | None) -> None:
        self.captured, self.batch, self.seed = captured, batch, seed
        self.seen: Seen = []  # where somebody looks, there is no graph

    def forward(self) -> Tensor:
        """The loss."""
        captured, batch = self.captured, self.batch
        run, old, new = captured.inputs.run, captured.batch.labelled, batch.labelled
        parts: list[tuple[Tensor | None, Tensor | None]] = [
            (captured.inputs.tokens, batch.tokens.flatten()),
            (old.labels, new.labels),
            (old.indices, new.indices),
            (old.weights, new.weights),
            (run.layout.ends, batch.ends),
        ]
        if batch.positions is not None:
            table_rows, scale = captured.model.of_positions(batch.positions)
            parts += [(run.positions, table_rows), (captured.inputs.positions, table_rows), (run.query_scale, scale)]
        for to, source in parts:
            if to is not None and source is not None:
                pinned = source.pin_memory() if to.is_cuda and not source.is_cuda else source
                to.copy_(pinned, non_blocking=True)
        if self.seed is not None and run.seed is not None:
            run.seed.fill_(self.seed)
        captured.model.replay(captured.forward, backward=False)
        return captured.loss.clone()

    def backward(self, d_loss: Tensor, d_scores: Sequence[Tensor | None]) -> None:
        """See Work."""
        self.captured.d_loss.copy_(d_loss)
        self.captured.model.replay(self.captured.backward, backward=True)


class Recorder:
    """Captures into one pool of memory, of `room` bytes at first, so that every shape fits into the same memory."""

    def __init__(self, room: int) -> None:
        self.room, self.pool = room, torch.cuda.graph_pool_handle()
        self.failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still refer to them

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture the kernels that `function` launches; a function that launches them again."""
        with counting_graphs(torch.device("cuda", torch.cuda.current_device())):
            return self._captured(function)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        collects = gc.isenabled()
        gc.disable()  # a graph that is collected now would change the random generator of this one
        done = False
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                if self.room:
                    torch.empty(self.room, dtype=torch.uint8, device="cuda")  # returned at once, to the pool
                    self.room = 0
                function()
            done = True
        finally:
            torch.cuda.set_stream(stream)  # where a capture fails, it is left on its own
            if not done:
                self.failed.append(graph)
                _end_capture(self.pool)
            if collects:
                gc.enable()
        return graph.replay


def _end_capture(pool: Any) -> None:
    """Tell torch's random generator and allocator that a failed capture is over; torch 2.11 does not."""
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError):  # it has ended already
        torch._C._cuda_endAllocateToPool(device, pool)
