"""Before its weights are loaded a run says how long it will take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model, random_model
from lit_qlora.data import Batch, RunData, Step, read_data, steps
from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.config import ModelConfig
from lit_qlora.quantize import Storage
from lit_qlora.run import banner, dry_run
from lit_qlora.run.banner import longest_batch, most_rows, plan_run
from lit_qlora.run.dry_run import Pace, measure_pace, tell_time
from lit_qlora.run.plan import MicroBatches, Room
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, OptimizerConfig, TrainConfig
from lit_qlora.train.loop import Gradients
from tests.conftest import tiny_model, write_checkpoint

Read = Callable[..., tuple[FinetuneConfig, RunData]]
SCHEMES = ["none", "bnb.nf4", "bnb.nf4-dq", "bnb.int8"]


@pytest.fixture
def read(tiny_checkpoint: Path, examples_file: Path) -> Read:
    """A run's config and data, with other settings if given."""

    def made(data: dict | None = None, **settings: object) -> tuple[FinetuneConfig, RunData]:
        words = {"path": str(examples_file), "prompt": "qa", "cache_dir": "none", "val_fraction": 0.1} | (data or {})
        wanted = {"precision": "32-true", "train": TrainConfig(batch_size=8)} | settings
        config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, data=DataConfig(**words), **wanted)  # type: ignore[arg-type]
        return config, read_data(config)

    return made


