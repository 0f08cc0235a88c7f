"""Batches: labels, padding, order, incomplete steps and several ranks."""

import random
from itertools import chain
from statistics import fmean

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_qlora.data import Batching, Sample, Samples, collate, count_steps, longest_step, steps, validation_batches
from lit_qlora.data.batches import PAD, cut_length, dealt, epoch_order, mean_tokens, order, steps_of_an_epoch
from lit_qlora.model.gpt import IGNORE
from tests.conftest import tiny_model


def samples(count: int) -> Samples:
    """`count` samples of various lengths, told apart by their first token."""
    return Samples.of(Sample.of([100 + i, *range(1, 3 + i % 5)], prompt_length=1 + i % 2) for i in range(count))


def batching(batch_size: int, micro_batch_size: int = 2, seed: int = 0, **others: object) -> Batching:
    return Batching(batch_size=batch_size, micro_batch_size=micro_batch_size, seed=seed, **others)  # type: ignore[arg-type]


def firsts(batches: list) -> list[int]:
    """The first tokens of the samples that are trained on."""
    found = []
    for batch in batches:
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels, strict=True):
            if bool((labels != IGNORE).any()):
                found += [token for token in tokens if token >= 100]
    return found


def test_labels_follow_tokens() -> None:
    batch = collate([[Sample.of([5, 6, 7, 8], prompt_length=2)], [Sample.of([9, 3], prompt_length=1)]])
    assert batch.tokens.tolist() == [[5, 6, 7], [9, PAD, PAD]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8], [3, IGNORE, IGNORE]]
    assert (batch.weights, batch.positions, batch.segments) == (None, None, None)


def test_padding_is_masked_by_place_never_by_id() -> None:
    batch = collate([[Sample.of([5, PAD, PAD, PAD], prompt_length=1)], [Sample.of([9, PAD], prompt_length=1)]])
    assert batch.labels.tolist() == [[PAD, PAD, PAD], [PAD, IGNORE, IGNORE]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (2, 4), (3, 3), (64, 64)])
def test_rows_are_padded_to_a_multiple(multiple: int, width: int) -> None:
    batch = collate([[Sample.of([5, 6, 7, 8], prompt_length=2)]], batching(1, multiple=multiple))
    assert batch.tokens.shape == batch.labels.shape == (1, width)


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    state = torch.get_rng_state()
    assert order(50, seed=3, epoch=1) == order(50, seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(order(50, seed, epoch)) for seed in (3, 1000) for epoch in range(3)}) == 6
    assert sorted(order(50, seed=3, epoch=1)) == list(range(50))


def test_without_shuffling_every_epoch_is_the_file() -> None:
    assert epoch_order([5] * 7, batching(2, shuffle=False), epoch=3) == list(range(7))


def test_grouping_by_length_loses_nothing_and_begins_with_the_longest() -> None:
    lengths = [3 + (7 * i) % 50 for i in range(203)]
    for epoch in range(3):
        chosen = epoch_order(lengths, batching(8, group_by_length=True), epoch)
        assert sorted(chosen) == list(range(203))
        assert max(lengths) in [lengths[i] for i in chosen[:8]]
        spread = [max(part) - min(part) for part in ([lengths[i] for i in chosen[at : at + 8]] for at in (0, 40, 80))]
        assert max(spread) <= 4
    assert epoch_order(lengths, batching(8, group_by_length=True), 0) != chosen


def test_sources_come_as_often_as_their_weights_say() -> None:
    mixed = batching(4, shares=((10, 1.0), (6, 0.5), (3, 2.0)))
    halves = set()
    for epoch in range(4):
        chosen = epoch_order([5] * 19, mixed, epoch)
        assert [chosen.count(i) for i in range(10)] == [1] * 10
        assert sum(chosen.count(i) for i in range(10, 16)) == 3
        assert [chosen.count(i) for i in range(16, 19)] == [2] * 3
        halves.add(tuple(sorted(i for i in chosen if 10 <= i < 16)))
    assert len(halves) > 1  # another half in each epoch
    assert count_steps(19, mixed, epochs=2) == 2 * 5


def test_each_epoch_sees_every_sample_once() -> None:
    taken = list(steps(samples(10), batching(4), total=6))
    for epoch in (taken[:3], taken[3:]):
        assert sorted(chain(*(firsts(step.batches) for step in epoch))) == list(range(100, 110))
    assert firsts(taken[0].batches) != firsts(taken[3].batches)


