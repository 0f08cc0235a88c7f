"""The task of a head that reads a label off the last token of a text."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scoring:
    """The task of a head: to choose one of some classes, or to give a number.

    Attributes:
        classes: their names, in the order of the outputs; none for a number.
        values: the numbers that labels stand for; none for classes.
    """

    kind: Literal["classify", "regress"]
    classes: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return len(self.classes) or 1

    def name(self, label: int) -> str:
        """The class, or number, of a label."""
        return self.classes[label] if self.classes else f"{self.values[label]:g}"
