"""Weights of experts that are dequantised while the products before them run.

A block's experts are most of its weights, and reading their 4 bits takes as long as a third of their products. One
buffer holds the weights of one kind (gate and up, or down) of one block. When the product that reads them is launched,
a second stream waits for it. That stream then fills the buffer for the next block. The last block's weights are carried
over from its forward to its backward pass. Those of the first block go on to the next forward pass, if it learns.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Weights that can be dequantised."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        ...

    def dequantize(self, out: Tensor) -> None:
        """Write them into `out`, of their shape."""
        ...


class Ahead:
    """The weights of one kind, of blocks that follow each other and have equally many.

    Attributes:
        buffer: the weights of the block `holds`; None before there is one.
        lowest: the last block that a backward pass reads; as many as there are if it reads none.
    """

    def __init__(self, sources: Sequence[Source], dtype: torch.dtype, device: torch.device, lowest: int = 0) -> None:
        self.sources, self.lowest = sources, lowest
        self.buffer = torch.empty(sources[0].shape, dtype=dtype, device=device)
        self.holds: int | None = None
        self.coming = False  # the buffer is being filled on the second stream
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.free, self.ready = torch.cuda.Event(), torch.cuda.Event()

    def take(self, number: int) -> Tensor:
        """The weights of a block, in the buffer; wrong guesses cost a dequantisation."""
        self.wait()
        if self.holds != number:
            self.sources[number].dequantize(self.buffer)
        self.holds, self.coming = number, False
        return self.buffer

    def wait(self) -> None:
        """Let what is launched from now on wait until the buffer is filled; only then may it be freed."""
        if self.coming and self.stream is not None:
            torch.cuda.current_stream().wait_event(self.ready)

    def read(self, number: int, step: int) -> None:
        """Fill the buffer for the next block of the pass, if there is one, once what was launched so far is done.

        Args:
            number: of the block whose weights have been read.
            step: 1, or -1 in a backward pass.
        """
        last = len(self.sources) - 1 if step > 0 else self.lowest
        if number == last or self.holds == number + step:
            return
        number += step
        if self.stream is None:
            self.sources[number].dequantize(self.buffer)
        else:
            self.free.record()
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.free)
                self.sources[number].dequantize(self.buffer)
                self.ready.record()
        self.holds, self.coming = number, True

    def expect(self, backward: bool) -> None:
        """Hold the weights that a CUDA graph of a pass begins with; the pass before it has left them."""
        self.take(len(self.sources) - 1 if backward else 0)

    def left(self, backward: bool) -> None:
        """Note the weights that a replayed graph of a pass has left."""
        self.holds, self.coming = self.lowest if backward else len(self.sources) - 1, False

    def forget(self) -> None:
        """Take nothing for granted: passes that were captured have not happened."""
        self.holds, self.coming = None, False
