"""How good the model is on samples that it does not learn from, when that is measured, and which step was best."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule

from lit_qlora.data import Batch
from lit_qlora.errors import UsageError
from lit_qlora.settings import EvalConfig
from lit_qlora.stopping import StopRequest
from lit_qlora.train import Record, pinned, sum_over_ranks

SMALLER_IS_BETTER = ("val_loss", "val_ppl", "kl_to_base")


class Validator:
    """Validates before the first step, every so often, and after the last one.

    Args:
        every: optimizer steps between validations.
        measures: each gives figures for the record of a validation; validation loss is one of them.
        log: gets a record for each validation.
        keep: is called with the step of a validation that was the best so far.
    """

    def __init__(
        self,
        config: EvalConfig,
        every: int,
        total: int,
        measures: Sequence[Callable[[], Record]],
        log: Callable[[Record], None],
        keep: Callable[[int], None],
        stop: StopRequest,
    ) -> None:
        self.config, self.every, self.total = config, every, total
        self.measures, self.log, self.keep, self.stop = measures, log, keep, stop
        self.best: tuple[float, int] | None = None  # (figure, step)
        self.worse = 0
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time after `step` steps."""
        by_clock = self.config.minutes and time.monotonic() - self.last >= 60 * self.config.minutes
        return bool(self.measures) and (step in (0, self.total) or step % self.every == 0 or bool(by_clock))

    def catch_up(self, records: Sequence[Record], start: int) -> bool:
        """Take the records of a run that goes on into account, and validate where that was due and not done.

        Returns:
            False if the run should end.
        """
        for record in records:
            if "loss" not in record:
                self.see(record)
        if self.due(start) and not any(record["step"] == start and "loss" not in record for record in records):
            return self(start)
        return self.go_on

    @property
    def go_on(self) -> bool:
        """Whether the run should go on, as far as validations tell."""
        return not self.config.patience or self.worse < self.config.patience

    def __call__(self, step: int) -> bool:
        """Validate; False if the run should end because it no longer gets better. A signal cuts it short."""
        record: Record = {"step": step}
        for measure in self.measures:
            record |= measure()
            if self.stop.signal:
                return True
        self.log(record)
        self.last = time.monotonic()
        if self.see(record) and step:
            self.keep(step)
        return self.go_on

    def see(self, record: Record) -> bool:
        """Take the record of a validation into account; True if it is the best so far."""
        name = self.config.best
        if name == "none":
            return False
        if name not in record:
            figures = ", ".join(key for key in record if key != "step")
            raise UsageError(f"eval.best {name!r} is not a figure of the validations. They have {figures}.")
        figure = record[name] if name in SMALLER_IS_BETTER else -record[name]
        if self.best is None or figure < self.best[0]:
            self.best, self.worse = (figure, record["step"]), 0
            return True
        self.worse += 1
        return False


@torch.no_grad()
def evaluate(fabric: Fabric, model: _FabricModule, batches: Sequence[Batch], stop: StopRequest | None = None) -> Record:
    """Mean loss per labelled token over `batches`, and its perplexity; each rank takes its share.

    The model is back in the mode it was in when this returns, whatever happens. Nothing comes back where a signal cut
    it short.
    """
    training = model.training
    model.eval()
    try:
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # sum of losses, labelled tokens
        for batch in batches[fabric.global_rank :: fabric.world_size]:
            if stop and stop.signal and fabric.world_size == 1:  # other ranks would wait for the sum
                return {}
            loss = model.loss(*pinned(batch, fabric.device))
            total += torch.stack((loss.double(), (batch.labels >= 0).sum().to(total)))
    finally:
        model.train(training)
    loss, labelled = sum_over_ranks(fabric, total).tolist()
    mean = loss / labelled
    return {"val_loss": mean, "val_ppl": math.exp(min(mean, 700.0))}  # beyond it a float64 overflows
