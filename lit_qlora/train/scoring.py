"""The objective of a run with a head: the cross-entropy of classes, or the squared error of numbers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.data import Step
from lit_qlora.data.batches import AnyBatch, Batch
from lit_qlora.model.scoring import Scoring
from lit_qlora.train.objective import Sum


class LabelLoss:
    """Learns labels; see train.objective.Objective."""

    sums = None

    def __init__(self, scoring: Scoring, device: torch.device) -> None:
        self.values = torch.tensor(scoring.values, device=device)
        self.predicts = bool(scoring.classes)

    def prepare(self, model: Any, batches: Sequence[AnyBatch], total: Sum) -> None:
        """Nothing."""

    def loss(self, model: Any, batch: AnyBatch, step: Step) -> Tensor:
        """See Objective."""
        assert isinstance(batch, Batch)
        scores = model.scores(batch.tokens, batch.labels, batch.positions, batch.segments)
        labels = labels_of(batch).to(scores.device, non_blocking=True)
        if self.predicts and model.hits is not None:
            model.hits.add_((scores.detach().argmax(dim=-1) == labels).sum())
        return label_losses(scores, labels, self.values).sum() / step.weight

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """Nothing."""
        return {}


def labels_of(batch: Batch) -> Tensor:
    """The labels (N,) of a batch, in the order of GPT.scores."""
    return batch.labels[batch.labels >= 0]


def label_losses(scores: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    """The loss (N,) of scores (N, C): cross-entropy, or where labels stand for numbers the squared error."""
    if len(values):
        return (scores[:, 0] - values[labels]).square()
    return F.cross_entropy(scores, labels, reduction="none")
