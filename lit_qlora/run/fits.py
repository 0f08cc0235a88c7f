"""GPUs that need not be in this machine, and the largest runs that they hold."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lit_qlora.device import best_precision, fast_dtype, weights_dtype
from lit_qlora.errors import UsageError, did_you_mean
from lit_qlora.kernels.launch import Card
from lit_qlora.model.config import ModelConfig
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import GIB, MicroBatches, Plan, Planner, Room
from lit_qlora.run.speed import BANDWIDTH, StepTime
from lit_qlora.settings import LoRAConfig, Scheme, TrainConfig

CONTEXT = 0.6 * GIB
"""Bytes of a GPU that CUDA and compiled kernels take outside of torch's allocator."""
USABLE = 0.97
"""Share of a GPU's nominal memory that torch finds; the rest is the driver's."""
MOST_ROWS = 64
"""Larger micro-batches are not looked for."""
STEP = 128
"""Tokens to which the longest row is rounded down."""
KIB = 2**10
SHARED: dict[tuple[int, int], int] = {
    (7, 0): 96 * KIB,
    (7, 5): 64 * KIB,
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (12, 0): 99 * KIB,
}
"""Shared memory that a program may take, by compute capability. Source: CUDA C++ Programming Guide."""
GPUS: dict[str, tuple[float, tuple[int, int]]] = {
    "V100 16GB": (15.77, (7, 0)),
    "T4": (14.56, (7, 5)),
    "RTX 2080 Ti": (10.75, (7, 5)),
    "RTX 3060": (11.76, (8, 6)),
    "RTX 3090": (23.69, (8, 6)),
    "A10": (22.05, (8, 6)),
    "RTX A6000": (47.53, (8, 6)),
    "A100 40GB": (39.39, (8, 0)),
    "A100 80GB": (79.15, (8, 0)),
    "RTX 4060 Ti 16GB": (15.57, (8, 9)),
    "RTX 4090": (23.64, (8, 9)),
    "L4": (22.05, (8, 9)),
    "L40S": (44.40, (8, 9)),
    "RTX 5090": (31.36, (12, 0)),
    "H100 80GB": (79.1, (9, 0)),
    "H200": (139.8, (9, 0)),
}
"""Name -> memory in GiB, as torch reports it, and compute capability."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that a plan is made for."""

    name: str
    total: float
    """Bytes, as torch reports them."""
    card: Card

    @property
    def free(self) -> float:
        """Bytes that torch's allocator can have."""
        return self.total - CONTEXT

    def room(self, host: float | None) -> Room:
        """The memory of a run on it, with so many free bytes on the host."""
        return Room(self.free, host, self.card)


def gpu_called(text: str) -> Gpu:
    """Return the GPU of this name, or of so many GB of memory: one like an RTX 30.

    Raises:
        UsageError: for a name that is unknown.
    """
    try:
        size = float(text)
    except ValueError:
        return _known(text)
    if not 1 <= size <= 1024:
        raise UsageError(f"gpu must have 1 to 1024 GB, got {text}.")
    return Gpu(f"{size:g} GB", USABLE * size * GIB, Card((8, 6), SHARED[8, 6]))


def _known(text: str) -> Gpu:
    plain = {_letters(name): name for name in GPUS}
    if _letters(text) not in plain:
        known = list(GPUS)
        hint = did_you_mean(text, known)
        raise UsageError(f"gpu {text!r} is not known.{hint}\nGive its memory in GB, or one of {', '.join(known)}.")
    name = plain[_letters(text)]
    size, capability = GPUS[name]
    return Gpu(name, size * GIB, Card(capability, SHARED[capability]))


