"""The device, the dtypes of weights and arithmetic on it, and its memory."""

import mmap
import os
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.errors import UsageError
from lit_qlora.settings import Precision

LEAST_LARGE = 2**20
"""Bytes from which on torch's allocator takes memory from pages of 20 MiB, not from small ones."""
COMMON_POOL = (0, 0)
"""The pool of torch's allocator that is no graph's."""
MOST_TWICE = 2**28
"""Bytes of memory that has been exchanged and not yet given back."""


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return `precision`, or the best one for `device` if it is "auto".

    Raises:
        UsageError: for a precision that the device does not support well.
    """
    cuda = device.type == "cuda"
    if precision == "auto":
        return best_precision(torch.cuda.get_device_capability(device)) if cuda else "32-true"
    if scales_loss(precision) and not cuda:
        raise UsageError(f"precision {precision} needs a GPU; on a CPU take 32-true or bf16-true.")
    return precision


def best_precision(capability: tuple[int, int]) -> Precision:
    """Return the precision for GPUs of a compute capability; before Ampere, bf16 is emulated and slow."""
    return "bf16-true" if capability >= (8, 0) else "16-mixed"


def has_fp8() -> bool:
    """Tell whether the GPU multiplies in FP8."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def fabric_precision(precision: Precision) -> Precision:
    """Return the precision for Fabric: -true only sets the weights' dtype, and adapters remain float32.

    With float16 Fabric scales the loss, and skips a step whose gradients overflow.
    """
    if precision == "bf16-true":
        return "32-true"
    return "16-mixed" if scales_loss(precision) else precision


def scales_loss(precision: Precision) -> bool:
    """Tell whether the loss is scaled, because float16 has no room for small gradients."""
    return precision in ("16-true", "16-mixed")


def weights_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the frozen weights: bf16 for bf16-true, else float32, even if arithmetic is 16 bit."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)


def fast_dtype(precision: Precision) -> torch.dtype | None:
    """Return the dtype to which the fast path, which mixes none, converts frozen weights; None if it does not."""
    return torch.float16 if precision == "16-mixed" else None


@dataclass
class Peak:
    """The largest memory use on the GPU, in bytes, as far as torch's peak of allocated memory lacks it.

    Attributes:
        before: the peak before CUDA graphs were last captured or forgotten.
        held: what pools of graphs have held since then and torch does not count as allocated.
    """

    before: int = 0
    held: int = 0

    def of(self, device: torch.device) -> int:
        """The peak with torch's."""
        return max(self.before, torch.cuda.max_memory_allocated(device) + self.held)


PEAK = Peak()
"""That of this process, which computes on one GPU."""


def peak_gib(device: torch.device) -> float:
    """Return the largest memory use so far in GiB: allocated on a GPU or held by graphs there, resident on a CPU."""
    if device.type == "cuda":
        return PEAK.of(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def reset_peak(device: torch.device, before: int = 0) -> None:
    """Count the peak of a GPU's memory anew, from `before` bytes on; nothing on a CPU, where it cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        PEAK.before, PEAK.held = before, _held_by_graphs(device)


@contextmanager
def counting_graphs(device: torch.device) -> Iterator[None]:
    """Count in the peak what a graph that is captured inside holds from now on.

    Until now the pools were smaller. And in the capture its tensors are counted as allocated, in memory of the pools.
    """
    before = PEAK.of(device)
    try:
        yield
    finally:
        reset_peak(device, before)


def forget_graphs(device: torch.device) -> None:
    """Give the memory of graphs that are gone back to a GPU, and count it in the peak no longer; the peak so far stays.

    The allocator keeps the pool of such graphs until its cache is emptied.
    """
    if device.type == "cuda":
        before = PEAK.of(device)
        torch.cuda.empty_cache()
        reset_peak(device, before)


def _held_by_graphs(device: torch.device) -> int:
    """Return the bytes that pools of CUDA graphs hold and torch does not count as allocated.

    Replays allocate nothing: their tensors lie in this memory, which nothing else gets.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [one for one in torch.cuda.memory_snapshot() if one["device"] == index]
    pools = [one for one in segments if tuple(one["segment_pool_id"]) != COMMON_POOL]
    return sum(one["total_size"] - one["allocated_size"] for one in pools)


def let_segments_grow() -> None:
    """Let torch's allocator extend and release memory in small pages; call it before the first allocation.

    Saved activations of micro-batches of different lengths, and weights carried over in their memory, then leave little
    fragmentation.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable, which a user may have set
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def pinned_memory(numbers: int, dtype: torch.dtype) -> Tensor | None:
    """Return pinned memory of the host, to the byte; None if it has no more.

    Torch's own is rounded up to powers of two.
    """
    try:
        buffer = _in_huge_pages(numbers, dtype).zero_()  # by all threads; one alone takes long to get new pages
    except OSError:
        return None
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
        return None
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _in_huge_pages(numbers: int, dtype: torch.dtype) -> Tensor:
    """Return new host memory, in pages of 2 MiB where Linux has them: faster to get and to pin than 512 small ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=dtype)
    memory = mmap.mmap(-1, numbers * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def seen_by_gpu(pinned: Tensor) -> Tensor:
    """Return pinned memory as a tensor of the current GPU, which reads it over its bus; nothing is copied.

    Args:
        pinned: contiguous, of numbers of two or four bytes.
    """
    kind = {2: "<i2", 4: "<i4"}[pinned.itemsize]  # the interface has no bfloat16
    described = {"shape": tuple(pinned.shape), "typestr": kind, "data": (pinned.data_ptr(), False), "version": 3}
    view = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device="cuda").view(pinned.dtype)
    assert view.data_ptr() == pinned.data_ptr()
    return view


