"""Packing: rows are full, nothing is lost, and no sample sees another."""

import random
import time

import pytest
import torch

from lit_qlora.data import Batching, Sample, Samples, steps
from lit_qlora.data.batches import collate
from lit_qlora.data.packing import pack
from lit_qlora.model.gpt import GPT, IGNORE
from tests.conftest import tiny_model


def random_samples(count: int = 13, longest: int = 30) -> Samples:
    source = random.Random(4)
    made = []
    for _ in range(count):
        length = source.randint(4, longest)
        made.append(Sample.of([source.randint(1, 319) for _ in range(length)], source.randint(1, length - 1)))
    return Samples.of(made)


def gradients(model: GPT, samples: Samples, batching: Batching, world_size: int = 1) -> tuple[float, dict]:
    """Loss and gradients of the first step, all ranks together, as train makes them."""
    model.zero_grad()
    loss = 0.0
    for rank in range(world_size):
        step = next(steps(samples, batching, total=1, rank=rank, world_size=world_size))
        for batch in step.batches:
            part = model.loss(*batch) / step.weight
            part.backward()
            loss += part.item()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lengths", [[], [1], [8], [8, 8], [1] * 20, [5, 4, 3, 2, 1], [7, 7, 1, 1, 6, 2]])
def test_every_document_has_its_place_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 8 for row in rows)


def test_the_best_fit_is_taken() -> None:
    assert pack([6, 5, 3, 2], 8) == [[0, 3], [1, 2]]  # 3 fits behind 5 exactly; first fit would need three rows
    assert pack([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]


def test_rows_are_equally_full_where_that_takes_no_more_of_them() -> None:
    assert pack([4, 3, 2, 1], 8) == [[0, 3], [1, 2]]  # not 8 and 2 tokens
    assert pack([4, 4, 3, 3, 2], 8) == [[0, 1], [2, 3, 4]]  # the emptiest row would come to have 9


@pytest.mark.parametrize(("share", "rows"), [(1, 3), (2, 4), (4, 4), (5, 5), (8, 8), (100, 20)])
def test_rows_go_round_evenly_among_those_who_share_them(share: int, rows: int) -> None:
    lengths = [100] * 20
    packed = pack(lengths, 800, share)
    assert len(packed) == rows
    assert max(map(len, packed)) - min(map(len, packed)) <= 1


def test_rows_are_as_long_as_the_longest_of_a_micro_batch_needs() -> None:
    batching = Batching(batch_size=2, micro_batch_size=2, seed=0, row_length=200)
    long, short = Sample.of([7] * 90, 1), Sample.of([8] * 20, 1)
    assert collate([[short], [short]], batching).tokens.shape == (2, 64)
    assert collate([[long, short], [short]], batching).tokens.shape == (2, 128)
    assert collate([[long, long], [long]], batching).tokens.shape == (2, 192)
    assert collate([[long, long, short], [long]], batching).tokens.shape == (2, 200)  # and no longer than rows may be


def test_packing_is_deterministic_and_tight() -> None:
    source = random.Random(0)
    lengths = [min(2048, int(source.lognormvariate(4.7, 0.6)) + 1) for _ in range(5000)]
    rows = pack(lengths, 2048)
    assert rows == pack(lengths, 2048)
    assert len(rows) == -(-sum(lengths) // 2048)  # not a row more than the tokens need


def test_fifty_thousand_samples_are_packed_in_seconds() -> None:
    source = random.Random(0)
    lengths = [int(source.lognormvariate(4.7, 0.6)) + 1 for _ in range(50_000)]
    start = time.process_time()
    pack(lengths, 2048)
    assert time.process_time() - start < 10  # half a second of a processor; comparing all with all takes minutes


def test_a_packed_row_says_where_each_sample_begins() -> None:
    batching = Batching(batch_size=2, micro_batch_size=2, seed=0, row_length=8)
    first, second = Sample.of([5, 6, 7, 8], 2), Sample.of([9, 3], 1)
    batch = collate([[first, second], [second]], batching)
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, 3] + [IGNORE] * 4, [3] + [IGNORE] * 7]
    assert batch.positions is not None
    assert batch.segments is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.segments.tolist() == [[0, 0, 0, 1] + [-1] * 4, [0] + [-1] * 7]


