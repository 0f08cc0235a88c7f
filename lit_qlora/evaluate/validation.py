"""When a run is validated, which step was the best, and when it is no use to go on."""

import time
from collections.abc import Callable, Sequence

from lit_qlora.errors import UsageError
from lit_qlora.evaluate.measures import Measure
from lit_qlora.evaluate.validation_inputs import NEEDS
from lit_qlora.report import Record, smaller_is_better
from lit_qlora.settings import EvalConfig
from lit_qlora.train.signals import StopRequest


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
        measures: each gives figures for the record of a validation.
        log: gets a record for each validation.
        keep: is called with the step of a validation that was the best so far.
    """

    def __init__(
        self,
        config: EvalConfig,
        every: int,
        total: int,
        measures: Sequence[Measure],
        log: Callable[[Record], None],
        keep: Callable[[int], None],
        stop: StopRequest,
    ) -> None:
        self.config, self.every, self.total = config, every, total
        self.measures, self.log, self.keep, self.stop = measures, log, keep, stop
        self.best: tuple[float, int] | None = None  # (figure, step)
        self.worse = 0
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time after `step` steps."""
        by_clock = self.config.minutes and time.monotonic() - self.last >= 60 * self.config.minutes
        return bool(self.measures) and (
            is_due(step, self.every, self.total, self.config.before_training) or bool(by_clock)
        )

    def catch_up(self, records: Sequence[Record], start: int) -> bool:
        """Take the records of a run that goes on into account, and validate where that was due and not done.

        Returns:
            False if the run should end.
        """
        for record in records:
            if "loss" not in record:
                self.see(record)
        if self.due(start) and not any(record["step"] == start and "loss" not in record for record in records):
            return self(start)
        if start and self.best and self.best[1] == start:
            self.keep(start)  # the run may have been killed before it did, or go on elsewhere
        return self.go_on

    @property
    def go_on(self) -> bool:
        """Whether the run should go on, as far as validations tell."""
        return not self.config.patience or self.worse < self.config.patience

    def __call__(self, step: int) -> bool:
        """Validate; False if the run should end because it no longer gets better. A signal cuts it short."""
        record: Record = {"step": step}
        for measure in self.measures:
            record |= measure(step)
            if self.stop.signal:
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
            figures = ", ".join(key for key in record if key != "step")
            if name in NEEDS or self.best is not None or "/" not in figures:
                return False  # there is nothing to validate on, the measure failed, or no task was asked
            raise UsageError(f"eval.best {name!r} is not a figure of the validations. They have {figures}.")
        figure = record[name] if smaller_is_better(name) else -record[name]
        if self.best is None or figure < self.best[0]:
            self.best, self.worse = (figure, record["step"]), 0
            return True
        self.worse += 1
        return False
