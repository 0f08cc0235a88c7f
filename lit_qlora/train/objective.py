"""An objective: the loss of a micro-batch, and what else the log says of a step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from lit_qlora.data import Step
from lit_qlora.data.batches import AnyBatch

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class Objective(Protocol):
    """The loss of micro-batches."""

    @property
    def predicts(self) -> bool:
        """True if GPT.hits counts the labelled tokens that the model predicts."""
        ...

    @property
    def sums(self) -> Tensor | None:
        """(n,) float32, for measure; a step sets it to zero, its micro-batches add to it. None without such metrics."""
        ...

    def prepare(self, model: Any, batches: Sequence[AnyBatch], total: Sum) -> None:
        """Look at the micro-batches of a step before its gradients; all processes do so together."""
        ...

    def loss(self, model: Any, batch: AnyBatch, step: Step) -> Tensor:
        """The part of a micro-batch, pinned in host memory, in the loss of its step; a scalar."""
        ...

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """Make the metrics of a step of its sums over all micro-batches and processes."""
        ...


class CrossEntropy:
    """The mean cross-entropy of labelled tokens, or as weights weigh them."""

    predicts = True
    sums = None

    def prepare(self, model: Any, batches: Sequence[AnyBatch], total: Sum) -> None:
        """Nothing."""

    def loss(self, model: Any, batch: AnyBatch, step: Step) -> Tensor:
        """See Objective."""
        loss: Tensor = model.loss(*batch) / step.weight
        return loss

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """Nothing."""
        return {}
