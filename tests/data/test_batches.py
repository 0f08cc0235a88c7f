"""Batches: labels, padding, order, incomplete steps and several ranks."""

from itertools import chain

import pytest
import torch

from lit_qlora.data import Sample, collate, count_steps, steps, validation_batches
from lit_qlora.data.batches import PAD, order
from lit_qlora.model import IGNORE


def samples(count: int) -> list[Sample]:
    """`count` samples of various lengths, told apart by their first token."""
    return [Sample([100 + i, *range(1, 3 + i % 5)], prompt_length=1 + i % 2) for i in range(count)]


def firsts(batches: list) -> list[int]:
    """The first tokens of the rows that are learnt from."""
    rows = [(t, row) for batch in batches for t, row in zip(batch.tokens[:, 0].tolist(), batch.labels, strict=True)]
    return [token for token, row in rows if bool((row != IGNORE).any())]


def test_labels_follow_tokens() -> None:
    batch = collate([Sample([5, 6, 7, 8], prompt_length=2), Sample([9, 3], prompt_length=1)])
    assert batch.tokens.tolist() == [[5, 6, 7], [9, PAD, PAD]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8], [3, IGNORE, IGNORE]]


def test_padding_is_masked_by_place_never_by_id() -> None:
    batch = collate([Sample([5, PAD, PAD, PAD], prompt_length=1), Sample([9, PAD], prompt_length=1)])
    assert batch.labels.tolist() == [[PAD, PAD, PAD], [PAD, IGNORE, IGNORE]]


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    state = torch.get_rng_state()
    assert order(50, seed=3, epoch=1) == order(50, seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(order(50, seed, epoch)) for seed in (3, 1000) for epoch in range(3)}) == 6
    assert sorted(order(50, seed=3, epoch=1)) == list(range(50))


def test_each_epoch_sees_every_sample_once() -> None:
    taken = list(steps(samples(10), batch_size=4, micro_batch_size=2, total=6, seed=0))
    for epoch in (taken[:3], taken[3:]):
        assert sorted(chain(*(firsts(step.batches) for step in epoch))) == list(range(100, 110))
    assert firsts(taken[0].batches) != firsts(taken[3].batches)


def test_the_last_incomplete_step_of_an_epoch_is_smaller() -> None:
    taken = list(steps(samples(10), batch_size=4, micro_batch_size=3, total=4, seed=0))
    assert [step.samples for step in taken] == [4, 4, 2, 4]
    assert [[len(batch.tokens) for batch in step.batches] for step in taken] == [[3, 1], [3, 1], [2], [3, 1]]
    assert [step.epoch for step in taken] == [0.4, 0.8, 1.0, 1.4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_a_step_without_overlap_in_equally_many_micro_batches(world_size: int) -> None:
    ranks = [list(steps(samples(11), 6, 2, 4, 0, rank, world_size)) for rank in range(world_size)]
    for together in zip(*ranks, strict=True):
        seen = list(chain(*(firsts(step.batches) for step in together)))
        assert len(seen) == len(set(seen)) == together[0].samples
        assert len({len(step.batches) for step in together}) == 1
        assert len({step[1:] for step in together}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_counts_of_a_step_are_those_of_its_batches(world_size: int) -> None:
    data = samples(11)
    length = {sample.tokens[0]: len(sample.tokens) for sample in data}
    ranks = [list(steps(data, 6, 2, 4, 0, rank, world_size)) for rank in range(world_size)]
    for together in zip(*ranks, strict=True):
        batches = [batch for step in together for batch in step.batches]
        assert sum(int((batch.labels != IGNORE).sum()) for batch in batches) == together[0].labelled
        assert sum(length[first] for first in firsts(batches)) == together[0].tokens


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
@pytest.mark.parametrize("epochs", [0.1, 0.5, 1, 1.5, 2, 3])
def test_the_steps_that_are_counted_make_the_epochs_that_were_asked_for(
    count: int, batch_size: int, epochs: float
) -> None:
    total = count_steps(count, batch_size, epochs)
    taken = list(steps(samples(count), batch_size, 4, total, seed=0))
    assert len(taken) == total
    assert taken[-1].epoch >= epochs - 0.5 / count  # not a sample less than asked for, but for rounding
    assert total == 1 or taken[-2].epoch < epochs  # and not a step more than needed


def test_max_steps_shortens_a_run_and_never_lengthens_it() -> None:
    assert count_steps(10, 4, epochs=3, max_steps=5) == 5
    assert count_steps(10, 4, epochs=3, max_steps=500) == 9
    assert count_steps(1, 32, epochs=0.01) == 1


def test_validation_batches_hold_every_sample_once_sorted_by_length() -> None:
    batches = validation_batches(samples(11), micro_batch_size=4)
    assert sorted(firsts(batches)) == list(range(100, 111))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 3]
    widths = [batch.tokens.size(1) for batch in batches]
    assert widths == sorted(widths)
    assert validation_batches([], micro_batch_size=4) == []
