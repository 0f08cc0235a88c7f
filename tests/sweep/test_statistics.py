"""Intervals are those of the textbooks."""

import random

import pytest
from scipy import stats

from lit_qlora.sweep.statistics import Interval, difference, mean, quantile


@pytest.mark.parametrize("degrees", [*range(1, 16), 16, 40, 99, 100, 10_000])
def test_quantiles_are_students_or_a_little_larger(degrees: int) -> None:
    exact = stats.t.ppf(0.975, degrees)
    assert exact - 1e-3 < quantile(degrees) < exact + (1e-3 if degrees < 16 else 0.16)


def test_an_interval_of_repetitions_is_students() -> None:
    values = [1.0, 1.3, 0.8]
    low, high = stats.t.interval(0.95, 2, 3.1 / 3, stats.sem(values))
    assert mean(values).half == pytest.approx((high - low) / 2, rel=1e-3)
    assert mean([2.0]) == Interval(2.0, None)


def test_a_difference_is_that_of_a_paired_test_where_samples_are_equally_long() -> None:
    generator = random.Random(0)
    hard = [generator.uniform(5, 50) for _ in range(12)]  # far more spread than the two differ by
    mine, theirs = ([loss + generator.gauss(shift, 1) for loss in hard] for shift in (2, 0))
    expected = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    found = difference([mine], [theirs], [10] * 12)
    assert found.value == pytest.approx((expected.low + expected.high) / 20)
    assert found.half == pytest.approx((expected.high - expected.low) / 20, rel=1e-3)
    assert found.differs_from_zero


def test_long_samples_count_as_their_tokens_do() -> None:
    assert difference([[2.0, 30.0]], [[1.0, 10.0]], [1, 9]).value == pytest.approx(21 / 10)


def test_repetitions_that_disagree_widen_the_interval() -> None:
    losses = [float(n) for n in range(20)]
    shifted = [[loss + 1 for loss in losses], [loss - 0.5 for loss in losses]]
    assert difference([losses], [[loss + 1 for loss in losses]], [1] * 20).half == pytest.approx(0)
    assert not difference(shifted, [losses], [1] * 20).differs_from_zero
