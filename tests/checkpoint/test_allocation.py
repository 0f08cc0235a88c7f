"""An allocation is the best of all that fit."""

import itertools
import random

import pytest

from lit_qlora.checkpoint.allocation import Choice, allocate


def cost(groups: list[list[Choice]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(group[number].cost for group, number in zip(groups, chosen, strict=True))


def fits(groups: list[list[Choice]], chosen: tuple[int, ...] | list[int], room: int) -> bool:
    return sum(group[number].size for group, number in zip(groups, chosen, strict=True)) <= room


@pytest.mark.parametrize("seed", range(40))
def test_no_allocation_that_fits_costs_less(seed: int) -> None:
    drawn = random.Random(seed)
    costs = (drawn.random, lambda: float(drawn.randint(0, 3)))  # equal ones too
    groups = [
        [Choice(drawn.randint(0, 30), drawn.choice(costs)()) for _ in range(drawn.randint(1, 4))]
        for _ in range(drawn.randint(0, 5))
    ]
    room = drawn.randint(0, 100)
    every = itertools.product(*(range(len(group)) for group in groups))
    possible = [cost(groups, chosen) for chosen in every if fits(groups, chosen, room)]
    chosen = allocate(groups, room)
    assert (chosen is None) == (not possible)
    if chosen is not None:
        assert fits(groups, chosen, room)
        assert cost(groups, chosen) == pytest.approx(min(possible), rel=1e-12)