def _letters(name: str) -> str:
    """A name without case, spaces and the maker."""
    words = name.lower().replace("-", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


def planner_for(
    card: Card,
    model: ModelConfig,
    lora: LoRAConfig,
    quantize: Scheme,
    train: TrainConfig,
    state_bytes: float = 8.0,
    *,
    quantize_head: bool = False,
    sharded: int = 0,
    parts: int = 1,
) -> Planner:
    """A planner of runs in the precision that a run takes by itself on this card.

    Args:
        state_bytes, sharded, parts: see Planner.
    """
    precision = best_precision(card.capability)
    storage = Storage(weights_dtype(precision), quantize, quantize_head)
    return Planner(model, lora, storage, train, state_bytes, fast_dtype(precision), sharded=sharded, parts=parts)


def plan_rows(planner: Planner, rows: int, length: int, room: Room) -> Plan:
    """The plan of a run whose micro-batches all have so many rows of `length` tokens, which devices may share."""
    tokens = rows * math.ceil(length / planner.bare.parts)
    return planner.plan(MicroBatches(tokens, rows, tokens), room)


def most_rows(planner: Planner, length: int, room: Room) -> int:
    """Rows of `length` tokens of the largest micro-batch that fits, at most MOST_ROWS; 0 if none fits."""
    return _largest(lambda rows: room.holds(plan_rows(planner, rows, length, room)), MOST_ROWS)


def longest_row(planner: Planner, room: Room) -> int:
    """Tokens of the longest row that fits alone, a multiple of STEP unless the model's limit is met; 0 if none fits."""
    limit = planner.gpt.config.block_size
    steps = _largest(lambda n: room.holds(plan_rows(planner, 1, min(limit, n * STEP), room)), math.ceil(limit / STEP))
    return min(limit, steps * STEP)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1, 2, ... `most` that fits, if all below it do; 0 if none does."""
    low, high = 0, most + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest runs of a model on a GPU."""

    model: str
    gpu: str
    rows: int
    """Rows of the wanted length in the largest micro-batch; 0 if not one of them fits."""
    longest: int
    """Tokens of the longest row that fits alone; 0 if the model does not fit."""
    length: int
    """Tokens of the row that the following is about: the wanted length, or the longest row if that is less."""
    context: int
    """Tokens that the model can read; no row is longer, whatever length is wanted."""
    recompute: str
    """How blocks recompute, such as "none" or "offload 12, none 20"."""
    planned_gib: float
    """Without weights that are cached in 16 bit where memory is left."""
    room_gib: float
    slow_because: str
    """Reason against the fast path, or ''."""
    tokens_per_second: float | None
    """With micro-batches of the best size, an estimate; None on a GPU, or of a model, whose rate was not measured."""


def find_fit(planner: Planner, gpu: Gpu, length: int, host: float | None) -> Fit:
    """Find the largest runs on a GPU; rows are as long as the model allows, at most `length`."""
    room, length = gpu.room(host), min(length, planner.gpt.config.block_size)
    rows, longest = most_rows(planner, length, room), longest_row(planner, room)
    shown = min(length, longest) or STEP
    plan = plan_rows(planner, 1, shown, room)
    return Fit(
        model=planner.gpt.config.name,
        gpu=gpu.name,
        rows=rows,
        longest=longest,
        length=shown,
        context=planner.gpt.config.block_size,
        recompute=describe(plan),
        planned_gib=round((plan.total - plan.cached) / GIB, 2),
        room_gib=round(gpu.free / GIB, 2),
        slow_because=plan.slow_because,
        tokens_per_second=_speed(planner, gpu.name, room, rows, shown) if longest and gpu.name in BANDWIDTH else None,
    )


def _speed(planner: Planner, gpu: str, room: Room, rows: int, length: int) -> float | None:
    """The estimate of the fastest of some micro-batches, with two digits; None for several GPUs, not measured."""
    time, found = StepTime(planner), []
    for some in (2**power for power in range(max(1, rows.bit_length()))):
        plan = plan_rows(planner, some, length, room)
        found.append(time.tokens_per_second(plan, some * length, length, gpu))
    speeds = [speed for speed in found if speed is not None]
    return float(f"{max(speeds):.2g}") if speeds else None


def describe(plan: Plan) -> str:
    """Name how blocks recompute: "none", or "offload 12, none 20" where they differ."""
    counts = Counter(plan.recompute)
    return plan.recompute[0] if len(counts) == 1 else ", ".join(f"{policy} {n}" for policy, n in counts.items())


def least_gb(planner: Planner, length: int, host: float | None) -> int:
    """GB of the smallest GPU, one like an RTX 30, that holds a row of `length` tokens."""

    def lacks(gb: int) -> bool:
        room = gpu_called(str(gb)).room(host)
        return not room.holds(plan_rows(planner, 1, length, room))

    return 1 + _largest(lacks, 1023)
