"""The training loop: steps in, an updated adapter out. It knows nothing of LoRA, quantisation or files."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor

from lit_qlora.data import Batch, Step
from lit_qlora.device import peak_gib
from lit_qlora.errors import NumericalError
from lit_qlora.optim import learning_rate
from lit_qlora.settings import TrainConfig

Record = dict[str, Any]


def train(
    fabric: Fabric,
    model: _FabricModule,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Step],
    total: int,
    val_batches: Sequence[Batch],
    config: TrainConfig,
    eval_every: int,
    log: Callable[[Record], None],
    save: Callable[[int], None],
) -> None:
    """Take one optimizer step for each of `steps`, of which there are `total`.

    The loss of a step is the mean over all its labelled tokens, or as data.weighting weighs them, however they are
    split into rows, micro-batches and devices, so packing and train.micro_batch_size change memory and speed but not
    the result.

    Args:
        model: as fabric.setup returns it, with "loss" marked as a forward method.
        eval_every: optimizer steps between validations; before the first step and after the last there is always one.
        log: gets a record for each step and each validation, on every rank.
        save: is called with the number of steps done, whenever a checkpoint is due.

    Raises:
        NumericalError: if the loss of a step is not finite; the step is not taken.
    """
    start = before = time.monotonic()
    paused = 0.0  # seconds since the last step that went to validating and saving
    if val_batches:
        log({"step": 0, **evaluate(fabric, model, val_batches)})
    model.train()
    for number, step in enumerate(steps):
        loss = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(step.batches, start=1):
            with fabric.no_backward_sync(model, enabled=i < len(step.batches)):
                part = model.loss(*to_device(batch, fabric.device)) / step.weight
                fabric.backward(part * fabric.world_size)  # DDP averages gradients over ranks; we want their sum
            loss += part.detach()
        loss = sum_over_ranks(fabric, loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=config.max_norm or math.inf, error_if_nonfinite=False)
        assert isinstance(norm, Tensor)
        loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
        if not math.isfinite(loss_value):
            raise NumericalError(
                f"The loss is {loss_value} at step {number + 1}; the step was not taken.\n"
                "Lower train.learning_rate, or take --precision bf16-true or 32-true."
            )
        rate = learning_rate(number, total, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        done, now = number + 1, time.monotonic()
        log(
            {
                "step": done,
                "epoch": round(step.epoch, 4),
                "loss": loss_value,
                "lr": rate,
                "grad_norm": norm_value,
                "tokens": step.tokens,
                "samples": step.samples,
                "tokens_per_second": round(step.tokens / max(now - before - paused, 1e-9), 1),
                "peak_gib": round(peak_gib(fabric.device), 3),
                "seconds": round(now - start, 3),
            }
        )
        before, paused = now, 0.0
        if done == total or (config.save_every and done % config.save_every == 0):
            save(done)  # before the validation, which may fail
        if val_batches and (done % eval_every == 0 or done == total):
            log({"step": done, **evaluate(fabric, model, val_batches)})
        paused = time.monotonic() - before


@torch.no_grad()
def evaluate(fabric: Fabric, model: _FabricModule, batches: Sequence[Batch]) -> Record:
    """Mean loss per labelled token over `batches`, and its perplexity; each rank takes its share.

    The model is back in the mode it was in when this returns, whatever happens.
    """
    training = model.training
    model.eval()
    try:
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # sum of losses, labelled tokens
        for batch in batches[fabric.global_rank :: fabric.world_size]:
            loss = model.loss(*to_device(batch, fabric.device))
            total += torch.stack((loss.double(), (batch.labels >= 0).sum().to(total)))
    finally:
        model.train(training)
    loss, labelled = sum_over_ranks(fabric, total).tolist()
    mean = loss / labelled
    return {"val_loss": mean, "val_ppl": math.exp(min(mean, 700.0))}  # beyond it a float64 overflows


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied while the host goes on where that is possible."""
    if device.type == "cpu":
        return batch
    moved = (None if t is None else t.pin_memory().to(device, non_blocking=True) for t in batch)
    return Batch(*moved)  # type: ignore[arg-type]


def sum_over_ranks(fabric: Fabric, value: Tensor) -> Tensor:
    """`value` summed over all processes."""
    if fabric.world_size == 1:
        return value
    total = fabric.all_reduce(value, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total
