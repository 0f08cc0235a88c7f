"""The trials of a sweep: their settings, and the folders that they have in OUT."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.run.resume import as_rows, changed_settings, plain
from lit_qlora.settings import AnySweep, FinetuneConfig, SweepPart, check

TRIALS = "trials.json"
Changes = Mapping[str, Any]
"""Full name of a setting, such as lora.r -> the value that it has in a trial."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of a sweep."""

    name: str
    """Of its folder in OUT, such as trial-001."""
    variant: str
    """Name of its variant, or ''."""
    changes: Changes
    """The settings in which it differs from the sweep's."""
    config: FinetuneConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.config.out_dir is not None
        return self.config.out_dir

    @property
    def group(self) -> str:
        """A key that it shares with its repetitions with other seeds."""
        return key_of({name: value for name, value in self.changes.items() if name not in ("seed", "data.split_seed")})


def plan_trials(config: AnySweep, out_dir: Path) -> list[Trial]:
    """Work out the trials of a sweep, with the folders that they had in an earlier call.

    Raises:
        UsageError: if a trial's settings are wrong, or other ones than its folder was made with.
    """
    known = read_names(out_dir, config.run)
    trials: dict[str, Trial] = {}
    for variant, changes in combinations(config):
        key = key_of(changes)
        if key in trials:
            continue
        name = known.setdefault(key, f"trial-{1 + max(map(number_of, known.values()), default=0):03}")
        trials[key] = Trial(
            name=name, variant=variant, changes=changes, config=config_of(config.run, changes, out_dir / name)
        )
    check(bool(config.sweep.grid or config.sweep.variants or config.sweep.draws or config.sweep.seeds), NO_TRIALS)
    return list(trials.values())


NO_TRIALS = (
    "The sweep has no trials.\nGive it a part such as 'sweep: {grid: {lora.r: [8, 16]}}' in the --config file, or "
    "--sweep.grid '{lora.r: [8, 16]}'."
)


def combinations(config: AnySweep) -> Iterator[tuple[str, Changes]]:
    """Yield variant and settings of each trial: variants x grid x draws x seeds, the last one changing first."""
    sweep = config.sweep
    assert isinstance(sweep.seeds, tuple)
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    drawn = [draw(sweep, number) for number in range(sweep.draws)] or [{}]
    split = {} if config.data.split_seed is not None else {"data.split_seed": base_seed(config)}
    seeds = [{"seed": seed, **split} for seed in sweep.seeds] or [{}]
    for (variant, own), *parts in product(sweep.named_variants.items(), grid, drawn, seeds):
        changes: dict[str, Any] = dict(own)
        for part in parts:
            changes |= part
        yield variant, changes


def base_seed(config: FinetuneConfig) -> int:
    """The seed that the split of the data has without repetitions."""
    seed = config.seed if config.data.seed is None else config.data.seed
    check(seed >= 0, "sweep.seeds repeats trials on one split of the data, so --seed must be a number, not -1.")
    return seed


def draw(sweep: SweepPart, number: int) -> dict[str, Any]:
    """Draw the settings of sweep.random; the same for the same number, however many draws there are."""
    return {
        name: draw_one(name, space, random.Random(f"{sweep.draw_seed}/{number}/{name}"))
        for name, space in sweep.random.items()
    }


def draw_one(name: str, space: Any, generator: random.Random) -> Any:
    """Draw a value from a list or a range.

    Raises:
        UsageError: if `space` is neither.
    """
    if isinstance(space, list | tuple) and space:
        return generator.choice(space)
    kind, low, high = range_of(name, space)
    if kind == "integer":
        return generator.randint(int(low), int(high))
    if kind == "log":
        return rounded(math.exp(generator.uniform(math.log(low), math.log(high))))
    return rounded(generator.uniform(low, high))


