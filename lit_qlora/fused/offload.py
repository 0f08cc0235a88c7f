"""Asynchronous copies: batches to the device, and activations to pinned host memory and back."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.device import pinned_memory
from lit_qlora.errors import ResourceError

MOST_LEAVING = 4  # tensors, about those of a block, that may be on their way at the same time


@dataclass(frozen=True)
class OnHost:
    """Stands for a tensor that lies in the host's memory; they are numbered in each forward pass."""

    number: int


class Offload:
    """Sends tensors to the host on a stream of its own, and copies them back on request or ahead of it.

    The pinned buffers live from step to step, because pinning costs more than copying. A tensor that is being copied is
    referenced here until the kernels' stream has waited for the copy; from then on the kernels can use its memory. The
    allocator alone would free it when the host sees the copy end, and the host runs half a step ahead.
    """

    def __init__(self) -> None:
        self.pinned: list[Tensor] = []
        self.on_host: list[Tensor] = []
        self.count = self.passes = self.held = 0
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self.stream: torch.cuda.Stream | None = None

    def reset(self) -> None:
        """Begin a forward pass: forget the tensors of the last one, if no backward pass has fetched them."""
        self.count, self.passes, self.held = 0, self.passes + 1, 0
        self.wait_for_copies()
        for _, arrived in self.coming.values():
            torch.cuda.current_stream().wait_event(arrived)
        self.coming.clear()

    def wait_for_copies(self, most: int = 0) -> None:
        """Wait until no more than `most` tensors are leaving or held, or none is leaving."""
        while len(self.leaving) > max(0, most - self.held):
            torch.cuda.current_stream().wait_event(self.leaving[0][1])
            self.leaving.popleft()

    @property
    def latest(self) -> OnHost:
        """The tensor that left last."""
        return OnHost(self.count - 1)

    def hold(self, x: Tensor) -> Tensor:
        """Leave `x` where it is until the backward pass, as one of the tensors that may be leaving."""
        self.wait_for_copies(MOST_LEAVING - 1)
        self.held += 1
        return x

    def put(self, x: Tensor) -> OnHost:
        """Start copying `x` to the host."""
        number, self.count = self.count, self.count + 1
        self.wait_for_copies(MOST_LEAVING - 1)
        self.stream = self.stream or torch.cuda.Stream()
        if len(self.pinned) <= number or self.pinned[number].numel() < x.numel():
            if number < len(self.pinned):
                self.stream.synchronize()  # copies of the pass before
                del self.pinned[number], self.on_host[number:]  # before a larger one is taken
            self.pinned.insert(number, pin(x.numel(), x.dtype))
        self.on_host[number:] = [self.pinned[number][: x.numel()].view(x.shape)]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.on_host[number].copy_(x, non_blocking=True)
            left = torch.cuda.Event()
            left.record(self.stream)
        self.leaving.append((x, left))
        return OnHost(number)

    def fetch(self, saved: Tensor | OnHost | None) -> None:
        """Start copying a tensor back, if it is on the host and not on its way already."""
        if not isinstance(saved, OnHost) or saved.number in self.coming:
            return
        number = saved.number
        assert self.stream is not None
        self.wait_for_copies()
        x = torch.empty_like(self.on_host[number], device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.copy_(self.on_host[number], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        self.coming[number] = (x, arrived)

    def get(self, saved: Tensor | OnHost) -> Tensor:
        """The tensor itself, on the device."""
        if isinstance(saved, Tensor):
            return saved
        self.fetch(saved)
        x, arrived = self.coming.pop(saved.number)
        torch.cuda.current_stream().wait_event(arrived)
        return x


def pin(numbers: int, dtype: torch.dtype) -> Tensor:
    """Pinned memory of the host, see pinned_memory.

    Raises:
        ResourceError: if the host has no more of it.
    """
    if (buffer := pinned_memory(numbers, dtype)) is None:
        raise ResourceError(
            f"train.recompute: the host has no {numbers * dtype.itemsize / 2**30:.2f} GiB of pinned memory left.\n"
            "Take --train.recompute full, or fewer tokens at a time."
        )
    return buffer


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, copied from pinned memory if it is not there yet."""
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True)
