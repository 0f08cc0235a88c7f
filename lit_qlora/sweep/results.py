"""The results of a sweep: a row for each setting, best first, compared with the best."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from shlex import quote
from statistics import fmean
from typing import Any

from lit_qlora.commands import spell
from lit_qlora.errors import CheckpointError
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.files.reading import read_json
from lit_qlora.report import Record, duration, metrics, short, smaller_is_better
from lit_qlora.run.resume import SUMMARY, flat, plain
from lit_qlora.settings import PreferenceRunConfig
from lit_qlora.sweep.state import is_over, read_state, records_of
from lit_qlora.sweep.statistics import Interval, difference, mean
from lit_qlora.sweep.trials import Trial, flag_value

HIDDEN = ("val_ppl", "val_accuracy")
"""Metrics that say the same as val_loss, or nearly; sweep.json has them."""
OF_SEEDS = ("seed", "data.split_seed")
ALONE = ("expect_trainable",)
"""Settings that change nothing that is learnt, and have no column."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a trial."""

    trial: Trial
    status: str
    """done, paused, failed or waiting."""
    records: Sequence[Record]
    step: int
    total: int
    """Steps of the run; 0 if they are not known."""
    trainable: int | None
    peak_gib: float | None
    seconds: float | None
    values: dict[str, float]
    """The last value of each metric."""
    losses: SampleLosses | None
    error: str

    @property
    def last_losses(self) -> tuple[float, ...] | None:
        """The losses of the validation samples at the last validation, if it is that of the last step."""
        return self.losses.losses.get(self.step) if self.losses else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting with its repetitions."""

    results: Sequence[Result]
    values: dict[str, Interval]
    """Metric -> mean over the repetitions."""
    against_best: Interval | None = None
    """By how much its validation loss exceeds that of the best row, if both have losses of the same samples."""

    @property
    def first(self) -> Result:
        """Its first repetition."""
        return self.results[0]

    @property
    def status(self) -> str:
        """The status that its repetitions share, or all of theirs."""
        return ", ".join(dict.fromkeys(result.status for result in self.results))

    @property
    def name(self) -> str:
        """The names of its trials."""
        numbers = [result.trial.name.removeprefix("trial-") for result in self.results]
        return f"trial-{numbers[0]}" + "".join(f", {number}" for number in numbers[1:])


@dataclass(frozen=True, kw_only=True)
class Results:
    """The rows of a sweep, best first."""

    title: str
    metric: str
    """By which rows are sorted."""
    rows: Sequence[Row]
    settings: Sequence[str]
    """The settings in which the rows differ."""
    metrics: Sequence[str]
    """The metrics that are shown."""

    def setting(self, row: Row, name: str) -> Any:
        """The value that a setting has in a row."""
        values = flat(plain(row.first.trial.config))
        return row.first.trial.changes.get(name, values.get(name))

    def header(self) -> list[str]:
        """Names of the columns."""
        compared = ["against best"] if any(row.against_best for row in self.rows) else []
        named = ["variant"] if any(row.first.trial.variant for row in self.rows) else []
        return ["trial", *named, *self.settings, *self.metrics, *compared, "trainable", "peak GiB", "time", "status"]

    def cells(self, row: Row) -> list[str]:
        """Texts of a row."""
        first = row.first
        compared = [difference_text(row.against_best)] if "against best" in self.header() else []
        named = [first.trial.variant] if "variant" in self.header() else []
        peaks = [result.peak_gib for result in row.results if result.peak_gib is not None]
        times = [result.seconds for result in row.results if result.seconds is not None]
        return [
            row.name,
            *named,
            *(flag_value(self.setting(row, name)).replace("[]", "none") for name in self.settings),
            *(interval_text(row.values[name]) if name in row.values else "" for name in self.metrics),
            *compared,
            "" if first.trainable is None else f"{first.trainable:,}",
            f"{max(peaks):.2f}" if peaks else "",
            duration(fmean(times)) if times else "",
            status_text(row),
        ]

    def table(self) -> str:
        """A table for the terminal."""
        lines = [self.header(), *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def facts(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return {
            "metric": self.metric,
            "rows": [
                {
                    "trials": [result.trial.name for result in row.results],
                    "variant": row.first.trial.variant,
                    "settings": {
                        name: value for name, value in row.first.trial.changes.items() if name not in OF_SEEDS
                    },
                    "status": row.status,
                    "metrics": {name: asdict(value) for name, value in row.values.items()},
                    "against_best": asdict(row.against_best) if row.against_best else None,
                    "runs": [run_facts(result) for result in row.results],
                }
                for row in self.rows
            ],
        }


def read_results(trials: Sequence[Trial], metric: str) -> Results:
    """Read the results of these trials, and compare them."""
    groups: dict[str, list[Result]] = {}
    for trial in trials:
        groups.setdefault(trial.group, []).append(read_result(trial))
    rows = sorted(map(row_of, groups.values()), key=lambda row: rank(row, metric))
    names = {name: None for trial in trials for name in trial.changes if name not in (*OF_SEEDS, *ALONE)}
    shown = list(dict.fromkeys([metric, "val_loss", *(name for row in rows for name in row.values)]))
    results = Results(
        title=f"Sweep on {trials[0].config.checkpoint_dir.name}",
        metric=metric,
        rows=[compared(row, rows[0]) for row in rows],
        settings=[],
        metrics=[
            name for name in shown if (name not in HIDDEN or name == metric) and any(name in r.values for r in rows)
        ],
    )
    differing = [name for name in names if len({flag_value(results.setting(row, name)) for row in rows}) > 1]
    return Results(title=results.title, metric=metric, rows=results.rows, settings=differing, metrics=results.metrics)


def read_result(trial: Trial) -> Result:
    """Read what a trial has left."""
    state, records, over = read_state(trial), records_of(trial), is_over(trial)
    summary = read_summary(trial)
    steps = [record for record in records if "loss" in record]
    last = steps[-1] if steps else {}
    status = "done" if over else "failed" if state.error else "paused" if state.reached else "waiting"
    return Result(
        trial=trial,
        status=status,
        records=records,
        step=records[-1]["step"] if records else 0,
        total=last.get("step", 0) if over else state.total,
        trainable=summary.get("trainable_parameters"),
        peak_gib=last.get("peak_gib"),
        seconds=last.get("seconds"),
        values={name: values[-1][1] for name, values in metrics(records).items()},
        losses=SampleLosses.read(trial.folder),
        error="" if over else state.error,
    )


def read_summary(trial: Trial) -> dict[str, Any]:
    """Read summary.json of a trial; {} if it is absent or damaged."""
    path = trial.folder / SUMMARY
    try:
        values: dict[str, Any] = read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}
    return values


def row_of(results: Sequence[Result]) -> Row:
    """Join the repetitions of a setting."""
    names = dict.fromkeys(name for result in results for name in result.values)
    values = {name: mean([r.values[name] for r in results if name in r.values]) for name in names}
    return Row(results=results, values=values)


def rank(row: Row, metric: str) -> tuple[int, int, float]:
    """Sort rows: finished ones first, then paused ones by how far they came, then failed ones."""
    order = ("done", "paused", "waiting", "failed")
    worst = max(order.index(result.status) for result in row.results)
    value = row.values[metric].value if metric in row.values else math.inf
    value = value if smaller_is_better(metric) else -value
    paused = worst == order.index("paused")
    far = -min(result.step for result in row.results) if paused else 0
    return worst, far, value if math.isfinite(value) else math.inf


def compared(row: Row, best: Row) -> Row:
    """Add the difference to the best row, where both came to their end and validated on the same samples."""
    results = [*row.results, *best.results]
    losses = [result.last_losses for result in results]
    samples = {result.losses.samples if result.losses else None for result in results}
    if row is best or len(samples) > 1 or None in samples or None in losses or row.status != best.status:
        return row
    count = len(row.results)
    whole = [loss for loss in losses if loss is not None]
    assert best.first.losses is not None
    gap = difference(whole[:count], whole[count:], best.first.losses.labelled)
    return Row(results=row.results, values=row.values, against_best=gap)


def interval_text(interval: Interval) -> str:
    """Write a value with its interval."""
    if interval.half is None:
        return short(interval.value)
    return f"{short(interval.value)} ± {short(interval.half)}"


def difference_text(gap: Interval | None) -> str:
    """Write the difference to the best row; * marks one that noise does not explain."""
    if gap is None:
        return ""
    width = "" if gap.half is None else f" ± {gap.half:.4f}"
    return f"{gap.value:+.4f}{width}{' *' if gap.differs_from_zero else ''}"


def status_text(row: Row) -> str:
    """Write how far a row came, and why it failed."""
    first = row.first
    if "paused" in row.status:
        return f"{row.status} at {first.step} of {first.total}"
    errors = [result.error for result in row.results if result.error]
    return f"{row.status}: {errors[0].partition(chr(10))[0]}" if errors else row.status


def run_facts(result: Result) -> dict[str, Any]:
    """Collect a run for sweep.json."""
    return {
        "trial": result.trial.name,
        "seed": result.trial.config.seed,
        "status": result.status,
        "step": result.step,
        "trainable_parameters": result.trainable,
        "peak_gib": result.peak_gib,
        "seconds": result.seconds,
        "metrics": {name: value if math.isfinite(value) else None for name, value in result.values.items()},
        "error": result.error or None,
        **commands(result),
    }


def commands(result: Result) -> dict[str, str]:
    """Write the commands that repeat a trial elsewhere, and that lengthen it or go on with it."""
    trial = result.trial
    code = " --allow_code true" if trial.config.allow_code else ""
    script = "finetune/preference.py" if isinstance(trial.config, PreferenceRunConfig) else "finetune/lora.py"
    begin = f"{spell(script)} --config {quote(str(trial.folder / 'config.yaml'))}{code}"
    again = quote(f"{trial.folder}-again")
    config = trial.config.train
    longer = f"--train.epochs {2 * config.epochs:g}"
    if config.max_steps is not None:
        longer = f"--train.max_steps {2 * config.max_steps or 1}"
    found = {"reproduce": f"{begin} --out_dir {again}"}
    if result.status == "done":
        return {**found, "lengthen": f"{begin} --extend {longer}"}
    return {**found, "go_on": begin} if result.status == "paused" else found