def test_padding_may_be_longer_than_the_model_s_rows() -> None:
    batching = Batching(batch_size=1, micro_batch_size=1, seed=0, row_length=100)
    batch = collate([[Sample.of([5, 6, 7, 8], 2)]], batching)
    assert batch.positions is not None
    assert int(batch.positions.max()) == 2  # a table of positions ends where the model's rows do


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("weighting", ["tokens", "samples"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"n_kv_head": 4}], ids=str)
def test_a_packed_step_has_the_loss_and_every_gradient_of_the_unpacked_one(
    changes: dict, weighting: str, world_size: int
) -> None:
    model, samples = tiny_model(std=0.05, **changes).double(), random_samples()
    settings: dict = {"batch_size": 11, "micro_batch_size": 2, "seed": 1, "weighting": weighting}
    loss, expected = gradients(model, samples, Batching(**settings))
    packed_loss, packed = gradients(model, samples, Batching(**settings, row_length=40), world_size)
    assert packed_loss == pytest.approx(loss, rel=1e-6)  # the softmax is float32
    for name in expected:
        torch.testing.assert_close(packed[name], expected[name], rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("weighting", ["tokens", "samples"])
@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 11}, {"multiple": 16}], ids=str)
def test_neither_rows_at_a_time_nor_padding_change_the_gradient(changes: dict, weighting: str) -> None:
    model, samples = tiny_model(std=0.05).double(), random_samples()
    settings: dict = {"batch_size": 11, "micro_batch_size": 2, "seed": 1, "weighting": weighting}
    loss, expected = gradients(model, samples, Batching(**settings))
    other_loss, other = gradients(model, samples, Batching(**settings | changes))
    assert other_loss == pytest.approx(loss, rel=1e-6)  # the softmax is float32
    for name in expected:
        torch.testing.assert_close(other[name], expected[name], rtol=1e-4, atol=1e-8, msg=name)


def test_the_two_weightings_are_the_means_that_they_are_called() -> None:
    model, samples = tiny_model(), random_samples(5)
    each = [model.loss(*collate([[sample]])).item() for sample in samples]  # sums over their labelled tokens
    by_tokens, _ = gradients(model, samples, Batching(batch_size=5, micro_batch_size=2, seed=0))
    by_samples, _ = gradients(
        model, samples, Batching(batch_size=5, micro_batch_size=2, seed=0, weighting="samples", row_length=32)
    )
    assert by_tokens == pytest.approx(sum(each) / sum(samples.labelled), rel=1e-5)
    means = [loss / count for loss, count in zip(each, samples.labelled, strict=True)]
    assert by_samples == pytest.approx(sum(means) / 5, rel=1e-5)


def test_a_sample_does_not_see_its_neighbours_in_a_row() -> None:
    model = tiny_model()
    batching = Batching(batch_size=2, micro_batch_size=2, seed=0, row_length=24)
    one, other = Sample.of([5, 6, 7, 8, 9], 1), Sample.of([50, 60, 70], 1)
    alone = model.hidden(torch.tensor([[5, 6, 7, 8]]))
    for row in ([one, other], [other, one]):
        batch = collate([row], batching)
        at = 0 if row[0] is one else 2
        hidden = model.hidden(batch.tokens, positions=batch.positions, segments=batch.segments)
        torch.testing.assert_close(hidden[:, at : at + 4], alone, rtol=1e-5, atol=1e-6)
    plain = model.hidden(batch.tokens)
    assert not torch.allclose(plain[:, 2:6], alone, atol=1e-3)  # a plain causal mask lets them see each other
