"""The objective of a run with a teacher: cross-entropy of the labels mixed with the divergence from the teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_qlora.data import Step
from lit_qlora.data.batches import AnyBatch, TaughtBatch
from lit_qlora.model.lesson import Lesson
from lit_qlora.settings import DistillConfig
from lit_qlora.train.objective import Sum


class Distillation:
    """Learns from a teacher; see train.objective.Objective.

    Attributes:
        totals: (2,) float32, the sums of cross-entropy and divergence, which are the beginning of `sums`.
    """

    predicts = True

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        self.config = config
        self.sums: Tensor = torch.zeros(3, device=device)
        self.totals = self.sums[:2]

    def prepare(self, model: Any, batches: Sequence[AnyBatch], total: Sum) -> None:
        """Nothing."""

    def loss(self, model: Any, batch: AnyBatch, step: Step) -> Tensor:
        """See Objective."""
        assert isinstance(batch, TaughtBatch)
        lesson = Lesson(batch.ids, batch.log_probs, self.config.weight, self.config.temperature, self.totals)
        known = batch.labels >= 0
        self.sums[2] += float(known.sum() if batch.weights is None else batch.weights[known].sum())
        loss: Tensor = model.loss(*batch.plain, lesson=lesson) / step.weight
        return loss

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """The two parts of the loss, a labelled token."""
        entropy, divergence, weight = sums
        return {"cross_entropy": entropy / max(weight, 1e-9), "teacher_kl": divergence / max(weight, 1e-9)}
