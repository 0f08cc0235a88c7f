"""The best validation, and validations without the metric."""

import pytest

from lit_qlora.errors import UsageError
from lit_qlora.evaluate.validation import Validator
from lit_qlora.report import Record
from lit_qlora.settings import EvalConfig


def see(best: str, *records: Record) -> Validator:
    config = EvalConfig(best=best, patience=2)
    validator = Validator(config, 1, 9, [], lambda record: None, lambda step: None, bool)
    for record in records:
        validator.see(record)
    return validator


def test_the_best_is_the_smallest_error_or_the_largest_of_other_metrics() -> None:
    records = [{"step": step, "val_loss": x, "chrf": x, "qa/acc": x} for step, x in enumerate((0.5, 0.9, 0.2, 0.6))]
    assert see("val_loss", *records).best == (0.2, 2)
    assert see("chrf", *records).best == see("qa/acc", *records).best == (-0.9, 1)
    assert see("val_loss", *records).go_on
    assert not see("chrf", *records).go_on


def test_validations_without_the_metric_do_not_count() -> None:
    """Tasks are not asked at every validation, may fail, or may be new in a resumed run."""
    without = {"step": 0, "val_loss": 2.0}
    validator = see("qa/acc", without, {"step": 1, "qa/acc": 0.5}, {**without, "step": 2}, {**without, "step": 3})
    assert validator.best == (-0.5, 1)
    assert validator.go_on
    assert see("chrf", without, without, without).best is None


def test_a_metric_that_the_tasks_do_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"eval.best 'qa/f1' is not a metric of the validations. They have qa/acc"):
        see("qa/f1", {"step": 0, "qa/acc": 0.5})
