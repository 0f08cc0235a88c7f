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

from lit_qlora.data.of_run import read_of_run
from lit_qlora.errors import ResourceError, UsageError, UserError
from lit_qlora.files.atomic import writing
from lit_qlora.report import metrics, tell
from lit_qlora.run.finetune import MakeAsk, finetune
from lit_qlora.settings import AnySweep, PreferenceRunConfig, SweepPart, check
from lit_qlora.settings.preference import NO_OWN_LOSS
from lit_qlora.sweep.base import SharedBase, free_memory
from lit_qlora.sweep.more_data import forecast
from lit_qlora.sweep.pages import write_results
from lit_qlora.sweep.results import read_results
from lit_qlora.sweep.state import is_over, metric_of, read_state, records_of, value_at, write_state
from lit_qlora.sweep.study import choose_draws, read_draws, write_draws
from lit_qlora.sweep.trials import Changes, Trial, config_of, describe, key_of, plan_trials, write_names
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
        for trial in plan_trials(with_first_draws(config), out_dir):
            tell(f"\n{trial.name}   {describe(trial.changes)}")
            finetune(trial.config, make_ask)
        return out_dir
    metric = metric_of(config)
    run_all = search if config.sweep.search == "optuna" else run_rungs
    trials = run_all(config, out_dir, SharedBase(), make_ask)
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
        not isinstance(run, PreferenceRunConfig) or run.preference.published.paired,
        f"sweep.data_halvings compares losses sample by sample. {NO_OWN_LOSS}",
    )
    count = len(read_of_run(run).train)
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


def run_rungs(config: AnySweep, out_dir: Path, base: SharedBase, make_ask: MakeAsk | None) -> list[Trial]:
    """Run the trials whose settings stand from the start, as far as halving lets them."""
    trials = prepare(config, out_dir)
    for share, some in rungs(config.sweep, trials, metric_of(config)):
        run_until(share, some, base, make_ask)
    return trials


def search(config: AnySweep, out_dir: Path, base: SharedBase, make_ask: MakeAsk | None) -> list[Trial]:
    """Run the draws that Optuna chooses, one choice after the other.

    Raises:
        UsageError: see draws_from and value_of.
    """
    told: list[tuple[Changes, float]] = []
    trials: dict[str, Trial] = {}
    while len(told) < config.sweep.draws:
        drawn = draws_from(len(told), config, out_dir, told)
        tell(f"\nsearch  {len(told) + len(drawn)} of {config.sweep.draws} draws are chosen")
        own = trials_of(drawn, 1 + len(told), config, out_dir)
        config = replace(config, sweep=replace(config.sweep, retry_failed=False))
        run_until(1.0, list(own.values()), base, make_ask)
        trials = own | trials
        told += [(changes, value_of(changes, list(trials.values()), metric_of(config))) for changes in drawn]
    return list(trials.values())


def draws_from(number: int, config: AnySweep, out_dir: Path, told: Sequence[tuple[Changes, float]]) -> list[Changes]:
    """Return the draws that were chosen after the first `number` ones, or else choose and note some.

    Raises:
        UsageError: if no trial could have the settings of the first draw of all.
    """
    part = config.sweep
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir / ".lock", wait=True):
            draws = read_draws(out_dir, part)
            if len(draws) <= number:
                begin = number - number % part.draws_at_once  # fewer draws may have cut the last choice short
                draws = draws + choose_draws(part, told[:begin], part.draws_at_once)[number - begin :]
                config_of(config.run, draws[0], out_dir)  # or a wrong name would be in a study that is kept
                write_draws(out_dir, part, draws[: part.draws])
    return draws[number : part.draws]


def trials_of(draws: Sequence[Changes], first: int, config: AnySweep, out_dir: Path) -> dict[str, Trial]:
    """Plan the trials of draws; the variant of each is its number. One that no trial can have is left out, and said.

    Raises:
        UsageError: if it is the first of all draws, where the fault is not its own.
    """
    trials: dict[str, Trial] = {}
    for number, changes in enumerate(draws, start=first):
        try:
            own = prepare(with_draws(config, {str(number): dict(changes)}), out_dir)
        except UsageError as error:
            if number == 1:
                raise
            tell(f"failed  draw {number}: {error}")
        else:
            trials = {trial.name: trial for trial in own} | trials
    return trials


def with_first_draws(config: AnySweep) -> AnySweep:
    """Turn a search into its first draws, which need no results; any other sweep stays as it is."""
    part = config.sweep
    if part.search == "random":
        return config
    draws = choose_draws(part, [], part.draws_at_once)[: part.draws]
    return with_draws(config, {str(number): dict(changes) for number, changes in enumerate(draws, start=1)})


def with_draws(config: AnySweep, draws: dict[str, dict[str, Any]]) -> AnySweep:
    """Turn a search into a sweep over these draws as its variants."""
    part = replace(config.sweep, random={}, draws=0, search="random", draws_at_once=1, variants=draws)
    return replace(config, sweep=part)


def value_of(changes: Changes, trials: Sequence[Trial], metric: str) -> float:
    """Read the metric that a draw came to, the smaller the better: the mean over seeds, infinite if one failed.

    Raises:
        UsageError: if a whole run does not have the metric.
    """
    # By their texts: the lists of a draw are tuples in a trial.
    own = [trial for trial in trials if key_of({**trial.changes, **changes}) == key_of(trial.changes)]
    for trial in own:
        found = metrics(records_of(trial))
        check(
            not is_over(trial) or metric in found,
            f"The runs have no metric {metric} to search by, only {', '.join(found) or 'none'}. "
            "Name one in sweep.metric, or let eval.every validate.",
        )
    return sum(value_at(trial, 1.0, metric) for trial in own) / len(own) if own else math.inf


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
