"""Validation of a head: its loss, and how well it tells classes or numbers."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.data.batches import Batch, SampleBatch
from lit_qlora.evaluate.metrics import class_metrics, number_metrics
from lit_qlora.generation.sequences import evaluating
from lit_qlora.model.gpt import GPT
from lit_qlora.model.scoring import Scoring
from lit_qlora.report import Record
from lit_qlora.signals import StopRequest
from lit_qlora.train.loop import agree, pinned, sum_over_ranks
from lit_qlora.train.scoring import label_losses, labels_of


class LabelScores:
    """Loss, accuracy and F1 of classes, or mean squared and absolute error of numbers; processes divide the work.

    Args:
        write: takes, in the first process, the step of each validation and the loss of each text, (S, 1) float64.

    Attributes:
        outputs: (S, C) of the last call, in the order of the batches; None before it.
        scores: None, since no row is an answer of a model.
    """

    scores: Tensor | None = None

    def __init__(
        self,
        fabric: Fabric,
        model: GPT,
        batches: Sequence[SampleBatch],
        scoring: Scoring,
        stop: StopRequest | None = None,
        write: Callable[[int, Tensor], object] | None = None,
    ) -> None:
        self.fabric, self.model, self.batches, self.scoring = fabric, model, batches, scoring
        self.stop, self.write = stop or StopRequest(), write
        self.outputs: Tensor | None = None

    def __call__(self, step: int) -> Record:
        """See Measure. The record is empty if a signal cut it short."""
        own = self.stop.unless_stopped(partial(score_texts, self.fabric, self.model, self.batches), None)
        if agree(self.fabric, self.stop.signal)[0] or own is None:
            return {}
        self.outputs = sum_over_ranks(self.fabric, own).cpu()
        labels = torch.cat([labels_of(batch) for batch in self.batches if isinstance(batch, Batch)])
        values = torch.tensor(self.scoring.values)
        losses = label_losses(self.outputs, labels, values).double()
        if self.write and self.fabric.is_global_zero:
            self.write(step, losses[:, None])
        loss = float(losses.mean())
        if self.scoring.classes:
            metrics = class_metrics(self.outputs, labels)
        else:
            metrics = number_metrics(self.outputs[:, 0], values[labels])
        return {"val_loss": loss, **{f"val_{name}": value for name, value in metrics.items()}}


@torch.no_grad()
def score_texts(fabric: Fabric, model: GPT, batches: Sequence[SampleBatch]) -> Tensor:
    """The outputs (S, C) at the labels of this process's batches; those of the others are 0."""
    counts = [int((batch.labels >= 0).sum()) for batch in batches]
    assert model.score is not None
    found = torch.zeros(sum(counts), model.score.out_features, device=fabric.device)
    with evaluating(model), fabric.autocast():
        for number in range(fabric.global_rank, len(batches), fabric.world_size):
            start, batch = sum(counts[:number]), pinned(batches[number], fabric.device)
            found[start : start + counts[number]] = model.scores(batch.tokens, batch.labels)
    return found
