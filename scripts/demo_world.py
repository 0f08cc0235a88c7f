"""The demo's small world, made by code from a seed: its facts, its stories, and its questions.

The world is told in plain sentences (`stories`), which hold no question. The questions (`split`) are about the same
facts, in a form that the stories never have.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from demo_facts import (
    ANIMALS,
    DAYS,
    DIFFERENCE,
    GOOD,
    GOODS,
    KINDS,
    LARGEST,
    MEN,
    SUM,
    VILLAGER,
    WOMEN,
    Relation,
)


@dataclass(frozen=True)
class Subject:
    """A person, animal or thing, with its facts."""

    name: str
    kind: str
    facts: dict[str, str]
    pronoun: str = "It"


@dataclass(frozen=True)
class Question:
    """A question, its answer, and three wrong answers of the same sort."""

    instruction: str
    input: str
    answer: str
    wrong: tuple[str, ...]


def make_world(seed: int) -> list[Subject]:
    """Return all subjects in a random order. Facts that are not written above are drawn, each value equally often."""
    rng = random.Random(seed)
    names = WOMEN + MEN
    drawn = {key: _dealt(rng, relation.values, len(names)) for key, relation in VILLAGER.items()}
    subjects = [
        Subject(name, "villager", {key: values[i] for key, values in drawn.items()}, "She" if name in WOMEN else "He")
        for i, name in enumerate(names)
    ]
    subjects += [
        Subject(name, "animal", dict(zip(("home", "food", "colour", "voice", "awake"), line.split(), strict=True)))
        for name, line in ANIMALS.items()
    ]
    prices = _dealt(rng, GOOD["price"].values, len(GOODS))
    subjects += [
        Subject(name, "good", {"price": price, "stuff": stuff})
        for (name, stuff), price in zip(GOODS.items(), prices, strict=True)
    ]
    rng.shuffle(subjects)
    return subjects


def sums() -> list[tuple[int, int]]:
    """Return the pairs of all sums, the smaller number first."""
    return [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]


def differences() -> list[tuple[int, int]]:
    """Return the pairs of all differences; the second number is subtracted from the first."""
    return [(a, b) for a in range(2, LARGEST + 1) for b in range(1, a)]


def stories(world: Sequence[Subject], seed: int) -> Iterator[str]:
    """Yield short texts about the world without end: a few paragraphs each, without questions."""
    rng = random.Random(seed)
    by_kind = {kind: [s for s in world if s.kind == kind] for kind in KINDS}
    while True:
        paragraphs = []
        for _ in range(rng.randint(1, 3)):
            topic = rng.choices(("villager", "villagers", "animal", "good", "numbers", "days"), (6, 4, 5, 4, 4, 0.3))[0]
            if topic == "days":
                paragraphs.append(_week(rng))
            elif topic == "numbers":
                paragraphs.append(" ".join(_calculation(rng) for _ in range(rng.randint(3, 8))))
            elif topic == "villagers":
                paragraphs.append(_mixed(rng, rng.sample(by_kind["villager"], rng.randint(2, 4))))
            elif topic == "villager":
                paragraphs.append(_portrait(rng, rng.choice(by_kind[topic])))
            else:
                paragraphs.append(" ".join(_portrait(rng, s) for s in rng.sample(by_kind[topic], rng.randint(1, 3))))
        yield "\n".join(paragraphs)


def split(world: Sequence[Subject], seed: int) -> dict[str, list[Question]]:
    """Return questions for train, val and test; no two of these ask about the same subject.

    A villager, an animal, a thing or a pair of numbers belongs to one part alone. So a right answer in val or test
    comes from the stories and not from the questions of train.
    """
    rng = random.Random(seed)
    parts: dict[str, list[Question]] = {"train": [], "val": [], "test": []}
    for kind, relations in KINDS.items():
        subjects = [s for s in world if s.kind == kind]
        for part, some in _parts(rng, subjects):
            for subject in some:
                for key, relation in relations.items():
                    for asked in _asked(rng, relation, part):
                        instruction, _, given = asked.format(n=subject.name).partition("\n")
                        answer = subject.facts[key]
                        others = [v for v in relation.values if v != answer]
                        parts[part].append(Question(instruction, given, answer, tuple(rng.sample(others, 3))))
    for relation, pairs in ((SUM, sums()), (DIFFERENCE, differences())):
        for part, some_pairs in _parts(rng, pairs):
            both_ways = {(b, a) for a, b in some_pairs} if relation is SUM else set()
            for a, b in sorted({*some_pairs, *both_ways}):
                for asked in _asked(rng, relation, part):
                    instruction, _, given = asked.format(a=a, b=b).partition("\n")
                    c = a + b if relation is SUM else a - b
                    parts[part].append(Question(instruction, given, str(c), _near(rng, c)))
    for questions in parts.values():
        rng.shuffle(questions)
    return parts


def _dealt(rng: random.Random, values: Sequence[str], n: int) -> list[str]:
    cards = [values[i % len(values)] for i in range(n)]
    rng.shuffle(cards)
    return cards


def _parts(rng: random.Random, items: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Return 60 % of the items for train, 10 % for val, 30 % for test."""
    shuffled = rng.sample(items, len(items))
    first, second = round(0.6 * len(items)), round(0.7 * len(items))
    return [("train", shuffled[:first]), ("val", shuffled[first:second]), ("test", shuffled[second:])]


def _asked(rng: random.Random, relation: Relation, part: str) -> Sequence[str]:
    """Return all ways to ask in train; one way elsewhere."""
    return relation.asked if part == "train" else rng.sample(relation.asked, min(1, len(relation.asked)))


def _near(rng: random.Random, number: int) -> tuple[str, ...]:
    """Return three wrong results close to the right one and with as many digits."""
    near = [n for n in range(max(0, number - 4), number + 5) if n != number and len(str(n)) == len(str(number))]
    return tuple(map(str, rng.sample(near, 3)))


def _portrait(rng: random.Random, subject: Subject) -> str:
    """Tell some facts of one subject, in any order."""
    keys = rng.sample(list(subject.facts), rng.randint((len(subject.facts) + 1) // 2, len(subject.facts)))
    return " ".join(_tell(rng, subject, key, pronoun=i > 0) for i, key in enumerate(keys))


def _mixed(rng: random.Random, subjects: Sequence[Subject]) -> str:
    """Tell a fact about each of several subjects, always by name."""
    facts = [(s, key) for s in subjects for key in rng.sample(list(s.facts), 2)]
    rng.shuffle(facts)
    return " ".join(_tell(rng, s, key, pronoun=False) for s, key in facts)


def _tell(rng: random.Random, subject: Subject, key: str, pronoun: bool) -> str:
    sentence = rng.choice(KINDS[subject.kind][key].told)
    if pronoun and rng.random() < 0.4:
        for start in ("{n} ", "The {n} "):
            if sentence.startswith(start):
                sentence = f"{subject.pronoun} {sentence.removeprefix(start)}"
    return sentence.format(n=subject.name, v=subject.facts[key])


def _calculation(rng: random.Random) -> str:
    if rng.random() < 0.5:
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        return rng.choice(SUM.told).format(a=a, b=b, c=a + b)
    a = rng.randint(2, LARGEST)
    b = rng.randint(1, a - 1)
    return rng.choice(DIFFERENCE.told).format(a=a, b=b, c=a - b)


def _week(rng: random.Random) -> str:
    start, n = rng.randrange(7), rng.randint(2, 6)
    week = [DAYS[(start + i) % 7] for i in range(n + 1)]
    return " ".join(f"After {a} comes {b}." for a, b in pairwise(week))