def range_of(name: str, space: Any) -> tuple[str, float, float]:
    """Return kind and ends of a range such as {log: [1e-5, 1e-3]}.

    Raises:
        UsageError: if `space` is none.
    """
    if isinstance(space, Mapping) and len(space) == 1:
        ((kind, ends),) = space.items()
        if isinstance(ends, list | tuple) and len(ends) == 2 and all(type(end) in (int, float) for end in ends):
            low, high = ends
            known = kind in ("uniform", "log", "integer")
            if known and -math.inf < low < high < math.inf and (kind != "log" or low > 0):
                whole = kind != "integer" or (low == int(low) and high == int(high))
                check(whole, f"sweep.random.{name}: the ends of {{integer: [LOW, HIGH]}} must be whole, got {space!r}.")
                return kind, low, high
    raise UsageError(
        f"sweep.random.{name} must be a list of values, or one of {{uniform: [LOW, HIGH]}}, {{log: [LOW, HIGH]}}, "
        f"{{integer: [LOW, HIGH]}} with LOW < HIGH, got {space!r}."
    )


def rounded(value: float) -> float:
    """Round to four digits, which a command line can hold."""
    return float(f"{value:.4g}")


def config_of(run: FinetuneConfig, changes: Changes, folder: Path) -> FinetuneConfig:
    """Return the settings of a trial, read as a run reads a --config file.

    Raises:
        UsageError: if a setting is unknown or its value wrong.
    """
    for name in changes:
        section, _, rest = name.partition(".")
        own = getattr(run, section, None)
        check(not is_dataclass(own) or bool(rest), f"sweep: {name} is a section. Name its settings, such as lora.r.")
        check(is_dataclass(own) or not rest or not hasattr(run, section), f"sweep: {name} is not a setting.")
    try:
        config = cli.parse(type(run), ["--config", cli.to_yaml(replace(run, out_dir=folder), changes)])
    except UsageError as error:
        raise UsageError(f"sweep, trial with {describe(changes)}: {error}") from None
    return replace(config, allow_code=run.allow_code)


def flag_value(value: Any) -> str:
    """Write the value of a setting about as on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def describe(changes: Changes) -> str:
    """Write settings in a line."""
    return "  ".join(f"{name} {flag_value(value)}" for name, value in changes.items()) or "no changes"


def key_of(changes: Any) -> str:
    """Write settings so that the same ones give the same text, in whatever order."""
    return json.dumps(changes, sort_keys=True)


def number_of(name: str) -> int:
    """The number in the name of a trial; 0 for any other text."""
    digits = name.removeprefix("trial-")
    return int(digits) if digits.isdecimal() else 0


def read_names(out_dir: Path, run: FinetuneConfig) -> dict[str, str]:
    """Read the names of the trials of earlier calls: key_of their settings -> name.

    Args:
        run: the settings that all trials have.

    Raises:
        UsageError: if the file is damaged, or the earlier trials had other common settings.
    """
    path = out_dir / TRIALS
    facts = read_json(path, UsageError) if path.is_file() else {}
    names, then = facts.get("trials", {}), facts.get("settings", {})
    whole = isinstance(names, dict) and isinstance(then, dict) and all(map(number_of, names))
    check(whole, f"{path} is damaged. Take another --out_dir.")
    if changed := changed_settings(then, plain(run)):
        raise UsageError(
            f"The trials in {out_dir} began with other settings:\n{as_rows(changed)}\nTake another --out_dir. A sweep "
            "may get other trials, but not other settings for all of them."
        )
    return {key_of(changes): name for name, changes in names.items()}


def write_names(out_dir: Path, run: FinetuneConfig, trials: Sequence[Trial]) -> None:
    """Write the names of these trials, and of those of earlier calls."""
    names = {name: json.loads(key) for key, name in read_names(out_dir, run).items()}
    names |= {trial.name: dict(trial.changes) for trial in trials}
    facts = {"settings": plain(run), "trials": dict(sorted(names.items()))}
    write_text(out_dir / TRIALS, json.dumps(facts, indent=1) + "\n")