def precede_other_streams() -> None:
    """Give this thread's launches priority over other streams of the GPU from now on.

    A stream of normal priority has the lowest priority.
    """
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)
    torch.cuda.empty_cache()  # this stream cannot use memory that the allocator holds for another one


def lay_end_to_end(tensors: Iterable[Tensor]) -> None:
    """Move what tensors of a GPU hold together, and give the memory between back to the device.

    Weights are loaded, quantised and stacked one by one, and what was freed on the way lies between them: too small for
    activations, and mostly on pages of 20 MiB that hold weights too, so that the allocator cannot give it back. A 7B in
    4 bits had 1.3 of 5.5 GiB there. Memory is exchanged below the tensors, so views stay views.
    """
    storages = {storage.data_ptr(): storage for t in tensors if t.is_cuda and (storage := t.untyped_storage()).nbytes()}
    large, moved = [storages[place] for place in sorted(storages) if storages[place].nbytes() > LEAST_LARGE], 0
    if not large:
        return
    stream = torch.cuda.Stream()  # the allocator holds memory of its own for each stream
    for storage in large:
        move(storage, lambda: torch.cuda.stream(stream))
        if (moved := moved + storage.nbytes()) > MOST_TWICE:
            torch.cuda.empty_cache()
            moved = 0
    torch.cuda.empty_cache()


def move(storage: torch.UntypedStorage, elsewhere: Callable[[], AbstractContextManager[Any]]) -> None:
    """Give a storage other memory, below its tensors: what is got `elsewhere`, or if none is left there, here."""
    try:
        values = as_bytes(storage).clone()
    except torch.OutOfMemoryError:
        return
    if values.is_cuda:  # growing segments are unmapped behind their own stream alone, and this may be another one
        torch.cuda.synchronize()
    storage.resize_(0)
    try:
        with elsewhere():
            storage.resize_(len(values))
    except torch.OutOfMemoryError:
        storage.resize_(len(values))
    as_bytes(storage).copy_(values)


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a tensor of uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextmanager
def on_default_stream() -> Iterator[None]:
    """Launch on the GPU's default stream, behind what this thread launched before and ahead of what it launches after.

    bitsandbytes 0.50 quantises, and updates parameters, on the default stream, whichever is current. No other stream
    of torch's waits for that one.
    """
    if not torch.cuda.is_initialized() or (current := torch.cuda.current_stream()) == torch.cuda.default_stream():
        yield
        return
    default = torch.cuda.default_stream()
    default.wait_stream(current)
    try:
        with torch.cuda.stream(default):
            yield
    finally:
        current.wait_stream(default)


def host_bytes(files: Path = Path("/")) -> int | None:
    """Return the free memory of the host in bytes, within the limits of control groups; None if nothing reports it.

    Containers and batch jobs are control groups. The page cache counts as free.

    Args:
        files: the directory of /proc and /sys.
    """
    rooms = []
    with suppress(OSError, ValueError):
        rooms.append(1024 * _number(files / "proc/meminfo", r"MemAvailable: *(\d+) kB"))
    groups: list[str] = []
    with suppress(OSError):
        groups = (files / "proc/self/cgroup").read_text().splitlines()
    for _, kinds, name in (line.split(":", 2) for line in groups):
        if kinds and "memory" not in kinds.split(","):
            continue
        root, most, used, cached = V1 if kinds else V2
        for group in (name, *map(str, PurePosixPath(name).parents)):  # a container sees only the last one
            folder = files / root / group.lstrip("/")
            with suppress(OSError, ValueError):  # "max" means no limit
                room = _number(folder / most, r"(\d+)") - _number(folder / used, r"(\d+)")
                for kind in ("active", "inactive"):
                    room += _number(folder / "memory.stat", rf"{cached}{kind}_file (\d+)")
                rooms.append(room)
    return max(0, min(rooms)) if rooms else None


V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")
"""For both versions of control groups: folder, limit, use, and prefix of the names in memory.stat."""


def _number(path: Path, pattern: str) -> int:
    """Read the number that `pattern` captures in a line of the file; ValueError if no line matches."""
    found = re.search(f"^{pattern}$", path.read_text(), re.M)
    if not found:
        raise ValueError(pattern)
    return int(found[1])


def gpu_bytes() -> int | None:
    """Return the bytes that this process has or can get on its GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    own = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    own = own if own < torch.cuda.device_count() else 0  # asking another GPU would take half a gigabyte there
    free, _ = torch.cuda.mem_get_info(own)
    return free + torch.cuda.memory_reserved(own)
