"""CUDA graphs for micro-batches of few tokens, whose kernels end before the host has launched the next.

A micro-batch is padded to the next length of a coarse grid, so that a few shapes stand for all; padding lies behind the
text, where nothing sees it, and has no label. Of packed rows the number of documents is brought to a grid too, by
empty ones, and where there are many tokens so is the number of those that the head reads, by some without a label. A
shape that comes again and again is captured: each of its two passes becomes a graph, one launch. The numbers are the
same before and after, because padding and kernels are, so it does not matter when a shape is captured, and a run that
is continued ends like one that was not stopped.

No graphs are made for RoPE whose angles depend on the length of the text, nor of packed batches that are on the GPU
already. With activations on the host, whose copies run beside the kernels, and where memory does not suffice, rows are
padded all the same, so that the numbers do not depend on how much memory is left.
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

from lit_qlora.fused.attention import Layout
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.micro_batch import Eager, Inputs, SavedPass, Trainable, Work
from lit_qlora.fused.offload import to_device
from lit_qlora.fused.passes import Ropes
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import IGNORE
from lit_qlora.report import tell
from lit_qlora.settings import Recompute

MOST_WORK = 1280 * 206_471_168  # tokens, times a 7B's weights for each block: with more the host is the faster one
MOST_TOKENS = 4096  # of any model, since attention and what reads activations alone do not become less with the weights
MOST_SHAPES = 32  # the driver keeps some MiB for each
DOCUMENTS = 16  # their number, in a micro-batch of packed rows, is brought to a multiple of this
LONGEST = 256  # tokens of the longest document, at least
MANY = 1024  # tokens: of so many and more, the head reads those with a label alone, their number brought to quarters
SIGHTINGS = 4  # capturing takes as long as a few passes, which a rare shape would not pay back

Shape = tuple[int, int, int, int, int, bool, bool]
"""Rows, their length with padding, documents (0 if not packed), tokens of the longest text, tokens that the head reads,
whether these have weights, whether there is dropout."""
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function launches, and returns what launches it again."""


