"""The loss of each validation sample at each validation, kept beside the log of a run.

Two runs that validated on the same samples can then be compared sample by sample, which is much finer than their means.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lit_qlora.data.batches import SampleBatch
from lit_qlora.data.comparisons import CHOSEN, PairBatch
from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.model.gpt import IGNORE
from lit_qlora.settings import PreferenceConfig

FILE_NAME = "validation_losses.json"
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class SampleLosses:
    """Losses of samples, which have the same order everywhere."""

    samples: tuple[str, ...]
    """A hash of each sample: its ids and labels."""
    labelled: tuple[int, ...]
    """Labelled tokens of each; 1 for a text with a label, and for a comparison."""
    losses: dict[int, tuple[float, ...]]
    """Optimizer steps -> loss of each sample, of its labelled tokens the sum in nats."""

    @classmethod
    def of(cls, batches: Sequence[SampleBatch]) -> Self:
        """The samples of these batches, without losses."""
        rows = [row for batch in batches for row in zip(batch.tokens, batch.labels, strict=True)]
        return cls(
            samples=tuple(digest(tokens, labels) for tokens, labels in rows),
            labelled=tuple(int((labels != IGNORE).sum()) for _, labels in rows),
            losses={},
        )

    @classmethod
    def of_pairs(cls, batches: Sequence[PairBatch], how: PreferenceConfig) -> Self:
        """The comparisons of these batches, without losses; by another loss a comparison is another sample."""
        facts = key_of(how)
        samples = tuple(digest(tokens, labels, facts) for batch in batches for tokens, labels in comparisons(batch))
        return cls(samples=samples, labelled=(1,) * len(samples), losses={})

    @classmethod
    def read(cls, folder: Path, name: str = FILE_NAME) -> Self | None:
        """Read those of a run; None if there are none, or the file is damaged."""
        path = folder / name
        try:
            values: dict[str, Any] = read_json(path) if path.is_file() else {}
            return cls(
                samples=tuple(map(str, values["samples"])),
                labelled=tuple(map(int, values["labelled"])),
                losses={int(step): tuple(map(float, row)) for step, row in values["losses"].items()},
            )
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def up_to(self, step: int) -> Self:
        """Leave out what was measured after `step` steps or later."""
        return replace(self, losses={at: row for at, row in self.losses.items() if at < step})

    def at(self, step: int, scores: Tensor) -> Self:
        """Add a validation.

        Args:
            scores: the losses are its first column; see measures.score_rows.
        """
        row = tuple(round(loss, DIGITS) for loss in scores[:, 0].tolist())
        return replace(self, losses={**self.up_to(step).losses, step: row})

    def write(self, folder: Path, name: str = FILE_NAME) -> None:
        """Write them into the folder of a run."""
        values = {"samples": self.samples, "labelled": self.labelled, "losses": self.losses}
        write_text(folder / name, json.dumps(values) + "\n")


def keep(out_dir: Path, own: SampleLosses, step: int, scores: Tensor, name: str = FILE_NAME) -> None:
    """Add a validation of these samples to the earlier ones of the run in `out_dir`; a repeated one counts once."""
    earlier = SampleLosses.read(out_dir, name)
    if earlier and earlier.samples == own.samples:
        own = earlier
    own.at(step, scores).write(out_dir, name)


def comparisons(batch: PairBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and labels of each comparison, row by row."""
    for tokens, labels, segments, sides in zip(batch.tokens, batch.labels, batch.segments, batch.sides, strict=True):
        firsts = [int((segments == n).nonzero()[0]) for n in (sides == CHOSEN).nonzero()[:, 0].tolist()]
        for start, end in pairwise([*firsts, int((segments >= 0).sum())]):
            yield tokens[start:end], labels[start:end]


def key_of(how: PreferenceConfig) -> bytes:
    """Write down what the loss of a comparison is."""
    return json.dumps(asdict(how), sort_keys=True).encode()


def digest(tokens: Tensor, labels: Tensor, facts: bytes = b"") -> str:
    """Hash a sample, without the padding behind its last label, and `facts` about its loss."""
    end = int((labels != IGNORE).nonzero().max()) + 1 if (labels != IGNORE).any() else 0
    data = tokens[:end].numpy().tobytes() + labels[:end].numpy().tobytes() + facts
    return hashlib.blake2b(data, digest_size=6).hexdigest()
