"""The course of a sweep: which trial runs when and until when, in one process or in several beside each other."""

import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lit_qlora.data import read_data
from lit_qlora.data.prepared import choose_data
from lit_qlora.errors import ResourceError, UserError
from lit_qlora.files.atomic import writing
from lit_qlora.report import tell
from lit_qlora.run.finetune import MakeAsk, finetune
from lit_qlora.settings import AnySweep, PreferenceRunConfig, SweepPart, check
from lit_qlora.sweep.base import SharedBase, free_memory
from lit_qlora.sweep.more_data import forecast
from lit_qlora.sweep.pages import write_results
from lit_qlora.sweep.results import read_results
from lit_qlora.sweep.state import is_over, metric_of, read_state, value_at, write_state
from lit_qlora.sweep.trials import Trial, describe, plan_trials, write_names
from lit_qlora.train.loop import Paused, Stopped

POLL = 0.5
"""Seconds between looks at the trials that another process runs."""


def sweep(config: AnySweep, make_ask: MakeAsk | None = None) -> Path:
    """Run the trials of a sweep and compare them.

    Args:
        make_ask: see finetune.

    Returns:
        OUT, the folder of the sweep.

    Raises:
        UserError: for settings that no trial can have; the last trial's if all failed.
    """
    out_dir = config.out_dir or default_out_dir(config.checkpoint_dir)
    config = with_halves(config)
    if config.dry_run:
        for trial in plan_trials(config, out_dir):
            tell(f"\n{trial.name}   {describe(trial.changes)}")
            finetune(trial.config, make_ask)
        return out_dir
    trials, base = prepare(config, out_dir), SharedBase()
    metric = metric_of(config)
    for share, some in rungs(config.sweep, trials, metric):
        run_until(share, some, base, make_ask)
    results = read_results(trials, metric)
    write_results(results, out_dir)
    found = forecast(results)
    answer = f"\n\n{found.describe()}" if found else ""
    tell(f"\n{results.table()}{answer}\n\nsweep   {out_dir}/sweep.html   sweep.md and sweep.json beside it")
    check_success(trials)
    return out_dir


def with_halves(config: AnySweep) -> AnySweep:
    """Turn sweep.data_halvings into the numbers of samples that it stands for.

    Raises:
        UserError: if the data cannot be read.
        UsageError: if it is too little for so many halves.
    """
    halvings = config.sweep.data_halvings
    if not halvings:
        return config
    run = config.run
    check(
        not isinstance(run, PreferenceRunConfig) and run.head == "none",
        "sweep.data_halvings compares losses of tokens, sample by sample. Leave it out where something else is learnt.",
    )
    count = len(read_data(replace(run, data=choose_data(run.data, run.checkpoint_dir))).train)
    sizes = [count >> power for power in range(halvings, -1, -1)]
    check(sizes[0] > 0, f"sweep.data_halvings {halvings}: there are {count:,} training samples. Take fewer.")
    grid: dict[str, Any] = {**config.sweep.grid, "data.max_samples": tuple(sizes)}
    return replace(config, sweep=replace(config.sweep, grid=grid, data_halvings=0))


def default_out_dir(checkpoint_dir: Path) -> Path:
    """Return the default folder of a sweep over this checkpoint."""
    return Path("out/sweep") / checkpoint_dir.resolve().name


def prepare(config: AnySweep, out_dir: Path) -> list[Trial]:
    """Plan the trials, and write their names into OUT.

    Raises:
        ResourceError: if OUT cannot be written.
        UsageError: if the settings are wrong, or trials in OUT had other ones.
    """
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir / ".lock", wait=True):
            trials = plan_trials(config, out_dir)
            write_names(out_dir, config.run, trials)
    for trial in trials if config.sweep.retry_failed else ():
        if (state := read_state(trial)).error:
            write_state(trial, replace(state, error="", status=0))
    return trials


def rungs(part: SweepPart, trials: Sequence[Trial], metric: str) -> Iterator[tuple[float, list[Trial]]]:
    """Yield share of the runs and trials that are to reach it; ask for the next pair when they have.

    Repetitions with other seeds stay together; their mean counts.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.group, []).append(trial)
    alive = list(groups.values())
    for share in shares(part, len(alive)):
        yield share, [trial for group in alive for trial in group]
        scores = [sum(value_at(trial, share, metric) for trial in group) / len(group) for group in alive]
        order = sorted(range(len(alive)), key=lambda number: (scores[number], number))
        kept = sorted(order[: math.ceil(len(alive) / (part.halving or 1))])
        alive = [alive[number] for number in kept]
        tell(f"\nrung    after {share:.3g} of a run {len(alive)} of {len(scores)} go on")
    yield 1.0, [trial for group in alive for trial in group]


def shares(part: SweepPart, count: int) -> list[float]:
    """Work out the shares of a run after which `count` trials are halved."""
    assert isinstance(part.rungs, tuple)
    if part.halving is None or part.rungs:
        return list(part.rungs)
    number = 0
    while part.halving ** (number + 1) <= count:
        number += 1
    return [part.halving ** -float(power) for power in range(number, 0, -1)]


def run_until(share: float, trials: Sequence[Trial], base: SharedBase, make_ask: MakeAsk | None) -> None:
    """Let each trial reach this share of its run, and wait for trials that another process runs."""
    while waiting := [trial for trial in trials if not has_reached(trial, share)]:
        for trial in waiting:
            with locked(trial.folder.with_name(f".{trial.name}.lock")) as mine:
                if mine and not has_reached(trial, share):
                    number = 1 + trials.index(trial)
                    tell(f"\n{trial.name}   {number} of {len(trials)}   {describe(trial.changes)}")
                    run(trial, share, base, make_ask)
                    break
        else:
            time.sleep(POLL)


def has_reached(trial: Trial, share: float) -> bool:
    """Tell if nothing is left to do for a trial until this share of its run."""
    if is_over(trial):
        return True
    state = read_state(trial)
    return bool(state.error) or state.reached >= share


def run(trial: Trial, share: float, base: SharedBase, make_ask: MakeAsk | None) -> None:
    """Begin a trial or go on with it, until this share of its run; an error ends the trial alone.

    Raises:
        Stopped: if a signal ended it.
    """
    state = read_state(trial)
    try:
        finetune(trial.config, make_ask, base, None if share == 1 else share)
    except Stopped:
        tell("The same command goes on with the sweep.")
        raise
    except Paused as pause:
        write_state(trial, replace(state, reached=share, total=pause.total))
    except UserError as error:
        write_state(trial, replace(state, error=str(error), status=error.status))
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        write_state(trial, replace(state, error=f"Out of memory. {reason}", status=ResourceError.status))
    finally:
        torch.use_deterministic_algorithms(False)  # a setting of the trial
        free_memory()
    if failed := read_state(trial).error:
        tell(f"failed  {trial.name}: {failed}")


def check_success(trials: Sequence[Trial]) -> None:
    """Raise UserError with the status of the last trial if all have failed."""
    states = [read_state(trial) for trial in trials]
    if all(state.error and not is_over(trial) for trial, state in zip(trials, states, strict=True)):
        error = UserError(f"All {len(trials)} trials failed, the last one so: {states[-1].error}")
        error.status = states[-1].status
        raise error


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file inside; False if another process has it and `wait` is not set."""
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
