"""A review names copies, contradictions and what was not learnt, and a run can leave these samples out."""

from dataclasses import replace

import pytest

from lit_qlora.evaluate.review import KNOWN, Reviewed, near_duplicates, review, share, shingles


def sample(number: int, prompt: str, answer: str, before: float = 5.0, after: float = 1.0) -> Reviewed:
    return Reviewed(hash=f"{number:016x}", prompt=prompt, answer=answer, before=before, after=after)


SAMPLES = [
    sample(0, "What is the capital of France?", "Paris"),
    sample(1, "what is  the capital of france?", "paris"),
    sample(2, "What is the capital of France?", "Rome", after=4.0),
    sample(3, "Name a colour.", "Red", before=KNOWN / 2, after=0.01),
    sample(4, "Who wrote the tale of the fox and the old miller by the river?", "Ann", before=3.0, after=2.9),
    sample(5, "Who wrote the tale of the fox and the old miller by the rivers?", "Bob"),
]


def test_a_review_finds_each_kind() -> None:
    found = review(SAMPLES)
    assert found.repeated == [[0, 1]]
    assert found.contradicting == [[0, 2]]
    assert found.known == [3]
    assert found.unlearnt == [4]
    assert [pair[:2] for pair in found.alike] == [(4, 5)]


def test_losses_in_between_tell_what_was_learnt_at_once_and_what_was_forgotten() -> None:
    early = [1.2, 4.9, 1.0, None, 0.2, 1.1]
    samples = [
        replace(one, early=loss, after=now) for one, loss, now in zip(SAMPLES, early, [1, 1, 4, 0, 3, 1], strict=True)
    ]
    found = review(samples)
    assert found.at_once == [0, 5]
    assert found.forgotten == [2, 4]  # most risen first


def test_it_proposes_to_drop_copies_and_contradictions_but_the_best() -> None:
    assert review(SAMPLES).to_drop(SAMPLES) == {
        1: f"repeats {SAMPLES[0].hash}",
        2: f"contradicts {SAMPLES[0].hash}",
        4: "not learnt",
    }


def test_an_answer_is_known_by_heart_if_the_adapter_alone_says_it() -> None:
    said = [(False, True), (True, True), (False, False), (False, True)]
    samples = [replace(SAMPLES[n], said_before=was, said_after=now) for n, (was, now) in enumerate(said)]
    assert review(samples).by_heart == [0, 3]
    middle, low, high = share(samples)
    assert middle == 0.5
    # the ends of Wilson's interval are the shares that are 1.96 standard deviations away
    assert all(abs(middle - end) == pytest.approx(1.96 * (end * (1 - end) / 4) ** 0.5) for end in (low, high))


def test_near_duplicates_are_those_of_the_exact_similarity() -> None:
    text = "the quick brown fox jumps over the lazy dog while seven old wizards mix twelve jars of black quartz"
    texts = [text, f"{text} today", text[::-1], "something else"]
    ((one, other, similarity),) = near_duplicates(texts)
    first, second = shingles(texts[0]), shingles(texts[1])
    assert (one, other) == (0, 1)
    assert similarity == pytest.approx(len(first & second) / len(first | second))