class Clock:
    """Time that passes with what is done: `each` seconds for a token, padding included, and `update` for an update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: float, update: float) -> None:
        self.now, self.each, self.update = 0.0, each, update
        add, validate = Gradients.__call__, dry_run.score_rows

        def adding(gradients: Gradients, step: Step, seed: int = 0) -> torch.Tensor | None:
            self.now += self.spent(step.batches)
            return add(gradients, step, seed)

        def validated(fabric: object, model: object, batches: list[Batch], stop: object) -> object:
            self.now += self.spent(batches) / 3
            return validate(fabric, model, batches, stop)  # type: ignore[arg-type]

        def updated(optimizer: torch.optim.AdamW, closure: object = None) -> None:
            self.now += self.update

        monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(Gradients, "__call__", adding)
        monkeypatch.setattr(dry_run, "score_rows", validated)
        monkeypatch.setattr(torch.optim.AdamW, "step", updated)

    def spent(self, batches: list[Batch]) -> float:
        """Seconds that these micro-batches take."""
        return self.each * sum(batch.tokens.numel() for batch in batches)


def pace(config: FinetuneConfig, data: RunData) -> Pace:
    return measure_pace(config, data, plan_run(config, data), torch.device("cpu"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_time_of_a_run_is_foretold_from_a_few_of_its_micro_batches(
    packed: bool, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = read({"packing": packed}, train=TrainConfig(batch_size=8, micro_batch_size=1))
    clock = Clock(monkeypatch, each=0.002, update=0.05)
    found = pace(config, data)
    taken = list(steps(data.train, data.batching, total := 40))
    real = [clock.spent(step.batches) + clock.update for step in taken]
    assert total * found.step == pytest.approx(sum(real), rel=0.05)
    assert total * found.tokens == pytest.approx(sum(step.tokens for step in taken), rel=0.05)
    assert found.validation == pytest.approx(clock.spent(data.val_batches) / 3)


def test_of_several_devices_each_has_its_share(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = read(train=TrainConfig(batch_size=8, micro_batch_size=2))
    Clock(monkeypatch, each=0.002, update=0.0)
    alone, shared = pace(config, data), pace(replace(config, devices=2), data)
    assert shared.step == pytest.approx(alone.step / 2, rel=0.1)
    assert shared.validation == pytest.approx(alone.validation / 2)
    assert shared.tokens == alone.tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": LoRAConfig(dora=True, targets=("all",))},
        {"lora": LoRAConfig(init="pissa")},
        {"train": TrainConfig(batch_size=8, neftune=5.0, recompute="full")},
        {"optimizer": OptimizerConfig(name="lion")},
        {"quantize": "bnb.nf4", "quantize_head": True},
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed"},
        {"data": {"val_fraction": 0.0}},
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_tried(settings: dict, read: Read) -> None:
    found = pace(*read(**settings))
    assert found.step > 0
    assert (found.validation == 0) is ("data" in settings)


def test_what_is_said() -> None:
    whole = Pace(step=3.42, tokens=61_560.0, validation=12.34, peak_gib=16.25)
    assert whole.describe(2000, 10) == (
        "about 1 h 56 min   2,000 steps of 3.42 s (18,000 tokens/s), 10 validations of 12 s (losses alone), "
        "16.25 GiB at the peak, tried with random weights"
    )
    assert "validations" not in replace(whole, validation=0.0).describe(2000, 0)
    assert whole.describe(2000, 10, price=2.5).startswith("about 1 h 56 min, costs 4.84 at 2.5 an hour   2,000 steps")


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_the_largest_micro_batch_that_fits_the_gpu_is_said(
    read: Read, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = read(precision="bf16-true", lora=LoRAConfig(targets=("all",)))
    assert most_rows(config, data) == 0, "there is no GPU"
    monkeypatch.setattr(banner, "gpu_bytes", lambda: 4_000_000)
    rows, width = most_rows(config, data), longest_batch(data.train, data.batching, 1).tokens.size(1)
    held = [MicroBatches(count * width, count, count * width) for count in (rows, rows + 1)]
    room = Room(4_000_000)
    assert [room.holds(banner._planner(config).plan(batches, room)) for batches in held] == [True, False]
    monkeypatch.setattr(dry_run, "MOST_ON_CPU", 0)
    tell_time(config, data, plan_run(config, data), 12)
    assert f"the largest micro-batch that fits: --train.micro_batch_size {rows}\n" in capsys.readouterr().out


def test_a_price_needs_a_dry_run() -> None:
    with pytest.raises(UsageError, match=r"price_per_hour has no effect without --dry_run"):
        FinetuneConfig(price_per_hour=2.0)


@pytest.mark.parametrize(
    ("total", "start", "every", "left", "validations"),
    [(12, 0, 4, 12, 4), (12, 4, 4, 8, 2), (9, 3, 4, 6, 3), (6, 0, 100, 6, 2)],
)
def test_what_is_left_of_a_run_is_counted(
    total: int, start: int, every: int, left: int, validations: int, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = read()
    config = replace(config, eval=replace(config.eval, every=float(every)))
    told: list[tuple[int, int, float | None]] = []
    monkeypatch.setattr(Pace, "describe", lambda self, *counts: told.append(counts))
    monkeypatch.setattr(dry_run, "measure_pace", lambda *arguments: Pace(1.0, 1.0, 1.0, 1.0))
    tell_time(config, data, plan_run(config, data), total, start)
    assert told == [(left, validations, None)]  # before the first step, too


def test_the_peak_is_that_of_the_longest_micro_batch_with_all_that_a_run_holds(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = read(train=TrainConfig(batch_size=8, micro_batch_size=2, neftune=5.0))
    plan, done = plan_run(config, data), []

    def noted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            widths = [batch.tokens.size(1) for batch in getattr(arguments[-1], "batches", [])]
            done.append(f"{name} {max(widths)}" if widths else name)
            return function(*arguments)

        return call

    for owner, name in ((dry_run, "add_noise"), (dry_run, "take_path"), (dry_run, "peak_gib")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    monkeypatch.setattr(Gradients, "__call__", noted("learn", Gradients.__call__))
    monkeypatch.setattr(torch.optim.AdamW, "step", noted("update", torch.optim.AdamW.step))
    assert measure_pace(config, data, plan, torch.device("cpu")).peak_gib > 0.1
    assert done[:2] == ["add_noise", "take_path"]
    assert done[-3:] == ["update", f"learn {int(data.train.lengths.max()) - 1}", "peak_gib"]


def test_on_a_cpu_no_large_model_is_made(
    read: Read, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = read()
    monkeypatch.setattr(dry_run, "MOST_ON_CPU", 1000)
    monkeypatch.setattr(dry_run, "random_model", lambda *arguments: pytest.fail("a model was made"))
    tell_time(config, data, plan_run(config, data), 12)
    assert "  time    not measured" in capsys.readouterr().out


def test_memory_that_runs_out_is_said_with_what_to_do(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = read(train=TrainConfig(batch_size=8, micro_batch_size=8))

    def runs_out(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(dry_run, "random_model", runs_out)
    with pytest.raises(ResourceError, match=r"ran out in the first steps\.\nTo need less: --train\.micro_batch_size 4"):
        tell_time(config, data, plan_run(config, data), 12)


@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_random_model_is_a_loaded_one_but_for_the_numbers(
    tmp_path: Path, scheme: str, tied: bool, quantize_head: bool
) -> None:
    directory = write_checkpoint(tmp_path / "base", tiny_model(tied_head=tied, qkv_bias=True))
    loaded = load_model(directory, torch.bfloat16, "cpu", scheme, quantize_head)  # type: ignore[arg-type]
    storage = Storage(torch.bfloat16, scheme, quantize_head)  # type: ignore[arg-type]
    made = random_model(ModelConfig.load(directory), storage, torch.device("cpu"))
    ours, theirs = ({name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (made, loaded))
    assert ours == theirs
    assert [getattr(m.head, "weight", None) is m.embed.weight for m in (made, loaded)] == [
        tied and not (quantize_head and scheme != "none")
    ] * 2
