"""Lessons of a run about its data: never learnt, known by heart, known to the base, or in contradiction with itself."""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch

KNOWN = 0.1
"""Nats per labelled token below which the base knew an answer."""
UNMOVED = 0.9
"""Share of the loss before training from which on a sample was not learnt."""
AT_ONCE = 0.9
"""Share of the fall of a loss from which on a sample was learnt at once."""
SHINGLE = 5  # characters
HASHES, BANDS = 64, 16
ALIKE = 0.8
"""Jaccard similarity of the shingles of two prompts from which on these are near duplicates."""
PRIME = 2**31 - 1
MOST_IN_BUCKET = 50  # prompts that are compared with each other; a bucket of a template would hold all


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """A training sample, with its loss before and after training."""

    hash: str
    """See data.exclude.hash_of."""
    prompt: str
    answer: str
    """The answer; of a comparison the chosen one, of a text its label."""
    before: float
    """Nats per labelled token with the base alone, or the loss of a comparison or a label before training."""
    after: float
    early: float | None = None
    """At the first validation behind the start, if the run measured it."""
    said_before: bool = False
    """The base's likeliest answer is this one, word for word."""
    said_after: bool = False
    rejected: tuple[str, ...] = ()
    """Of a comparison the other answers."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The question: a prompt, or a choice among some answers to it."""
        return plain(self.prompt), *(sorted(map(plain, (self.answer, *self.rejected))) if self.rejected else ())

    @property
    def by_heart(self) -> bool:
        """The adapter reproduces the answer word for word, and the base does not."""
        return self.said_after and not self.said_before


def share(samples: Sequence[Reviewed]) -> tuple[float, float, float]:
    """Return the share of answers that were learnt by heart, with its 95 % interval (Wilson 1927)."""
    count, right = len(samples), sum(sample.by_heart for sample in samples)
    middle, z = right / count, 1.96
    centre = (middle + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(middle * (1 - middle) / count + z * z / (4 * count * count))
    return middle, max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True)
class Review:
    """Numbers of samples that deserve a look."""

    known: list[int]
    """The base knew their answers."""
    unlearnt: list[int]
    """Their loss is above the median and hardly fell, worst first."""
    repeated: list[list[int]]
    """Groups with the same prompt and the same answer, but for spaces and case."""
    contradicting: list[list[int]]
    """Groups with the same prompt and different answers, or where another of the same answers is chosen."""
    alike: list[tuple[int, int, float]]
    """Pairs of nearly the same prompt, with their similarity."""
    at_once: list[int]
    """Most of what they were to learn was learnt by the first validation."""
    forgotten: list[int]
    """Their loss rose again after the first validation, most risen first."""
    by_heart: list[int]
    """The adapter says their answers word for word, the base does not; longest answer first."""

    def to_drop(self, samples: Sequence[Reviewed]) -> dict[int, str]:
        """Propose samples to leave out, each with the reason: copies, contradictions but the best, the unlearnt."""
        found = dict.fromkeys(self.unlearnt, "not learnt")
        for group in self.contradicting:
            best = min(group, key=lambda number: samples[number].after)
            found |= {number: f"contradicts {samples[best].hash}" for number in group if number != best}
        for group in self.repeated:
            found |= dict.fromkeys(group[1:], f"repeats {samples[group[0]].hash}")
        return dict(sorted(found.items()))


def review(samples: Sequence[Reviewed], known: float = KNOWN) -> Review:
    """Look for samples that deserve a look.

    Args:
        known: loss up to which a sample was known before training; 0 where losses are not nats per token.
    """
    middle = median(sample.after for sample in samples)
    unlearnt = [n for n, s in enumerate(samples) if s.after > middle and s.after >= UNMOVED * s.before]
    repeated, contradicting = [], []
    for group in groups(samples):
        answers = defaultdict(list)
        for number in group:
            answers[plain(samples[number].answer)].append(number)
        repeated += [same for same in answers.values() if len(same) > 1]
        if len(answers) > 1:
            contradicting.append([same[0] for same in answers.values()])
    return Review(
        known=[n for n, s in enumerate(samples) if s.before <= known],
        unlearnt=sorted(unlearnt, key=lambda number: -samples[number].after),
        repeated=repeated,
        contradicting=contradicting,
        alike=list(near_duplicates([plain(sample.prompt) for sample in samples])),
        at_once=[n for n, s in enumerate(samples) if s.early is not None and _learnt(s, known) and _fell_at_once(s)],
        forgotten=sorted(
            (n for n, s in enumerate(samples) if s.early is not None and s.after > max(middle, s.early / UNMOVED)),
            key=lambda number: (samples[number].early or 0.0) - samples[number].after,
        ),
        by_heart=sorted(
            (n for n, s in enumerate(samples) if s.by_heart), key=lambda number: -len(samples[number].answer)
        ),
    )


def _learnt(sample: Reviewed, known: float) -> bool:
    return sample.before > known and sample.after < (1 - AT_ONCE / 2) * sample.before


def _fell_at_once(sample: Reviewed) -> bool:
    return sample.early is not None and sample.before - sample.early >= AT_ONCE * (sample.before - sample.after)


def groups(samples: Sequence[Reviewed]) -> Iterator[list[int]]:
    """Yield the numbers of samples with the same prompt."""
    found = defaultdict(list)
    for number, sample in enumerate(samples):
        found[sample.asked].append(number)
    yield from (group for group in found.values() if len(group) > 1)


def plain(text: str) -> str:
    """Return a text without differences in case and spaces."""
    return " ".join(text.casefold().split())


def near_duplicates(prompts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Yield pairs of different texts that are alike, with their Jaccard similarity (MinHash, Broder 1997).

    Texts that share a band of minima are compared exactly.
    """
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(prompt, number)
    texts, numbers = list(first), list(first.values())
    parts = [shingles(text) for text in texts]
    buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, minima in enumerate(map(signature, parts)):
        rows = HASHES // BANDS
        for band in range(BANDS):
            buckets[band, *minima[band * rows : (band + 1) * rows]].append(at)
    pairs = {pair for bucket in buckets.values() for pair in combinations(bucket[:MOST_IN_BUCKET], 2)}
    for one, other in sorted(pairs):
        similarity = len(parts[one] & parts[other]) / len(parts[one] | parts[other])
        if similarity >= ALIKE:
            yield numbers[one], numbers[other], similarity


def shingles(text: str) -> set[str]:
    """Cut a text into its overlapping pieces."""
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}


def signature(parts: set[str]) -> list[int]:
    """Compute the minima of HASHES hash functions over the pieces of a text."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, PRIME, (2, HASHES), generator=generator)
    values = torch.tensor([zlib.crc32(part.encode()) for part in parts]) % PRIME
    minima: list[int] = ((values[:, None] * factors[0] + factors[1]) % PRIME).amin(dim=0).tolist()
    return minima
