"""The loss of each validation sample at each validation, kept beside the log of a run.

Two runs that validated on the same samples can then be compared sample by sample, which is much finer than their means.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lit_qlora.data.batches import SampleBatch
from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.model.gpt import IGNORE

FILE_NAME = "validation_losses.json"
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class SampleLosses:
    """Losses of samples, which have the same order everywhere."""

    samples: tuple[str, ...]
    """A hash of each sample: its ids and labels."""
    labelled: tuple[int, ...]
    """Labelled tokens of each."""
    losses: dict[int, tuple[float, ...]]
    """Optimizer steps -> sum of the losses of each sample's labelled tokens, in nats."""

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
            scores: see measures.score_rows.
        """
        row = tuple(round(loss, DIGITS) for loss in scores[:, 0].tolist())
        return replace(self, losses={**self.up_to(step).losses, step: row})

    def write(self, folder: Path, name: str = FILE_NAME) -> None:
        """Write them into the folder of a run."""
        values = {"samples": self.samples, "labelled": self.labelled, "losses": self.losses}
        write_text(folder / name, json.dumps(values) + "\n")


def keep(out_dir: Path, batches: Sequence[SampleBatch], step: int, scores: Tensor, name: str = FILE_NAME) -> None:
    """Add a validation to the earlier ones of the run in `out_dir`; a repeated one counts once."""
    own = SampleLosses.of(batches)
    earlier = SampleLosses.read(out_dir, name)
    if earlier and earlier.samples == own.samples:
        own = earlier
    own.at(step, scores).write(out_dir, name)


def digest(tokens: Tensor, labels: Tensor) -> str:
    """Hash a sample, without the padding behind its last label."""
    end = int((labels != IGNORE).nonzero().max()) + 1 if (labels != IGNORE).any() else 0
    data = tokens[:end].numpy().tobytes() + labels[:end].numpy().tobytes()
    return hashlib.blake2b(data, digest_size=6).hexdigest()
