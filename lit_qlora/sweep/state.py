"""The state of a trial: its run folder, and the notes of the sweep beside it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.report import Record, metrics, smaller_is_better
from lit_qlora.run.resume import LOG, SUMMARY, read_log
from lit_qlora.settings import AnySweep
from lit_qlora.sweep.trials import Trial

ALL = 2**62
"""More steps than a run has."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The notes of the sweep on a trial; what ended well is in its run folder alone."""

    reached: float = 0.0
    """Share of the run after which it was paused last."""
    total: int = 0
    """Optimizer steps of the run, if it was paused."""
    error: str = ""
    """Message of the error that ended it."""
    status: int = 0
    """Exit status that belongs to the error."""


def state_path(trial: Trial) -> Path:
    """The file of the notes."""
    return trial.folder.with_name(f"{trial.name}.json")


def read_state(trial: Trial) -> State:
    """Read the notes on a trial; damaged ones are none, for the run folder knows how far it is."""
    path = state_path(trial)
    try:
        values: Mapping[str, Any] = read_json(path) if path.is_file() else {}
        return State(
            reached=float(values.get("reached", 0.0)),
            total=int(values.get("total", 0)),
            error=str(values.get("error", "")),
            status=int(values.get("status", 0)),
        )
    except (CheckpointError, TypeError, ValueError):
        return State()


def write_state(trial: Trial, state: State) -> None:
    """Write the notes on a trial."""
    write_text(state_path(trial), json.dumps(asdict(state)) + "\n")


def is_over(trial: Trial) -> bool:
    """Tell if the run has come to its end."""
    return (trial.folder / SUMMARY).exists()


def records_of(trial: Trial) -> list[Record]:
    """Read the log of a trial."""
    return read_log(trial.folder / LOG, ALL)


def metric_of(config: AnySweep) -> str:
    """Name the metric by which the trials of a sweep are chosen and sorted."""
    own = "val_loss" if config.eval.best == "none" else config.eval.best
    return config.sweep.metric or own


def value_at(trial: Trial, share: float, metric: str) -> float:
    """Read the metric at the first validation from this share of the run on; the smaller the better, infinite if none.

    A trial that ended before has its last value.
    """
    state, records = read_state(trial), records_of(trial)
    if state.error and not is_over(trial):
        return math.inf
    total = state.total or max((record["step"] for record in records), default=0)
    values = metrics(records).get(metric, [])
    found = next((value for step, value in values if step >= share * total), values[-1][1] if values else math.inf)
    value = found if smaller_is_better(metric) else -found
    return value if math.isfinite(value) else math.inf
