"""A base whose weights lie over several processes: blocks in use are gathered into two buffers at fixed addresses.

Block i always lies in buffer i modulo their number, so the layers' tensors are views that are made once. A gather is
one all-gather of bytes, on the stream of the collectives. It begins while the block before is computed. It waits for
the kernels that still read its buffer: all that were launched on the current stream.

All processes have to make the same gathers in the same order, whatever happens in one of them. Else a process gets the
bytes of another block, and nobody notices. So each pass over the blocks asks for them in one order: up, and where there
is a backward pass down again. A process whose pass ends early completes it without computing, see complete. What only
the first process computes is announced to the others gather by gather, see led. In the end `order`, a hash of the
gathers so far, tells whether all kept to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from lit_qlora import signals
from lit_qlora.sharded.slab import Slab

LEAST_BUFFERS = 2
END = -1
"""Announced in the place of a block when no more follow."""
_MODULUS, _FACTOR = 2**61 - 1, 1_000_003
_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)  # its name since torch 2.13


class ShardedBase:
    """The weights of all blocks, over the processes of torch's default group.

    Args:
        buffers: as many blocks are in memory at a time; a pass gathers only what is not there. As the processes may
            differ, all take the smallest number.

    Attributes:
        shares: of each block, the bytes that this process holds.
        buffers: (S,) uint8 each; of the blocks in use.
        gathers: made so far.
        sent: bytes that this process sent for them; a ring passes on all shares but one.
        order: a hash of these gathers.
    """

    def __init__(self, slabs: Sequence[Slab], device: torch.device, buffers: int = LEAST_BUFFERS) -> None:
        self.slabs, self.device = list(slabs), device
        self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        assert all(slab.processes == self.processes for slab in slabs)
        self.shares = [torch.empty(slab.share, dtype=torch.uint8, device=device) for slab in slabs]
        largest = max(slab.size for slab in slabs)
        count = min(-self._most(-buffers), len(self.slabs))
        self.buffers = [torch.zeros(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self.gathers = self.sent = self.order = 0
        self._inside: list[int | None] = [None] * len(self.buffers)  # the block that a buffer holds, or will
        self._work: dict[int, Any] = {}
        self._at, self._back, self._leads = -1, False, False

    def memory(self, block: int) -> Tensor:
        """The bytes of a block, which are there after `need`."""
        return self.buffers[block % len(self.buffers)][: self.slabs[block].size]

    def holds(self, tensor: Tensor) -> bool:
        """True if a tensor is a view of a buffer."""
        storage = tensor.untyped_storage().data_ptr()
        return any(buffer.untyped_storage().data_ptr() == storage for buffer in self.buffers)

    def begin(self) -> None:
        """Begin a pass over the blocks, from the first one on."""
        self._at, self._back = -1, False

    def need(self, block: int) -> None:
        """Let the bytes of a block be there for what is launched on the current stream from now on.

        The next block of the pass is on its way when this returns.
        """
        self._back = block <= self._at
        self._at = block
        self._start(block)
        if block in self._work:
            self._work[block].wait()  # before it is forgotten: a signal may interrupt
            del self._work[block]
        ahead = block - 1 if self._back else block + 1
        if 0 <= ahead < len(self.slabs):
            self._start(ahead)

    def complete(self, backward: bool = True) -> None:
        """Make the gathers that are left of a pass, which may have failed or has nothing to compute."""
        if not self._back:
            for block in range(self._at + 1, len(self.slabs)):
                self.need(block)
        last = self._at if self._back else len(self.slabs)
        for block in reversed(range(last if backward else 0)):
            self.need(block)

    def drain(self) -> None:
        """Wait for all gathers that are on their way."""
        for work in self._work.values():
            work.wait()
        self._work.clear()

    @contextmanager
    def led(self) -> Iterator[None]:
        """Let this process, the first, compute alone inside, whatever it is; the others call `follow` meanwhile."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            self.drain()
            self._announce(END)

    def follow(self) -> None:
        """Make the gathers that the first process makes inside of `led`."""
        told = torch.empty((), dtype=torch.int64, device=self.device)
        while True:
            distributed.broadcast(told, src=0)
            if (block := int(told)) == END:
                return
            self._start(block)
            self.drain()

    def differs(self) -> bool:
        """True in all processes if they have not all made the same gathers."""
        return self._most(self.order) != -self._most(-self.order)

    def _most(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        found = torch.tensor(number, device=self.device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return int(found)

    def _start(self, block: int) -> None:
        """Begin to gather a block, unless its buffer holds it already."""
        place = block % len(self.buffers)
        if self._inside[place] == block:
            return
        if not self._leads:
            self._launch(block, place)
            return
        with signals.held():  # what is announced is done
            self._announce(block)
            self._launch(block, place)

    def _launch(self, block: int, place: int) -> None:
        self._inside[place] = block
        self._work[block] = _gather(self.memory(block), self.shares[block], async_op=True)
        self.gathers += 1
        self.sent += (self.processes - 1) * self.slabs[block].share
        self.order = (self.order * _FACTOR + block + 1) % _MODULUS

    def _announce(self, block: int) -> None:
        distributed.broadcast(torch.tensor(block, device=self.device), src=0)
