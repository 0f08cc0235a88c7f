"""The validations of a run: when they are due, the best step, and an early end."""

import time
from collections.abc import Callable, Sequence

from lit_qlora.errors import UsageError
from lit_qlora.evaluate.measures import Measure
from lit_qlora.evaluate.validation_inputs import NEEDS
from lit_qlora.report import Record, smaller_is_better
from lit_qlora.settings import EvalConfig


def is_due(step: int, every: int, total: int, before: bool = True) -> bool:
    """Tell if a run of `total` steps validates after `step` of them, whatever the clock says.

    Args:
        before: it does before the first step.
    """
    return (step > 0 or before) if step in (0, total) else step % every == 0


class Validator:
    """Validates before the first step (unless eval.before_training is false), every so often, and after the last.

    Args:
        every: optimizer steps between validations.
        measures: each returns metrics for the record of a validation.
        log: takes the record of each validation.
        keep: called with the step of a validation that is the best so far.
        stopped: true as soon as a signal has come to any process of the run; all of them ask it together.
    """

    def __init__(
        self,
        config: EvalConfig,
        every: int,
        total: int,
        measures: Sequence[Measure],
        log: Callable[[Record], None],
        keep: Callable[[int], None],
        stopped: Callable[[], object],
    ) -> None:
        self.config, self.every, self.total = config, every, total
        self.measures, self.log, self.keep, self.stopped = measures, log, keep, stopped
        self.best: tuple[float, int] | None = None  # (value, negative if larger is better; step)
        self.worse = 0
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """See train.loop.Validation."""
        by_clock = self.config.minutes and time.monotonic() - self.last >= 60 * self.config.minutes
        return bool(self.measures) and (
            is_due(step, self.every, self.total, self.config.before_training) or bool(by_clock)
        )

    def catch_up(self, records: Sequence[Record], start: int) -> bool:
        """Take the records of an earlier process into account, and validate if that is due and was not done.

        Returns:
            False if the run should end.
        """
        for record in records:
            if "loss" not in record:
                self.see(record)
        if self.due(start) and not any(record["step"] == start and "loss" not in record for record in records):
            return self(start)
        if start and self.best and self.best[1] == start:
            self.keep(start)  # the run may have been killed before this, or resume in another folder
        return self.go_on

    @property
    def go_on(self) -> bool:
        """False if the best validation is more than eval.patience validations ago."""
        return not self.config.patience or self.worse < self.config.patience

    def __call__(self, step: int) -> bool:
        """Validate; False if the run should end because it no longer improves. A signal cuts it short."""
        record: Record = {"step": step}
        for measure in self.measures:
            record |= measure(step)
            if self.stopped():
                return True
        self.log(record)
        self.last = time.monotonic()
        if self.see(record) and step:
            self.keep(step)
        return self.go_on

    def see(self, record: Record) -> bool:
        """Take the record of a validation into account; True if it is the best so far."""
        name = self.config.best
        if name == "none":
            return False
        if name not in record:
            metrics = ", ".join(key for key in record if key != "step")
            if name in NEEDS or self.best is not None or "/" not in metrics:
                return False  # there are no validation samples, the measure failed, or no task was due
            raise UsageError(f"eval.best {name!r} is not a metric of the validations. They have {metrics}.")
        value = record[name] if smaller_is_better(name) else -record[name]
        if self.best is None or value < self.best[0]:
            self.best, self.worse = (value, record["step"]), 0
            return True
        self.worse += 1
        return False
