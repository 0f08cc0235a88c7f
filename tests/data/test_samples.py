"""Samples in flat arrays."""

import pytest

from lit_qlora.data import Sample, Samples


def made() -> Samples:
    return Samples.of([Sample.of([5, 6, 7], 1), Sample.of([8, 9], 0), Sample.of([1, 2, 3, 4], 3)])


def ids(samples: Samples) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in samples]


def test_samples_come_out_as_they_went_in() -> None:
    samples = made()
    assert ids(samples) == [[5, 6, 7], [8, 9], [1, 2, 3, 4]]
    assert [sample.trained.tolist() for sample in samples] == [[False, True, True], [False, True], [False] * 3 + [True]]
    assert samples.lengths.tolist() == [3, 2, 4]
    assert samples.labelled.tolist() == [sample.labelled for sample in samples] == [2, 1, 1]
    assert ids(samples)[-1] == samples[-1].tokens.tolist()
    assert len(samples[1:]) == 2


def test_the_first_token_is_never_labelled_because_nothing_predicts_it() -> None:
    assert not any(sample.trained[0] for sample in made())


def test_a_choice_shares_the_arrays() -> None:
    samples = made()
    some = samples.take([2, 0])
    assert ids(some) == [[1, 2, 3, 4], [5, 6, 7]]
    assert some.tokens is samples.tokens
    assert some.labelled.tolist() == [1, 2]


def test_parts_can_be_joined() -> None:
    samples = made()
    whole = Samples.joined([samples.take([1]), samples, samples.take([])])
    assert ids(whole) == [[8, 9], *ids(samples)]
    assert whole.labelled.tolist() == [1, 2, 1, 1]
    assert Samples.joined([samples]) is samples


def test_no_samples_are_samples_too() -> None:
    assert len(Samples.of([])) == len(Samples.joined([Samples.of([]), Samples.of([])])) == 0
    with pytest.raises(IndexError):
        Samples.of([])[0]
