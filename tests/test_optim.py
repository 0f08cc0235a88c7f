"""Learning rates are pure functions of the step and right at their ends."""

from itertools import pairwise

import pytest

from lit_qlora.optim import learning_rate
from lit_qlora.settings import TrainConfig


def rates(total: int, **settings: object) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10, 25, 0.2])
def test_no_step_is_wasted_and_none_exceeds_the_peak(schedule: str, warmup: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(10, schedule=schedule, warmup=warmup))


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    assert rates(10, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warm_up_can_be_a_share_of_the_run() -> None:
    assert rates(10, warmup=0.2) == rates(10, warmup=2)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(10, warmup=0)[0] == 1


def test_after_the_warm_up_it_never_rises() -> None:
    for schedule in ("constant", "linear", "cosine"):
        after = rates(50, warmup=5, schedule=schedule)[4:]
        assert all(a >= b for a, b in pairwise(after))


def test_cosine_is_at_half_the_peak_half_way() -> None:
    assert rates(100, warmup=0, schedule="cosine")[50] == pytest.approx(0.5)
    assert rates(100, warmup=0, schedule="linear")[50] == pytest.approx(0.5)


def test_a_run_of_one_step_has_the_peak() -> None:
    assert rates(1, warmup=0.03) == [1]