def padded_length(length: int, parts: int = 16) -> int:
    """The next length of the grid: multiples of 512 / parts, from 512 on of the next power of two / parts."""
    step = max(512, 2 ** (length - 1).bit_length()) // parts
    return -(-length // step) * step


def row_width(model: ModelConfig, length: int, packed: bool) -> int:
    """Tokens that a row of so many is padded to; the number of documents makes shapes enough of packed rows."""
    return padded_length(length, 8) if packed else min(padded_length(length), model.block_size)


def most_tokens(model: ModelConfig) -> int:
    """Tokens of the largest micro-batch whose kernels end before the host has launched the next."""
    attended, cached = model.n_head * model.head_size, model.n_kv_head * model.head_size
    rows = 2 * (attended + cached) + (3 if "glu" in model.ffn else 2) * model.ffn_size
    return min(MOST_TOKENS, MOST_WORK // (model.n_embd * (rows + model.vocab_size // model.n_layer)))


@dataclass(frozen=True)
class Micro:
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
    ) -> "Micro":
        """From what GPT.loss takes, with rows of `length` tokens."""
        more = (0, length - tokens.size(1))
        tokens, labels = F.pad(tokens, more), F.pad(labels, more, value=IGNORE)
        weights = None if weights is None else F.pad(weights, more)
        count = tokens.numel()
        labelled = Labelled.of(labels, weights, count if count < MANY else -(-count // 4))
        if segments is None or positions is None:
            return Micro(tokens, labelled, None, None, length)
        positions, segments = F.pad(positions, more), F.pad(segments, more, value=-1)
        layout = Layout.of(len(tokens), length, segments, segments.device)
        assert layout.ends is not None
        empty = -(len(layout.ends) - 1) % DOCUMENTS
        ends = F.pad(layout.ends, (0, empty), value=count)
        longest = max(LONGEST, 2 ** (layout.longest - 1).bit_length())
        return Micro(tokens, labelled, positions, ends, longest)

    @property
    def documents(self) -> int:
        """How many there are, empty ones included, or 0 where rows are not packed."""
        return 0 if self.ends is None else len(self.ends) - 1

    def to(self, device: torch.device) -> "Micro":
        """On a device, but for the positions, from which the host works out what a replay is given, too."""
        ends = None if self.ends is None else to_device(self.ends, device)
        return Micro(to_device(self.tokens, device), self.labelled.to(device), self.positions, ends, self.longest)


class Capturable(Trainable, Protocol):
    """A model whose two passes can be captured."""

    config: ModelConfig
    device: torch.device
    gradient: Tensor

    @property
    def ropes(self) -> Ropes | None:
        """See Pass; None where they depend on the length of the text."""
        ...

    @property
    def recompute(self) -> Sequence[Recompute]:
        """What each block computes again."""
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

    def forget_ahead(self) -> None:
        """Take no weights for granted that were dequantised ahead."""
        ...

    def of_positions(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of positions (B, T) rows of the tables, (T,) int32, and the queries' factors, (T, 1, 1) or None."""
        ...

    def graph_bytes(self, tokens: int) -> int:
        """Bytes of the pool of graphs of up to so many tokens; an estimate."""
        ...


class Graphs:
    """The shapes that were seen, and the graphs of those that were captured.

    Attributes:
        most: tokens of the largest micro-batch that gets a graph, padding included. All graphs share one pool of
            memory, which holds what one such micro-batch needs.
        off: why nothing is captured any more; '' as long as it is.
    """

    def __init__(self, fused: Capturable, most: int, record: Record | None = None) -> None:
        self.fused, self.most = fused, min(most, most_tokens(fused.config))
        self.given = record
        self.off = ""
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and give back their memory."""
        self.seen: Counter[Shape] = Counter()
        self.captured: dict[Shape, Captured] = {}
        self.latest: weakref.ref[Replay] | None = None
        self.record: Record | None = self.given

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
        width = row_width(self.fused.config, length, segments is not None)
        if not length <= width <= self.most // rows or self.fused.ropes is None:
            return None
        if (positions is None) != (segments is None) or (segments is not None and segments.is_cuda):
            return None
        micro = Micro.of(tokens, labels, weights, positions, segments, width)
        read = len(micro.labelled.labels)
        shape = (rows, width, micro.documents, micro.longest, read, weights is not None, seed is not None)
        self.seen[shape] += 1
        if shape not in self.captured and self.seen[shape] > SIGHTINGS and len(self.captured) < MOST_SHAPES:
            self._capture(shape, micro, seed)
        if shape in self.captured and self._is_free():
            replay = Replay(self.captured[shape], micro, seed)
            self.latest = weakref.ref(replay)
            return replay
        return Eager(self.fused, self._inputs(micro.to(self.fused.device), seed))

    def _is_free(self) -> bool:
        """Whether no loss is waiting for its backward pass, whose activations lie in the pool."""
        return self.latest is None or self.latest() is None

    def _inputs(self, micro: Micro, seed: int | None) -> Inputs:
        rows, length = micro.tokens.shape
        layout = Layout(rows, length, micro.longest, micro.ends)
        carries = bool(self.off) and not self.captured  # where there will be no graph
        return self.fused.inputs(micro.tokens, micro.labelled, seed, micro.positions, carries=carries, layout=layout)

    def _capture(self, shape: Shape, micro: Micro, seed: int | None) -> None:
        if self.off or "offload" in self.fused.recompute:
            return
        self.record = self.record or Recorder(self.fused.graph_bytes(self.most))
        micro = micro.to(self.fused.device)
        try:
            self.captured[shape] = Captured(self.fused, micro, self._inputs(micro, seed), self.record)
        except RuntimeError as error:  # no memory left, or an operation that cannot be captured
            self.off = str(error).partition("\n")[0]
            tell(f"  graphs  no more CUDA graphs from here on, which costs speed alone: {self.off}")


class Captured:
    """The two graphs of a shape, and the tensors that they read and write, whose addresses are part of them."""

    def __init__(self, fused: Capturable, micro: Micro, inputs: Inputs, record: Record) -> None:
        self.fused, self.micro, self.inputs = fused, micro, inputs
        self.d_loss = torch.zeros((), device=fused.device)
        self.loss = torch.zeros((), device=fused.device)
        self.learnt: SavedPass | None = None
        # What is made on first use, such as plans and handles of this thread, has to be made before; and weights that
        # have stayed, which no graph may read, are used up.
        gradient = fused.gradient.clone()
        try:
            self._forward()
            self._backward()
        finally:
            fused.gradient.copy_(gradient)
            del gradient
        self.forward = record(self._forward)
        self.backward = record(self._backward)
        fused.forget_ahead()  # nothing of what was captured has happened

    def _forward(self) -> None:
        self.fused.forget_ahead()
        loss, self.learnt = self.fused.forward(self.inputs)
        self.loss.copy_(loss)

    def _backward(self) -> None:
        learnt, self.learnt = self.learnt, None
        assert learnt is not None
        self.fused.forget_ahead()
        self.fused.backward(self.d_loss, learnt, self.inputs.run)


class Replay:
    """Trainable that are launched as graphs."""

    def __init__(self, captured: Captured, micro: Micro, seed: int | None) -> None:
        self.captured, self.micro, self.seed = captured, micro, seed

    def forward(self) -> Tensor:
        """The loss."""
        captured, micro = self.captured, self.micro
        run, old, new = captured.inputs.run, captured.micro.labelled, micro.labelled
        parts: list[tuple[Tensor | None, Tensor | None]] = [
            (captured.inputs.tokens, micro.tokens.flatten()),
            (old.labels, new.labels),
            (old.places, new.places),
            (old.weights, new.weights),
            (run.layout.ends, micro.ends),
        ]
        if micro.positions is not None:
            places, scale = captured.fused.of_positions(micro.positions)
            parts += [(run.positions, places), (captured.inputs.places, places), (run.query_scale, scale)]
        for to, source in parts:
            if to is not None and source is not None:
                pinned = source.pin_memory() if to.is_cuda and not source.is_cuda else source
                to.copy_(pinned, non_blocking=True)
        if self.seed is not None and run.seed is not None:
            run.seed.fill_(self.seed)
        captured.forward()
        captured.fused.forget_ahead()
        return captured.loss.clone()

    def backward(self, d_loss: Tensor) -> None:
        """Add the adapters' gradients."""
        self.captured.d_loss.copy_(d_loss)
        self.captured.backward()
        self.captured.fused.forget_ahead()


class Recorder:
    """Captures into one pool of memory, of `room` bytes to begin with, so that every shape fits into the same place."""

    def __init__(self, room: int) -> None:
        self.room, self.pool = room, torch.cuda.graph_pool_handle()
        self.failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still ask them

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture what `function` launches; what launches it again."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        collects = gc.isenabled()
        gc.disable()  # a dead graph that is collected now would meddle with the random generator of this one
        done = False
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                if self.room:
                    torch.empty(self.room, dtype=torch.uint8, device="cuda")  # given back at once, to the pool
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
    """Where a capture failed, tell torch's random generator and its allocator that it is over; torch 2.11 does not."""
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError):  # it has ended: only what was captured was at fault
        torch._C._cuda_endAllocateToPool(device, pool)
