"""Tensors from safetensors files onto a GPU, as fast as memory can be read.

Several threads read the pieces of a tensor into pinned memory. The GPU copies a piece while the next one is read, and
while it works on earlier ones. The host never holds more than a few pieces, the device nothing but the tensor.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lit_qlora.checkpoint.safetensors_io import Extent, read_extents
from lit_qlora.errors import CheckpointError

PIECE = 64 * 2**20  # bytes of each pinned buffer
BUFFERS = 3
READERS = min(8, os.cpu_count() or 1)


def stream(tensors: Iterable[tuple[Path, str]], device: torch.device) -> Iterator[Tensor]:
    """The tensors, each named by its file and its name there, on `device` in this order.

    Raises:
        CheckpointError: if a file ends before its tensors do.
    """
    cuda = device.type == "cuda"
    rooms = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda) for _ in range(BUFFERS)]
    copied = [torch.cuda.Event() if cuda else None for _ in rooms]
    extents: dict[Path, dict[str, Extent]] = {}
    files: dict[Path, int] = {}
    turn = 0
    with ThreadPoolExecutor(READERS) as readers, ExitStack() as stack:
        for path, name in tensors:
            if path not in files:
                files[path] = stack.enter_context(open(path, "rb", buffering=0)).fileno()
                extents[path] = read_extents(path)
            extent = extents[path][name]
            whole = torch.empty(extent.shape, dtype=extent.dtype, device=device)
            to = whole.flatten().view(torch.uint8)
            for first in range(0, len(to), PIECE):
                room = rooms[turn][: min(PIECE, len(to) - first)]
                if event := copied[turn]:
                    event.synchronize()  # the GPU has copied the content before
                share = -(-len(room) // READERS)
                jobs = [
                    readers.submit(_fill, room[at : at + share], path, files[path], extent.start + first + at)
                    for at in range(0, len(room), share)
                ]
                for job in jobs:
                    job.result()
                to[first : first + len(room)].copy_(room, non_blocking=True)
                if event:
                    event.record()
                turn = (turn + 1) % BUFFERS
            yield whole
            del whole, to  # so that there is room for the next
    if cuda:
        torch.cuda.synchronize(device)  # before the pinned memory goes


def _fill(room: Tensor, path: Path, file: int, start: int) -> None:
    """Read as many bytes as `room` holds, from `start`."""
    memory = memoryview(room.numpy().data)
    while memory:
        count = os.preadv(file, [memory], start)
        if count == 0:
            raise CheckpointError(f"{path} ends before its tensors do, so it is damaged.")
        memory, start = memory[count:], start + count
