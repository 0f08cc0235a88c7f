"""Settings of a sweep: many runs that differ in a few settings."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from lit_qlora.errors import UserError
from lit_qlora.files.reading import read_yaml_text
from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import CountOrZero, Seed, above, at_least, below
from lit_qlora.settings.preference import PreferenceRunConfig
from lit_qlora.settings.run import FinetuneConfig

RungShare = Annotated[float, above(0), below(1)]
Scalar = str | bool | int | float | None
Value = Scalar | tuple[Scalar, ...] | dict[str, Scalar]
"""A value of any setting; jsonargparse would read a text again, as YAML, if it were Any."""
OF_PREFERENCES = re.compile(r"^preference:|preference\.\w", re.MULTILINE)
"""The settings of finetune/preference.py in a --config file."""
OF_ALL = ("resume", "extend", "devices", "num_nodes", "strategy", "sequence_parallel", "collective_timeout")
"""Settings of a run that a sweep decides by itself."""


@dataclass(frozen=True, kw_only=True)
class SweepPart(Settings):
    """The trials of a sweep. Each variant meets each point of the grid, each random draw and each seed."""

    prefix = "sweep."

    grid: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Settings and the values that each takes, e.g. {lora.r: [8, 16], lora.targets: [all, [query, value]]}."""
    variants: dict[str, dict[str, Value]] | tuple[dict[str, Value], ...] = field(default_factory=dict)
    """Named sets of settings, e.g. {default: {}, sgd: {optimizer.name: sgd, train.learning_rate: 0.1}}; a list numbers
    them."""
    random: dict[str, tuple[Value, ...] | dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """Settings that are drawn, each from a list, or from {uniform: [LOW, HIGH]}, {log: [LOW, HIGH]} or
    {integer: [LOW, HIGH]}."""
    draws: CountOrZero = 0
    """Number of random draws. A larger number keeps the earlier ones."""
    draw_seed: Seed = 0
    """Seed of the random draws."""
    search: Literal["random", "optuna"] = "random"
    """How the draws are chosen: each by itself, or each by Optuna's TPE sampler from what the draws before came to.
    Optuna's first ten are random."""
    draws_at_once: Annotated[int, at_least(1)] = 1
    """Number of draws that Optuna chooses at once, e.g. that of the GPUs: trials of one choice can run beside each
    other, and do not learn of each other."""
    data_halvings: CountOrZero = 0
    """Train on all samples, on a half of them, on a half of that and so on, so many times: would more data help? The
    parts are nested. With two halvings or more, sweep.html fits a power law and says what twice the data would give."""
    seeds: tuple[Seed, ...] | Seed = ()
    """Seeds with which each trial is repeated, e.g. [1, 2, 3]. All of them validate on the same samples
    (data.split_seed). By default the run's seed alone."""
    halving: Annotated[int, at_least(2)] | None = None
    """At each rung, go on with one of N trials only, the best ones; the others are paused and can go on later. By
    default all run to their end."""
    rungs: tuple[RungShare, ...] | RungShare = ()
    """Shares of a run after which halving chooses, e.g. [0.25, 0.5]. By default 1/N, 1/N^2 and so on, until one trial
    is left."""
    metric: str | None = None
    """Metric of the validations by which trials are chosen and sorted. By default eval.best."""
    retry_failed: bool = False
    """Start failed trials of an earlier call again."""

    @property
    def named_variants(self) -> dict[str, dict[str, Value]]:
        """The variants by their names; one without settings if there are none."""
        if isinstance(self.variants, tuple):
            return {str(number): one for number, one in enumerate(self.variants, start=1)} or {"": {}}
        return self.variants or {"": {}}

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        assert isinstance(self.seeds, tuple)
        assert isinstance(self.rungs, tuple)
        for name, values in self.grid.items():
            check(bool(values), f"sweep.grid.{name} has no values.")
        check(
            bool(self.random) == bool(self.draws), "sweep.random says what is drawn, sweep.draws how often. Give both."
        )
        check(len(set(self.seeds)) == len(self.seeds), f"sweep.seeds must be different, got {list(self.seeds)}.")
        check(not self.rungs or self.halving is not None, "sweep.rungs has no effect without sweep.halving.")
        check(list(self.rungs) == sorted(set(self.rungs)), f"sweep.rungs must rise, got {list(self.rungs)}.")
        check(self.search == "random" or bool(self.draws), "sweep.search has no effect without sweep.draws.")
        check(
            self.search == "optuna" or self.draws_at_once == 1,
            "sweep.draws_at_once has no effect without sweep.search optuna.",
        )
        beside = [name for name in ("grid", "variants", "halving", "data_halvings") if getattr(self, name)]
        check(
            self.search == "random" or not beside,
            f"sweep.{(beside or [''])[0]} has no part in a search by Optuna, which learns from whole runs of "
            "sweep.random. Name settings there, with lists of their values, or leave out sweep.search.",
        )
        places: list[Collection[str]] = [self.grid, self.random, *self.named_variants.values()]
        halved = any("data.max_samples" in place for place in places)
        check(not (self.data_halvings and halved), "sweep.data_halvings chooses data.max_samples. Leave one out.")
        for number, place in enumerate(places):
            check("seed" not in place or not self.seeds, "sweep.seeds gives the seeds, so no other part may name seed.")
            twice = [name for name in place for other in places[:number][:2] if name in other]
            check(not twice, f"sweep: {(twice or [''])[0]} is named twice, so one of the values would have no effect.")
            own = [name for name in place if name in OF_ALL or name in NOT_SWEPT]
            check(not own, f"sweep: {(own or [''])[0]} is a setting of the whole sweep, not of a trial.")


NOT_SWEPT = ("out_dir", "config", "dry_run", "price_per_hour", "quiet", "allow_code", "skip_disk_check", "force")
"""Settings of a run that are the same in all trials, or their own."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(FinetuneConfig):
    """Fine-tune with many settings, one after the other, on a base that is read once, and compare them.

    Its settings are those of finetune/lora.py, and a part 'sweep'; where one of finetune/preference.py is named, those
    of that command. Stopped and started again, it goes on. Started again beside itself, on another GPU, it takes other
    trials.
    """

    out_dir: Path | None = None
    """Folder of the sweep: OUT/trial-001 and so on are run folders. By default out/sweep/<checkpoint name>."""
    sweep: SweepPart = field(default_factory=SweepPart)

    def __post_init__(self) -> None:
        """Check combinations of settings."""
        super().__post_init__()
        _check_of_all(self)

    @property
    def run(self) -> FinetuneConfig:
        """The settings that all trials have."""
        return FinetuneConfig(**{setting.name: getattr(self, setting.name) for setting in fields(FinetuneConfig)})


@dataclass(frozen=True, kw_only=True)
class PreferenceSweepConfig(PreferenceRunConfig):
    """Learn from preferences with many settings; its settings are those of finetune/preference.py, and a part 'sweep'.

    See SweepConfig.
    """

    out_dir: Path | None = None
    """Folder of the sweep, see SweepConfig."""
    sweep: SweepPart = field(default_factory=SweepPart)

    def __post_init__(self) -> None:
        """Check combinations of settings."""
        super().__post_init__()
        _check_of_all(self)

    @property
    def run(self) -> PreferenceRunConfig:
        """The settings that all trials have."""
        own = {setting.name: getattr(self, setting.name) for setting in fields(PreferenceRunConfig)}
        return PreferenceRunConfig(**own)


AnySweep = SweepConfig | PreferenceSweepConfig


def _check_of_all(config: AnySweep) -> None:
    default = {setting.name: setting.default for setting in fields(FinetuneConfig)}
    for name in OF_ALL:
        check(
            getattr(config, name) == default[name],
            f"{name} has no effect on a sweep: each trial is a run on one device, and goes on by itself.",
        )


def is_of_preferences(argv: Sequence[str]) -> bool:
    """Tell if these flags of a sweep, or a --config file that they name, have a setting of finetune/preference.py."""
    values = [value for flag, value in pairwise(argv) if flag == "--config"]
    values += [flag.partition("=")[2] for flag in argv if flag.startswith("--config=")]
    texts = map(_text_of, values)
    return any("preference." in flag for flag in argv) or any(OF_PREFERENCES.search(text) for text in texts)


def _text_of(path: str) -> str:
    """The text of a --config file; '' if it cannot be read, as the parser will say."""
    try:
        return read_yaml_text(Path(path))
    except (UserError, OSError):
        return ""
