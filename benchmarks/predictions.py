"""Set the memory and the time that are predicted of a run beside what was measured, on models of real shapes.

python benchmarks/predictions.py --minutes 4      # rows go to --results, the table is printed at the end

All cases run in one process. The weights are random, made on the GPU, and shared by the settings that store them alike.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cards import describe, measure, random_batch
from contestants.ours import as_batch
from contestants.task import Micro, example_lengths, pack
from results import RESULTS, append_row, current_commit
from shapes import random_model

if TYPE_CHECKING:
    from lit_qlora.data import Batch
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.run.plan import Planner
    from lit_qlora.settings import FinetuneConfig, Recompute, Scheme

MODELS = ("tinyllama-1b", "llama-2-7b", "llama-3-8b", "Qwen/Qwen3-14B@12", "qwen3-30b-a3b-6-blocks")
TOLERATED = {"memory": 0.05, "time": 0.10}
"""Share of what was measured by which a prediction may miss it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to train, of rows x length tokens."""

    quantize: "Scheme"
    recompute: "Recompute" = "none"
    rows: int = 2
    length: int = 2048
    r: int = 16
    packed: bool = False
    cached: bool = False
    """Whether weights may also be cached in 16 bit, as they are by default."""

    @property
    def name(self) -> str:
        """A line for the table, and the flags of a row of results.csv."""
        words = [self.quantize, f"r{self.r}", "all", "recompute", self.recompute]
        return " ".join([*words, *(["packed"] if self.packed else []), *(["cached"] if self.cached else [])])


SETTINGS = (
    Setting(quantize="bnb.nf4-dq"),
    Setting(quantize="bnb.nf4-dq", cached=True),
    Setting(quantize="bnb.nf4-dq", recompute="full", rows=1, length=4096),
    Setting(quantize="bnb.nf4", recompute="offload"),
    Setting(quantize="bnb.int8"),
    Setting(quantize="none", r=64, rows=1, length=4096, packed=True),
)


def config_of(setting: Setting, folder: Path) -> "FinetuneConfig":
    """The settings of the run, of a model whose configuration is in `folder`."""
    from lit_qlora.settings import FinetuneConfig, LoRAConfig, TrainConfig

    return FinetuneConfig(
        checkpoint_dir=folder,
        quantize=setting.quantize,
        precision="bf16-true",
        lora=LoRAConfig(r=setting.r, alpha=2.0 * setting.r, targets=("all",), dropout=0.0),
        train=TrainConfig(
            recompute=setting.recompute,
            micro_batch_size=setting.rows,
            batch_size=setting.rows,
            keep_dequantized="auto" if setting.cached else 0,
        ),
    )


def planner_of(setting: Setting, model: "ModelConfig", config: "FinetuneConfig") -> "Planner":
    """The planner of the run."""
    import torch

    from lit_qlora.quantize import Storage
    from lit_qlora.run.plan import Planner

    return Planner(model, config.lora, Storage(torch.bfloat16, setting.quantize), config.train)


def gpu_here() -> str:
    """The name of the GPU that is here among those whose speed can be predicted, or ''."""
    import torch

    from lit_qlora.run.speed import BANDWIDTH

    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((name for name in BANDWIDTH if set(name.split()) <= set(here.split())), "")


def batch_of(setting: Setting, vocab_size: int) -> tuple["Batch", float]:
    """A micro-batch of a setting, and the mean over its tokens of the length of a token's document."""
    import torch

    if not setting.packed:
        return random_batch(vocab_size, setting.rows, setting.length), setting.length
    documents = pack(setting.length, iter(example_lengths(setting.length)))
    ids = torch.randint(0, vocab_size, (1, setting.length))
    return as_batch(Micro(ids, documents)), sum(count**2 for count in documents) / setting.length