@pytest.mark.parametrize("start", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("row_length", [None, 16])
def test_a_counter_is_all_that_resuming_needs(start: int, row_length: int | None) -> None:
    whole = list(steps(samples(10), batching(4, row_length=row_length), total=8))
    rest = list(steps(samples(10), batching(4, row_length=row_length), total=8, start=start))
    assert len(rest) == 8 - start
    for one, other in zip(whole[start:], rest, strict=True):
        assert one[1:] == other[1:]
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            assert torch.equal(mine.tokens, theirs.tokens)
            assert torch.equal(mine.labels, theirs.labels)


def test_the_last_incomplete_step_of_an_epoch_is_smaller() -> None:
    taken = list(steps(samples(10), batching(4, 3), total=4))
    assert [step.samples for step in taken] == [4, 4, 2, 4]
    assert [[len(batch.tokens) for batch in step.batches] for step in taken] == [[2, 2], [2, 2], [2], [2, 2]]
    assert [step.epoch for step in taken] == [0.4, 0.8, 1.0, 1.4]


def test_the_last_incomplete_step_can_be_left_out() -> None:
    taken = list(steps(samples(10), batching(4, drop_last=True), total=4))
    assert [(step.samples, step.epoch) for step in taken] == [(4, 0.4), (4, 1.0), (4, 1.4), (4, 2.0)]
    assert count_steps(10, batching(4, drop_last=True), epochs=2) == 4
    few = batching(40, drop_last=True)  # what is fewer than one step is not left out
    assert [step.samples for step in steps(samples(10), few, count_steps(10, few, epochs=2))] == [10, 10]


def test_the_longest_samples_of_a_step_come_first() -> None:
    (step,) = steps(samples(10), batching(10, 3), total=1)
    widths = [batch.tokens.size(1) for batch in step.batches]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("row_length", [None, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_micro_batches_of_a_step_without_overlap(world_size: int, row_length: int | None) -> None:
    settings = batching(6, row_length=row_length)
    ranks = [list(steps(samples(11), settings, 4, rank, world_size)) for rank in range(world_size)]
    for together in zip(*ranks, strict=True):
        seen = list(chain(*(firsts(step.batches) for step in together)))
        assert len(seen) == len(set(seen)) == together[0].samples
        counts = [len(step.batches) for step in together]
        assert max(counts) - min(counts) <= 1
        assert len({step._replace(filled=())[1:] for step in together}) == 1
        assert sum(sum(step.filled) for step in together) == together[0].tokens - together[0].samples


def test_no_rank_always_gets_the_longest_samples_of_a_round() -> None:
    assert [dealt(range(8), rank, 2) for rank in range(2)] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert [dealt(range(5), rank, 3) for rank in range(3)] == [[0], [1, 4], [2, 3]]
    assert dealt(range(3), 0, 1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("batch_size", "most", "world_size", "rows"),
    [
        (8, 8, 1, [[8]]),
        (8, 8, 2, [[4], [4]]),  # and not all for one rank
        (8, 2, 2, [[2, 2], [2, 2]]),
        (10, 4, 2, [[3, 2], [3, 2]]),
        (9, 4, 1, [[3, 3, 3]]),
        (3, 4, 4, [[1], [1], [1], []]),
    ],
)
def test_ranks_have_equally_much_to_do(batch_size: int, most: int, world_size: int, rows: list[list[int]]) -> None:
    ranks = [next(steps(samples(12), batching(batch_size, most), 1, rank, world_size)) for rank in range(world_size)]
    assert [[len(batch.tokens) for batch in step.batches] for step in ranks] == rows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_counts_of_a_step_are_those_of_its_batches(world_size: int) -> None:
    data = samples(11)
    length = {int(sample.tokens[0]): len(sample.tokens) for sample in data}
    ranks = [list(steps(data, batching(6), 4, rank, world_size)) for rank in range(world_size)]
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
    total = count_steps(count, batching(batch_size), epochs)
    taken = list(steps(samples(count), batching(batch_size), total))
    assert len(taken) == total
    assert taken[-1].epoch >= epochs - 0.5 / count  # not a sample less than asked for, but for rounding
    assert total == 1 or taken[-2].epoch < epochs  # and not a step more than needed


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shares", [(), ((30, 1.0), (3, 0.34)), ((30, 0.1), (3, 7.0))], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_a_step_has_so_many_tokens_on_average(batch_size: int, shares: tuple, drop_last: bool) -> None:
    data = Samples.of([Sample.of([1] * (20 if i < 30 else 300), 1) for i in range(33)])
    settings = batching(batch_size, drop_last=drop_last, shares=shares)
    taken = list(steps(data, settings, total=40 * steps_of_an_epoch(33, settings)))
    assert fmean(step.tokens for step in taken) == pytest.approx(mean_tokens(data, settings), rel=0.05)


def test_max_steps_alone_decides_where_it_is_given() -> None:
    assert [count_steps(10, batching(4), epochs=3, max_steps=steps) for steps in (0, 5, 500)] == [0, 5, 500]
    assert count_steps(1, batching(32), epochs=0.01) == 1


@pytest.mark.parametrize("quantile", [0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_the_quantile_of_lengths_is_that_of_h2o_llm_studio(quantile: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 7, 32):
        lengths = torch.randint(2, 400, (count,), generator=generator)
        starts = int(lengths.max()) - lengths  # of rows that are padded on the left
        kept = int(lengths.max()) - int(torch.quantile(starts.double(), 1 - quantile).add(1e-9).floor())
        assert cut_length(lengths.tolist(), quantile) == kept


def test_samples_of_a_step_lose_their_beginnings_beyond_the_quantile() -> None:
    long = [Sample.of(range(10, 10 + length), prompt_length=2) for length in (4, 6, 9, 12)]
    (step,) = steps(Samples.of(long), batching(4, 4, shuffle=False, length_quantile=0.5), total=1)
    (batch,) = step.batches  # the quantile is 7.5
    assert sorted(batch.tokens.tolist())[2:] == [list(range(11, 18)), list(range(14, 21))]
    assert sorted(batch.labels.tolist())[2:] == [list(range(12, 19)), list(range(15, 22))]
    assert sorted((batch.labels != IGNORE).sum(dim=1).tolist()) == [2, 4, 7, 7]
    assert (step.tokens, step.labelled, step.weight) == (4 + 6 + 8 + 8, 20, 20.0)


def test_replaced_tokens_are_a_share_and_have_no_label() -> None:
    texts = [Sample.of(range(1000 * i + 10, 1000 * i + 110), prompt_length=20) for i in range(1, 41)]
    step = next(steps(Samples.of(texts), batching(40, 40, shuffle=False, token_dropout=0.25, mask_id=7), total=1))
    (batch,) = step.batches
    inputs, labels = batch.tokens, batch.labels
    hidden = inputs == 7
    assert float(hidden.float().mean()) == pytest.approx(0.25, abs=0.03)
    first = (inputs[:, 1:] == 7) & (torch.arange(1, 99) >= 20)  # tokens that would have a label
    assert torch.equal(labels[:, :-1] == IGNORE, first | (torch.arange(1, 99) < 20))
    known = ~hidden[:, 1:] & (labels[:, :-1] != IGNORE)
    assert torch.equal(labels[:, :-1][known], inputs[:, 1:][known])
    assert step.labelled == step.weight == int((labels != IGNORE).sum())


@pytest.mark.parametrize("changes", [{"length_quantile": 0.6}, {"token_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("weighting", ["tokens", "samples"])
def test_what_alters_samples_depends_on_seed_and_step_alone(changes: dict[str, float], weighting: str) -> None:
    some = Samples.of([*samples(11), light([0.5, 0.5, 1.0])])

    def rows(micro: int, start: int = 0, ranks: int = 1, seed: int = 0) -> list[list[tuple]]:
        plan = batching(4, micro, seed, weighting=weighting, mask_id=9, **changes)
        every = [list(steps(some, plan, 6, rank, ranks, start)) for rank in range(ranks)]
        return [
            sorted(
                (tokens[labels != IGNORE].tolist(), labels[labels != IGNORE].tolist(), (weights / step.weight).tolist())
                for step in parts
                for batch in step.batches
                for tokens, labels, weights in (
                    (t, lab, (batch.weights[b] if batch.weights is not None else torch.ones(len(lab)))[lab != IGNORE])
                    for b, (t, lab) in enumerate(zip(batch.tokens, batch.labels, strict=True))
                )
            )
            for parts in zip(*every, strict=True)
        ]

    whole = rows(4)
    assert rows(1) == rows(2, ranks=2) == whole
    assert rows(3, start=2) == whole[2:]
    assert rows(4, seed=1) != whole
    assert sum(sum(weights) for _, _, weights in whole[0]) == pytest.approx(1)


def test_a_step_that_has_lost_all_labels_has_a_loss_of_zero() -> None:
    one = Samples.of([Sample.of([5, 6], prompt_length=1)])
    hidden = [step for step in steps(one, batching(1, token_dropout=0.9), total=20) if not step.labelled]
    assert {step.weight for step in hidden} == {1.0}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("quantile", [0.2, 0.9])
def test_no_micro_batch_of_cut_samples_is_larger_than_that_of_the_longest_step(
    quantile: float, drop_last: bool
) -> None:
    lengths = [*random.Random(0).choices(range(2, 90), k=31), 300]
    some = Samples.of(Sample.of(range(length), 1) for length in lengths)
    plan = batching(5, 2, drop_last=drop_last, length_quantile=quantile)
    largest = longest_step(some, plan).batches[0].tokens.shape
    shapes = [batch.tokens.shape for step in steps(some, plan, 40) for batch in step.batches]
    assert all(rows <= largest[0] and width <= largest[1] for rows, width in shapes)


@pytest.mark.parametrize("shares", [(), ((40, 0.5), (20, 3.4))], ids=["once", "often"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("row_length", [None, 200, 420, 3000])
def test_no_micro_batch_is_larger_than_that_of_the_longest_step(
    row_length: int | None, world_size: int, shares: tuple
) -> None:
    source = random.Random(0)
    largest = []
    for _ in range(12):
        lengths = [min(200, int(source.lognormvariate(3.5, 0.9)) + 2) for _ in range(60)]
        data = Samples.of([Sample.of([1] * length, 1) for length in lengths])
        batch_size, most = source.choice([8, 16, 40]), source.choice([1, 2, 4, 8])
        settings = batching(batch_size, most, row_length=row_length, shares=shares)
        (longest,) = longest_step(data, settings, world_size).batches
        taken = [one for rank in range(world_size) for one in steps(data, settings, 12, rank, world_size)]
        largest += [max(batch.tokens.numel() for step in taken for batch in step.batches) / longest.tokens.numel()]
        assert len(longest.tokens) <= most
    assert max(largest) <= 1
    assert max(largest) > 0.5  # and not far from it


def test_validation_batches_hold_every_sample_once_sorted_by_length() -> None:
    batches = validation_batches(samples(11), micro_batch_size=4)
    assert sorted(firsts(batches)) == list(range(100, 111))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 3]
    widths = [batch.tokens.size(1) for batch in batches]
    assert widths == sorted(widths)
    assert validation_batches(Samples.of([]), micro_batch_size=4) == []


# Weights of tokens.


def light(weights: list[float], first: int = 100) -> Sample:
    """A sample of as many tokens, each of which weighs what it says; 0 is not labelled."""
    at = np.array(weights, np.float32)
    return Sample(np.arange(first, first + len(weights), dtype=np.int32), at > 0, at)


LIGHT = [light([0, 0.5, 1, 0, 0.25]), Sample.of([7, 8, 9], 1), light([0, 0, 0.1], first=50)]


@pytest.mark.parametrize("row_length", [None, 16], ids=["rows", "packed"])
@pytest.mark.parametrize("weighting", ["tokens", "samples"])
def test_weights_of_tokens_weigh_the_loss_of_a_step(weighting: str, row_length: int | None) -> None:
    model = tiny_model().double()
    (step,) = steps(Samples.of(LIGHT), batching(3, weighting=weighting, row_length=row_length), 1)
    found = sum(model.loss(*batch) for batch in step.batches) / step.weight
    total, whole = torch.zeros((), dtype=torch.float64), 0.0
    for sample in LIGHT:
        ids = torch.from_numpy(sample.tokens).long()
        losses = cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="none")
        weights = torch.from_numpy(sample.trained if sample.weights is None else sample.weights)[1:].double()
        share = 1 / int((weights > 0).sum()) if weighting == "samples" else 1.0
        total, whole = total + share * (weights * losses).sum(), whole + share * float(weights.sum())
    assert found.item() == pytest.approx((total / whole).item(), rel=1e-6)
    assert step.labelled == 6


def test_samples_keep_their_weights_whatever_they_are_joined_with() -> None:
    plain = Samples.of([Sample.of([1, 2, 3], 1)])
    joined = Samples.joined([plain, Samples.of(LIGHT)])
    assert [None if one.weights is None else one.weights.tolist() for one in joined.take([2, 0])[0:2]] == [
        [0, 1, 1],
        [0, 1, 1],
    ]
    assert joined[1].weights is not None
    assert joined[1].weights.tolist() == LIGHT[0].weights.tolist()  # type: ignore[union-attr]
    assert joined.weight_sums.tolist() == pytest.approx([2, 1.75, 2, 0.1])
    assert plain.weights is None
    assert plain.weight_sums.tolist() == [2]


def test_validation_counts_every_labelled_token_alike() -> None:
    assert [batch.weights for batch in validation_batches(Samples.of(LIGHT), 2)] == [None, None]


@pytest.mark.parametrize("size", [2**40, 2**63 - 1])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_batch_larger_than_the_data_is_all_of_it(size: int, grouped: bool) -> None:
    some, plan = samples(7), batching(size, size, group_by_length=grouped)
    every = list(steps(some, plan, count_steps(7, plan, 3.0)))
    assert [(step.samples, len(step.batches)) for step in every] == [(7, 1)] * 3
    assert len(longest_step(some, plan).batches[0].tokens) == 7
