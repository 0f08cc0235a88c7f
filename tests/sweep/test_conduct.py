"""A sweep leaves what separate runs would have left, whatever happens to it."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.errors import ResourceError, UserError
from lit_qlora.run.finetune import finetune
from lit_qlora.settings import FinetuneConfig, SweepConfig
from lit_qlora.sweep import conduct
from lit_qlora.sweep.base import SharedBase
from lit_qlora.sweep.conduct import locked, shares, sweep
from lit_qlora.sweep.state import is_over, read_state
from lit_qlora.sweep.trials import Trial, plan_trials
from tests.run.forked import Child, at_save, ending, signals
from tests.sweep.conftest import Configure

VARIED = """--sweep.variants={
    small: {lora.r: 2, lora.dropout: 0.2},
    noisy: {train.neftune: 5.0, train.hidden_dropout: 0.1, lora.targets: all, lora.dora: true},
    own base: {lora.init: pissa, lora.targets: [query]},
    tokens: {lora.train_tokens: [3, 5], lora.targets: [mlp, head], seed: 7},
    again: {lora.r: 4, lora.dropout: 0.2}}"""


def trials_of(config: SweepConfig) -> list[Trial]:
    assert config.out_dir is not None
    return plan_trials(config, config.out_dir)


def separately(trial: Trial) -> tuple[list[dict], bytes]:
    """The end of a run with the settings of a trial."""
    out = trial.folder.with_name(f"{trial.name}-alone")
    finetune(replace(trial.config, out_dir=out))
    return ending(out)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times a base was read until each trial began."""
    counts: list[int] = []
    load = SharedBase.__call__

    def counted(self: SharedBase, *given: Any) -> object:
        model = load(self, *given)
        counts.append(self.loads)
        return model

    monkeypatch.setattr(SharedBase, "__call__", counted)
    return counts


def leaves(**said: Exception) -> Callable[..., Path]:
    """A run that leaves its summary only, or raises what is given for its rank, such as r3."""

    def run(config: FinetuneConfig, *given: Any) -> Path:
        assert config.out_dir is not None
        if error := said.get(f"r{config.lora.r}"):
            raise error
        config.out_dir.mkdir(parents=True)
        (config.out_dir / "summary.json").write_text("{}")
        return config.out_dir

    return run


@pytest.mark.slow
def test_the_trial_that_goes_on_ends_as_if_there_were_no_other_and_no_pause(
    configure: Configure, no_pages: None, loads: list[int]
) -> None:
    config = configure("--sweep.grid={lora.r: [2, 4], lora.dropout: [0.2]}", "--sweep.halving=2")
    out = sweep(config)
    trials = trials_of(config)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["status"], row["runs"][0]["step"]) for row in rows] == [("done", 4), ("paused", 2)]
    (best,) = (trial for trial in trials if is_over(trial))
    assert ending(best.folder) == separately(best)
    pause = {"step-000002", "step-000002.state"}
    assert names_in(best.folder) - pause == names_in(best.folder.with_name(f"{best.name}-alone")) - pause
    assert loads == [1, 1, 1]
    sweep(config)  # nothing is left to do
    assert loads == [1, 1, 1]


@pytest.mark.slow
def test_each_trial_is_the_run_that_finetune_would_have_left(
    configure: Configure, no_pages: None, loads: list[int]
) -> None:
    config = configure(VARIED)
    sweep(config)
    assert loads == [1, 1, 2, 3, 3]  # PiSSA changes the base, so it gets its own
    for trial in trials_of(config):
        assert ending(trial.folder) == separately(trial), trial.variant
        assert names_in(trial.folder) == names_in(trial.folder.with_name(f"{trial.name}-alone"))


@pytest.mark.slow
def test_halving_keeps_the_best_and_what_was_paused_can_go_on(configure: Configure, no_pages: None) -> None:
    rates = "--sweep.grid={train.learning_rate: [0.00001, 0.02, 0.005, 0.00002]}"
    config = configure(rates, "--sweep.halving=2", "--train.max_steps=8")
    sweep(config)
    trials = trials_of(config)
    assert [is_over(trial) for trial in trials] == [False, True, False, False]
    assert [read_state(trial).reached for trial in trials] == [0.25, 0.5, 0.5, 0.25]
    finetune(trials[2].config)  # what its row says goes on with it
    for trial in trials[1:3]:
        assert ending(trial.folder) == separately(trial)


