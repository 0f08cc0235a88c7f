"""Which device there is, which dtype the weights and the arithmetic get on it, and how much memory was used."""

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

from lit_qlora.errors import UsageError
from lit_qlora.settings import Precision


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision`, or the best one for `device` if it is "auto".

    Raises:
        UsageError: for one that the device cannot do well.
    """
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.get_device_capability(device)[0] >= 8  # before Ampere it is emulated, and slow
    if precision == "auto":
        return "bf16-true" if bf16 else "16-mixed" if cuda else "32-true"
    if scales_loss(precision) and not cuda:
        raise UsageError(f"precision {precision} needs a GPU; on a CPU take 32-true or bf16-true.")
    return precision


def has_fp8() -> bool:
    """Whether the GPU multiplies in FP8."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def fabric_precision(precision: Precision) -> Precision:
    """What Fabric is told: -true is a matter of the weights' dtype, and adapters stay in float32.

    With float16 Fabric scales the loss, and skips a step whose gradients overflow.
    """
    if precision == "bf16-true":
        return "32-true"
    return "16-mixed" if scales_loss(precision) else precision


def scales_loss(precision: Precision) -> bool:
    """Whether gradients are so small for the dtype that the loss has to be scaled."""
    return precision in ("16-true", "16-mixed")


def weights_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the frozen weights: 16 bit only for the -true precisions, float32 where arithmetic alone is 16 bit."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)


def fast_dtype(precision: Precision) -> torch.dtype | None:
    """Dtype that the fast path, which mixes none, gives to frozen weights; None where it leaves them as they are."""
    return torch.float16 if precision == "16-mixed" else None


def peak_gib(device: torch.device) -> float:
    """Largest memory use so far in GiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def let_segments_grow() -> None:
    """Let torch's allocator extend and give back memory in small pages, before it is first used.

    What is kept of micro-batches of different lengths, and weights that take its place, then leave few holes.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which a user may have set
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def precede_other_streams() -> None:
    """Let what this thread launches from now on go before what runs beside it on other streams of the GPU.

    A stream of normal priority has the lowest one that there is.
    """
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)
    torch.cuda.empty_cache()  # what the allocator keeps of another stream, this one cannot have


def host_bytes(files: Path = Path("/")) -> int | None:
    """Memory of the host that could be taken, in bytes, also by the limits of control groups; None where none is told.

    Containers and batch jobs are such groups. What files fill of their memory can be taken from them.

    Args:
        files: where /proc and /sys lie.
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
        for group in (name, *map(str, PurePosixPath(name).parents)):  # of which a container sees the last alone
            folder = files / root / group.lstrip("/")
            with suppress(OSError, ValueError):  # "max" where there is no limit
                room = _number(folder / most, r"(\d+)") - _number(folder / used, r"(\d+)")
                for kind in ("active", "inactive"):
                    room += _number(folder / "memory.stat", rf"{cached}{kind}_file (\d+)")
                rooms.append(room)
    return max(0, min(rooms)) if rooms else None


V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")
"""Of both versions of control groups the folder, the limit, what is used, and the beginning of names in memory.stat."""


def _number(path: Path, pattern: str) -> int:
    """What the group of `pattern` is in a line of the file; ValueError if no line is so."""
    found = re.search(f"^{pattern}$", path.read_text(), re.M)
    if not found:
        raise ValueError(pattern)
    return int(found[1])


def gpu_bytes() -> int | None:
    """Memory that this process has or can get of the GPU that will be its own, in bytes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    own = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    own = own if own < torch.cuda.device_count() else 0  # of another GPU, the question would take half a gigabyte
    free, _ = torch.cuda.mem_get_info(own)
    return free + torch.cuda.memory_reserved(own)
