"""Run models of real shapes as smaller GPUs would: the memory that was planned and that was taken, setting and speed.

python benchmarks/cards.py --minutes 8            # rows go to --results, a JSON line for each case is printed

Each case has a process of its own. It limits torch to the memory of the smaller GPU, lets the planner choose for that
memory, and trains with random weights. Speeds are those of the GPU that is here. Cases that do not fit are not tried.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import RESULTS, append_row, current_commit
from shapes import SHAPES

if TYPE_CHECKING:
    from lit_qlora.data import Batch
    from lit_qlora.run.plan import Plan, Planner, Room
    from lit_qlora.settings import FinetuneConfig
    from lit_qlora.train.loop import Learner

SIZES = (24, 16, 12, 8, 48, 40)
"""GB, the most common first, as time may run out."""
MODELS = ("llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-1-33b")
WARM_UPS = 3  # kernels are compiled in the first step, weights are carried over from the second on
WARM_UPS_OF_GRAPHS = 6  # each shape is captured in its fifth pass
LEAST_LENGTH = 256


def largest_case(planner: "Planner", room: "Room", rows: int, length: int) -> tuple[int, int] | None:
    """The most of `rows` rows of `length` tokens that fits: rows are halved first, then tokens; None if none fits."""
    from lit_qlora.run.fits import plan_rows

    while not room.holds(plan_rows(planner, rows, length, room)):
        if rows == 1 and length <= LEAST_LENGTH:
            return None
        rows, length = (rows // 2, length) if rows > 1 else (1, length // 2)
    return rows, length


def describe(plan: "Plan") -> str:
    """Name the setting of a plan: how blocks recompute, and what is kept."""
    words = ["recompute " + " ".join(f"{policy}:{count}" for policy, count in Counter(plan.recompute).items())]
    words += [f"dequantized {plan.cached_blocks}"] if plan.cached_blocks else []
    words += ["carried over"] if plan.carries else []
    words += ["graphs"] if plan.graphs else []
    return " ".join(words) if not plan.slow_because else f"plain path ({plan.slow_because})"


def settings(arguments: argparse.Namespace, folder: Path) -> "FinetuneConfig":
    """The settings of the run."""
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.settings import FinetuneConfig, LoRAConfig

    ModelConfig(name=f"random/{arguments.shape}", **SHAPES[arguments.shape]).save(folder)
    lora = LoRAConfig(r=arguments.r, alpha=2.0 * arguments.r, targets=tuple(arguments.targets), dropout=0.0)
    return FinetuneConfig(checkpoint_dir=folder, quantize=arguments.quantize, precision="bf16-true", lora=lora)


def planner_of(config: "FinetuneConfig", gb: float) -> "Planner":
    """The planner of a run on a GPU of so many GB."""
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.run.fits import gpu_called, planner_for

    model = ModelConfig.load(config.checkpoint_dir)
    return planner_for(gpu_called(f"{gb:g}").card, model, config.lora, config.quantize, config.train)


def room_of(arguments: argparse.Namespace, gb: float) -> "Room":
    """The memory of a GPU of so many GB, beside a host that has enough for it."""
    from lit_qlora.device import host_bytes
    from lit_qlora.run.fits import gpu_called
    from lit_qlora.run.plan import GIB

    return gpu_called(f"{gb:g}").room(min(host_bytes() or arguments.host * GIB, arguments.host * GIB))


def try_case(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train as a smaller GPU, in this process; the rows and tokens of `arguments` fit it."""
    import torch

    from lit_qlora.device import let_segments_grow, peak_gib, pick_device, reset_peak
    from lit_qlora.run.dry_run import random_learner
    from lit_qlora.run.fits import plan_rows
    from lit_qlora.run.plan import GIB

    let_segments_grow()
    device, room = pick_device(), room_of(arguments, arguments.gb)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(room.gpu / torch.cuda.get_device_properties(device).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(arguments, Path(folder))
        plan = plan_rows(planner_of(config, arguments.gb), arguments.rows, arguments.length, room)
        begin = time.monotonic()
        learner = random_learner(config, plan, device)
    facts: dict[str, Any] = {"setting": describe(plan), "planned_gib": plan.total / GIB, "room_gib": room.gpu / GIB}
    facts |= {"planned_host_gib": plan.host / GIB, "loading_s": time.monotonic() - begin}
    if device.type == "cuda":
        facts["loading_gib"] = peak_gib(device)
        reset_peak(device)
    batch = random_batch(learner.module.config.vocab_size, arguments.rows, arguments.length)
    facts |= measure(learner, plan, batch, arguments)
    if device.type == "cuda":
        facts |= {"peak_gib": peak_gib(device)}
        facts |= {"reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}


def random_batch(vocab_size: int, rows: int, length: int) -> "Batch":
    """A micro-batch of so many rows of `length` tokens, all of them labelled."""
    import torch

    from lit_qlora.data import Batch

    ids = torch.randint(0, vocab_size, (rows, length + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def measure(learner: "Learner", plan: "Plan", batch: "Batch", arguments: argparse.Namespace) -> dict[str, Any]:
    """Take steps, and tell their speed, and if memory ran out on the way so that less was kept or done at a time.

    Args:
        arguments: `steps`, how many are timed at most, and `seconds`, after which two are enough.
    """
    from lit_qlora.data import Step

    count = batch.tokens.numel()
    step = Step(batches=[batch], weight=count, labelled=count, tokens=count, samples=len(batch.tokens), epoch=0.0)
    learner.model.train()
    warm_ups = WARM_UPS_OF_GRAPHS if plan.graphs else WARM_UPS
    times: list[float] = []
    end = time.monotonic() + arguments.seconds
    while len(times) < warm_ups + 2 or (time.monotonic() < end and len(times) < warm_ups + arguments.steps):
        begin = time.monotonic()
        loss = learner.add_gradients(step)
        learner.clip_gradients(1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        assert loss is not None
        loss.item()  # waits for the device
        times.append(time.monotonic() - begin)
    timed = times[warm_ups:]
    speeds = {"tokens_per_second": statistics.median(timed), "slowest": max(timed), "fastest": min(timed)}
    return {
        **{name: round(count / seconds) for name, seconds in speeds.items()},
        "steps": len(times),
        "fewer_rows": learner.add_gradients.rows,
        "released": released(learner, plan),
    }


def released(learner: "Learner", plan: "Plan") -> bool:
    """Tell whether weights that the plan keeps in 16 bit had to be freed on the way."""
    fast: Any = learner.module.fast
    return (plan.cached_blocks > 0 and not fast.cached_blocks) or (plan.carries and not fast.carries)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, float, tuple[int, int] | None, "Plan"]]:
    """Each shape on each GPU, with the rows and tokens that fit it, or None, and the plan of these or of the least."""
    from lit_qlora.run.fits import plan_rows

    with tempfile.TemporaryDirectory() as folder:
        for gb in arguments.gbs:
            for shape in arguments.shapes:
                config = settings(argparse.Namespace(**vars(arguments) | {"shape": shape}), Path(folder))
                planner, room = planner_of(config, gb), room_of(arguments, gb)
                found = largest_case(planner, room, arguments.rows, arguments.length)
                yield shape, gb, found, plan_rows(planner, *(found or (1, LEAST_LENGTH)), room)


def run_case(arguments: argparse.Namespace, shape: str, gb: float, rows: int, length: int) -> dict[str, Any]:
    """Try a case in a process of its own; its facts, or an outcome other than "done"."""
    flags = f"--case {shape} {gb:g} --rows {rows} --length {length} --r {arguments.r} --quantize {arguments.quantize}"
    flags += f" --host {arguments.host:g} --steps {arguments.steps} --seconds {arguments.seconds:g}"
    command = [sys.executable, __file__, *flags.split(), "--targets", *arguments.targets]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"outcome": f"stopped after {arguments.limit:g} s"}
    if done.returncode:
        return {"outcome": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]}
    return {"outcome": "done"} | json.loads(done.stdout.splitlines()[-1])


def as_row(arguments: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """The row of results.csv for a case that was tried."""
    import torch

    flags = f"as {facts['gb']:g} GB {arguments.quantize} r{arguments.r} {','.join(arguments.targets)} "
    flags += f"{facts['setting']} planned {facts['planned_gib']:.2f} reserved {facts.get('reserved_gib', 0):.2f}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__.split("+")[0],
        "program": "cards.py",
        "shape": facts["shape"],
        "micro_batch": facts["rows"],
        "tokens": facts["length"],
        "flags": flags,
        **{name: facts[name] for name in ("tokens_per_second", "slowest", "fastest")},
        "peak_gib": round(facts.get("peak_gib", 0), 2),
    }


def main() -> None:
    """Try each case, print its line and append its row; with --case, be the process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbs", type=float, nargs="+", default=SIZES, help="memory of the GPUs, in GB")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=MODELS, help="models")
    parser.add_argument("--quantize", default="bnb.nf4-dq", help="storage of the base")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--targets", nargs="+", default=["all"], help="layers that learn")
    parser.add_argument("--rows", type=int, default=2, help="most rows of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="most tokens of a row")
    parser.add_argument("--host", type=float, default=64, help="GiB of the host's memory, at most")
    parser.add_argument("--steps", type=int, default=6, help="most timed steps of a case")
    parser.add_argument("--seconds", type=float, default=8, help="for the steps of a case, beyond two timed ones")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a case is stopped")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    parser.add_argument("--case", nargs=2, metavar=("SHAPE", "GB"), help="try one case in this process")
    arguments = parser.parse_args()
    if arguments.case:
        arguments.shape, arguments.gb = arguments.case[0], float(arguments.case[1])
        print(json.dumps(try_case(arguments)))
        return
    end = time.monotonic() + 60 * arguments.minutes
    for shape, gb, found, plan in cases(arguments):
        facts: dict[str, Any] = {"gb": gb, "shape": shape, "planned_gib": round(plan.total / 2**30, 3)}
        if found is None:
            facts["outcome"] = "does not fit"
        elif time.monotonic() > end:
            facts["outcome"] = "no time"
        else:
            rows, length = found
            begin = time.monotonic()
            facts |= {"rows": rows, "length": length} | run_case(arguments, shape, gb, rows, length)
            facts["seconds"] = round(time.monotonic() - begin, 1)
        if facts["outcome"] == "done":
            facts["peak_of_plan"] = round(facts.get("peak_gib", 0) / facts["planned_gib"], 3)
            append_row(arguments.results, as_row(arguments, facts))
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