def test_trials_that_fail_are_rows(configure: Configure, no_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    diverged = UserError("the loss is NaN\nlook at the data")
    diverged.status = 5
    monkeypatch.setattr(conduct, "finetune", leaves(r3=gone, r4=diverged))
    config = configure("--sweep.grid={lora.r: [3, 4, 2]}")
    rows = json.loads((sweep(config) / "sweep.json").read_text())["rows"]
    assert [(row["status"], row["runs"][0]["error"]) for row in rows] == [
        ("done", None),
        ("failed", "Out of memory. CUDA out of memory."),
        ("failed", "the loss is NaN\nlook at the data"),
    ]
    assert read_state(trials_of(config)[0]).status == ResourceError.status
    with pytest.raises(UserError, match="All 1 trials failed, the last one so: the loss is NaN") as failed:
        sweep(configure("--sweep.grid={lora.r: [4]}"))
    assert failed.value.status == 5

    monkeypatch.setattr(conduct, "finetune", leaves())
    sweep(configure("--sweep.grid={lora.r: [3, 4]}", "--sweep.retry_failed=true"))
    assert all(map(is_over, trials_of(config)))


def test_a_trial_that_another_process_runs_is_left_to_it(
    configure: Configure, no_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("--sweep.grid={lora.r: [2, 4]}")
    theirs, ours = trials_of(config)
    theirs.folder.parent.mkdir()
    slept = []

    def until_they_are_done(seconds: float) -> None:
        slept.append(is_over(ours))
        leaves()(theirs.config)

    monkeypatch.setattr(conduct, "finetune", leaves(r2=AssertionError("it is theirs")))
    monkeypatch.setattr(time, "sleep", until_they_are_done)
    with locked(theirs.folder.with_name(f".{theirs.name}.lock")) as lock:
        assert lock
        sweep(config)
    assert slept == [True]


def test_rungs_leave_one_trial() -> None:
    part = SweepConfig().sweep
    assert [shares(replace(part, halving=2), count) for count in (1, 3, 8)] == [[], [0.5], [0.125, 0.25, 0.5]]
    assert shares(replace(part, halving=3, rungs=(0.1, 0.4)), 5) == [0.1, 0.4]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_that_is_killed_ten_times_goes_on(
    configure: Configure, flags: list[str], tmp_path: Path, no_pages: None
) -> None:
    more = ["--sweep.grid={lora.r: [2, 4, 6]}", "--sweep.halving=2", "--train.save_every=1"]
    whole, killed = configure(*more, f"--out_dir={tmp_path / 'whole'}"), configure(*more)
    sweep(whole)
    said, deaths = tmp_path / "said", 0
    while deaths < 10:
        before = at_save(1 + deaths % 4, signals(signal.SIGKILL))
        status = Child([*flags, *more], said, before, "finetune/sweep.py").wait()
        assert status in (-signal.SIGKILL, 0), said.read_text()
        if status == 0:
            break
        deaths += 1
    assert deaths >= 4
    assert Child([*flags, *more], said, script="finetune/sweep.py").wait() == 0, said.read_text()
    for trial, same in zip(trials_of(whole), trials_of(killed), strict=True):
        assert is_over(trial) == is_over(same)
        if is_over(trial):
            assert ending(trial.folder) == ending(same.folder)


@pytest.mark.slow
def test_a_signal_ends_the_sweep_and_not_the_trial_alone(flags: list[str], tmp_path: Path) -> None:
    grid = "--sweep.grid={lora.r: [2, 4]}"
    child = Child([*flags, grid], tmp_path / "said", at_save(4, signals(signal.SIGTERM)), "finetune/sweep.py")
    assert child.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "out/trial-002/summary.json").exists()
