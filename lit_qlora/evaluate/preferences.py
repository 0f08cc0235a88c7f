"""The validation of a run on comparisons, and the log-probabilities of their answers."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.data.comparisons import CHOSEN, PairBatch
from lit_qlora.evaluate.measures import Show
from lit_qlora.generation.sequences import evaluating
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record
from lit_qlora.signals import StopRequest
from lit_qlora.train.loop import agree, pinned, sum_over_ranks
from lit_qlora.train.preferences import Preferences, answers_of, on, token_losses


class PairLosses:
    """Loss, accuracy and rewards of comparisons; processes divide the work.

    Args:
        write: takes, in the first process, the step of each validation and the loss of each comparison, (C, 1) float64
            in the order of the batches. Not called for a loss of single answers, which depends on all the others.

    Attributes:
        scores: None, since no row is an answer of a model.
    """

    scores: Tensor | None = None

    def __init__(
        self,
        fabric: Fabric,
        model: GPT,
        batches: Sequence[PairBatch],
        objective: Preferences,
        stop: StopRequest | None = None,
        show: Show = lambda step, what: None,
        write: Callable[[int, Tensor], object] | None = None,
    ) -> None:
        self.fabric, self.model, self.batches, self.stop = fabric, model, batches, stop or StopRequest()
        self.show = show
        self.write = write if objective.config.published.paired else None
        self.objective = Preferences(objective.config, fabric.device)
        self.comparisons = sum(int(((batch.sides != 0).sum(dim=1) > 0).sum()) for batch in batches)

    def __call__(self, step: int) -> Record:
        """See Measure. The record is empty if a signal cut it short."""
        self.show(step, f"losses of {self.comparisons:,} comparisons")
        found = self.stop.unless_stopped(partial(self._sums), None)
        if agree(self.fabric, self.stop.signal)[0] or found is None:
            return {}
        of_all, of_each = found
        loss, *sums = sum_over_ranks(self.fabric, of_all).tolist()
        if self.write:
            of_each = sum_over_ranks(self.fabric, of_each).cpu()
            if self.fabric.is_global_zero:
                self.write(step, of_each)
        metrics = self.objective.measure(sums)
        told = {f"val_{name}": value for name, value in metrics.items() if not name.startswith("length_")}
        return {"val_loss": loss, **told}

    @torch.no_grad()
    def _sums(self) -> tuple[Tensor, Tensor]:
        """The loss and the sums of the objective of this process's rows, and the loss of each of its comparisons."""
        objective, device = self.objective, self.fabric.device
        mine = self.batches[self.fabric.global_rank :: self.fabric.world_size]
        starts = list(accumulate((int((batch.sides == CHOSEN).sum()) for batch in self.batches), initial=0))
        each = torch.zeros(starts[-1], 1, dtype=torch.float64, device=device)
        weight, labelled = self._whole()
        total = torch.zeros((), device=device)
        objective.sums.zero_()
        with evaluating(self.model), self.fabric.autocast():
            objective.prepare(self.model, mine, partial(sum_over_ranks, self.fabric))
            for batch, start in zip(mine, starts[self.fabric.global_rank :: self.fabric.world_size], strict=False):
                losses, here = objective.values(self.model, pinned(batch, device)), on(batch, device)
                total += objective.of_losses(here, losses, weight, labelled)
                if self.write:
                    found = objective.of_each(here, losses, weight, labelled)
                    each[start : start + len(found), 0] = found.double()
        return torch.cat((total[None], objective.sums)), each

    def _whole(self) -> tuple[float, int]:
        """Comparisons of all rows, and labelled tokens of their chosen answers."""
        pairs = float(sum(batch.shares.sum() for batch in self.batches))
        chosen = sum(int((batch.counts * (batch.sides == 1)).sum()) for batch in self.batches)
        prompts = sum(int(((batch.labels >= 0) & (batch.owners < 0)).sum()) for batch in self.batches)
        singles = float(sum(int((abs(batch.sides) == 1).sum()) for batch in self.batches))
        return (pairs if self.objective.config.published.paired else singles), chosen + prompts


@torch.no_grad()
def log_probabilities(fabric: Fabric, model: GPT, batches: Sequence[PairBatch]) -> list[list[float]]:
    """The log-probabilities of the answers of each row, in the order of the rows; processes divide the work."""
    found = torch.zeros(sum(batch.sides.numel() for batch in batches), device=fabric.device)
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.sides.numel())
    with evaluating(model), fabric.autocast():
        for number in range(fabric.global_rank, len(batches), fabric.world_size):
            batch = batches[number]
            values = answers_of(on(batch, fabric.device), token_losses(model, pinned(batch, fabric.device)))[0]
            found[starts[number] : starts[number + 1]] = values.flatten()
    every: list[float] = sum_over_ranks(fabric, found).tolist()
    rows = [batch.sides.shape for batch in batches]
    return [
        every[start + row * width : start + (row + 1) * width]
        for start, (count, width) in zip(starts, rows, strict=False)
        for row in range(count)
    ]