def compare(base: "GPT", setting: Setting, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Predict a setting, train with it, and return both."""
    from lit_qlora.device import gpu_bytes, host_bytes, peak_gib, pick_device, reset_peak
    from lit_qlora.run.dry_run import learner_on
    from lit_qlora.run.plan import GIB, MicroBatches, Room
    from lit_qlora.run.speed import StepTime
    from lit_qlora.sweep.base import around

    config, tokens = config_of(setting, folder), setting.rows * setting.length
    planner = planner_of(setting, base.config, config)
    plan = planner.plan(MicroBatches(tokens, setting.rows, packed=setting.packed), Room(gpu_bytes(), host_bytes()))
    batch, attended = batch_of(setting, base.config.vocab_size)
    speed = StepTime(planner).tokens_per_second(plan, tokens, attended, gpu_here())
    learner = learner_on(around(base), config, plan)
    on_gpu = pick_device().type == "cuda"
    reset_peak(pick_device())
    facts: dict[str, Any] = {"described": describe(plan), "planned_gib": round(plan.total / GIB, 3)}
    facts |= measure(learner, plan, batch, arguments)
    facts |= {"peak_gib": round(peak_gib(pick_device()), 3)} if on_gpu else {}
    return facts | {"predicted_tokens_per_second": None if speed is None else round(speed)}


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each model with each setting: what was predicted and measured, or with an outcome in words why it was not."""
    from lit_qlora.device import let_segments_grow
    from lit_qlora.sweep.base import free_memory

    let_segments_grow()
    end = time.monotonic() + 60 * arguments.minutes
    settings = sorted(arguments.settings, key=lambda setting: setting.quantize)
    for shape in arguments.shapes:
        for scheme, alike in groupby(settings, key=lambda setting: setting.quantize):
            base = random_model(shape, scheme) if time.monotonic() < end else None
            for setting in alike:
                begin = time.monotonic()
                facts = attempt(base, setting, arguments) if base and begin < end else {"outcome": "no time"}
                facts |= {"seconds": round(time.monotonic() - begin, 1)}
                yield {"shape": shape, "setting": setting.name, "rows": setting.rows, "length": setting.length} | facts
                free_memory()
            base = None
            free_memory()


def attempt(base: "GPT", setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare, or say in `outcome` why that was not possible."""
    from lit_qlora.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        base.config.save(Path(folder))
        try:
            return compare(base, setting, arguments, Path(folder)) | {"outcome": "done"}
        except (UserError, RuntimeError) as error:  # torch's own among them, when memory runs out
            return {"outcome": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}


def ratios(facts: dict[str, Any]) -> dict[str, float | None]:
    """Divide what was measured by what was predicted: memory at the peak, and time; None where one is unknown."""
    speed, peak = facts.get("predicted_tokens_per_second"), facts.get("peak_gib")
    return {
        "memory": round(peak / facts["planned_gib"], 3) if peak else None,
        "time": round(speed / facts["tokens_per_second"], 3) if speed else None,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """A table of all cases, and how many predictions are as near as they should be."""
    lines = ["model | setting | rows | GiB planned | measured | ratio | tokens/s predicted | measured | time, ratio"]
    near: dict[str, list[bool]] = {name: [] for name in TOLERATED}
    for facts in found:
        if facts["outcome"] != "done":
            lines.append(f"{facts['shape']} | {facts['setting']} | {facts['outcome']}")
            continue
        both = ratios(facts)
        for name, ratio in both.items():
            if ratio is not None:
                near[name].append(abs(1 / ratio - 1) <= TOLERATED[name])
        cells = [facts["shape"], facts["setting"], f"{facts['rows']} x {facts['length']:,}", facts["planned_gib"]]
        cells += [facts.get("peak_gib"), both["memory"], facts["predicted_tokens_per_second"]]
        cells += [facts["tokens_per_second"], both["time"]]
        lines.append(" | ".join("-" if cell is None else str(cell) for cell in cells))
    for name, all_near in near.items():
        lines.append(f"{name}: {sum(all_near)} of {len(all_near)} within {TOLERATED[name]:.0%} of what was measured")
    return "\n".join(lines)


def as_row(facts: dict[str, Any], commit: str) -> dict[str, Any]:
    """The row of results.csv of a case that was done."""
    import torch

    flags = f"{facts['setting']} as {facts['described']} planned {facts['planned_gib']:.2f} "
    flags += f"predicted {facts['predicted_tokens_per_second'] or 0}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__.split("+")[0],
        "program": "predictions.py",
        "shape": facts["shape"],
        "micro_batch": facts["rows"],
        "tokens": facts["length"],
        "flags": flags,
        **{name: facts[name] for name in ("tokens_per_second", "slowest", "fastest")},
        "peak_gib": round(facts.get("peak_gib", 0), 2),
    }


def main() -> None:
    """Compare each case, print its facts as a line of JSON, append its row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=MODELS, help="models, see shapes.model_config")
    parser.add_argument("--steps", type=int, default=5, help="most timed steps of a case")
    parser.add_argument("--seconds", type=float, default=4, help="for the steps of a case, beyond two timed ones")
    parser.add_argument("--minutes", type=float, default=4, help="no case begins after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    arguments = parser.parse_args()
    arguments.settings = SETTINGS
    found = []
    for facts in cases(arguments):
        print(json.dumps(facts), flush=True)
        if facts["outcome"] == "done":
            append_row(arguments.results, as_row(facts, arguments.commit))
        found.append(facts)
    print(table(found))


if __name__ == "__main__":
    main()
