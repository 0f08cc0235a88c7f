"""A dry run: the time and memory of a run, measured before its weights are loaded.

It takes the first steps with random weights, because neither speed nor memory depends on their values. It does not
measure loading, saving, lora.init, and all metrics of validations but the losses.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.fabric import Fabric

from lit_qlora.checkpoint.checkpoint import random_model
from lit_qlora.data import RunData, longest_step, steps
from lit_qlora.data.batches import AnyBatch, mean_tokens
from lit_qlora.device import fabric_precision, peak_gib, pick_device, scales_loss, weights_dtype
from lit_qlora.errors import ResourceError
from lit_qlora.evaluate.measures import score_rows
from lit_qlora.evaluate.validation import is_due
from lit_qlora.lora.embeddings import add_noise
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.score import add_score
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.scoring import Scoring
from lit_qlora.quantize import Storage
from lit_qlora.report import duration, tell
from lit_qlora.run.banner import FIRST_STEPS, most_rows, savings
from lit_qlora.run.learning import eval_every, make_learner, make_objective, take_path
from lit_qlora.run.plan import Plan
from lit_qlora.settings import FinetuneConfig
from lit_qlora.signals import StopRequest
from lit_qlora.train.loop import Learner
from lit_qlora.train.parallel import world_size

MOST_ON_CPU = 3e8  # parameters; to make a larger model there takes too long
Kind = TypeVar("Kind", bound=AnyBatch)
PASSES = 4  # most micro-batches of a step, or a validation, that are timed
WARM_UPS = 6  # a shape then has its CUDA graph, and kernels are compiled long before
TIMES = 2


@dataclass(frozen=True)
class Pace:
    """Speed and memory, as measured.

    Attributes:
        step: average seconds of an optimizer step.
        tokens: average tokens of a step on all devices, without padding.
        validation: seconds for the losses of all validation samples; 0.0 if there are none.
        peak_gib: largest memory use, see device.peak_gib.
    """

    step: float
    tokens: float
    validation: float
    peak_gib: float

    def describe(self, total: int, validations: int, price: float | None = None) -> str:
        """Describe the time of `total` steps, and what it costs at a price of an hour."""
        seconds = total * self.step + validations * self.validation
        parts = [f"{total:,} steps of {self.step:.3g} s ({self.tokens / self.step:,.0f} tokens/s)"]
        parts += [f"{validations:,} validations of {self.validation:.2g} s (losses alone)"] if self.validation else []
        parts.append(f"{self.peak_gib:.2f} GiB at the peak")
        cost = "" if price is None else f", costs {seconds / 3600 * price:.2f} at {price:g} an hour"
        return f"about {duration(seconds)}{cost}   {', '.join(parts)}, tried with random weights"


def tell_time(config: FinetuneConfig, data: RunData, plan: Plan, total: int, start: int = 0) -> None:
    """Print how long steps `start` + 1 to `total` will take, what they cost, and which micro-batch would fit.

    Raises:
        ResourceError: if the GPU's memory runs out.
    """
    device = pick_device()
    if rows := most_rows(config, data):
        tell(f"  rows    the largest micro-batch that fits: --train.micro_batch_size {rows}")
    if plan.processes > 1 or plan.parts > 1:
        what = (
            "rows over several devices need all of them" if plan.parts > 1 else "a sharded base needs all its processes"
        )
        tell(f"  time    not measured: {what}")
        return
    if device.type == "cpu" and plan.frozen > MOST_ON_CPU:
        tell("  time    not measured: this needs a GPU or a small model")
        return
    every, before = eval_every(config.eval, data, total), config.eval.before_training
    validations = sum(is_due(step, every, total, before) for step in range(start + bool(start), total + 1))
    try:
        pace = measure_pace(config, data, plan, device)
        tell(f"  time    {pace.describe(total - start, validations, config.price_per_hour)}")
    except torch.OutOfMemoryError:
        raise ResourceError(f"The GPU's memory ran out in the first steps.\n{savings(config, data)}") from None


def measure_pace(config: FinetuneConfig, data: RunData, plan: Plan, device: torch.device) -> Pace:
    """Take steps of the run on one device, with its share of each."""
    learner = random_learner(config, plan, device, data.scoring)

    def update() -> None:
        learner.clip_gradients(config.train.max_norm)
        learner.optimizer.step()

    def seconds(do: Callable[[], object], warm_ups: int) -> float:
        for _ in range(warm_ups):
            do()
        _wait(device)
        begin = time.monotonic()
        for _ in range(TIMES):
            do()
        _wait(device)
        return (time.monotonic() - begin) / TIMES

    learner.model.train()
    processes = world_size(config.devices, config.num_nodes)
    first = list(steps(data.train, data.batching, FIRST_STEPS, world_size=processes))
    usual = sorted(first, key=lambda step: _tokens(step.batches))[len(first) // 2]
    part = usual._replace(batches=_some(usual.batches))
    passes = seconds(lambda: learner.add_gradients(part), WARM_UPS) / _tokens(part.batches)
    for gradient in (p.grad for p in learner.trainable.values() if p.grad is not None):
        gradient.zero_()  # or a scaler may skip updates, because they overflowed float16
    updating = seconds(update, 1)
    learner.optimizer.zero_grad()
    learner.add_gradients(longest_step(data.train, data.batching, processes))  # now that the optimizer has its state
    learner.optimizer.zero_grad()
    validation = 0.0
    if some := _some(data.val_batches):
        scores = seconds(lambda: score_rows(learner.fabric, learner.module, some, StopRequest()), 1)
        validation = scores * _tokens(data.val_batches) / _tokens(some) / processes
    tokens = mean_tokens(data.train, data.batching)  # the first steps may be far from the average
    padded = sum(_tokens(step.batches) for step in first) / sum(step.tokens for step in first)
    step = passes * padded * tokens + updating
    return Pace(step=step, tokens=tokens, validation=validation, peak_gib=peak_gib(device))


def random_learner(config: FinetuneConfig, plan: Plan, device: torch.device, scoring: Scoring | None = None) -> Learner:
    """Make what a run trains, with random weights."""
    storage = Storage(weights_dtype(config.precision), *config.quantization)
    return learner_on(random_model(ModelConfig.load(config.checkpoint_dir), storage, device), config, plan, scoring)


def learner_on(model: GPT, config: FinetuneConfig, plan: Plan, scoring: Scoring | None = None) -> Learner:
    """Make what a run trains, on this base."""
    fabric = Fabric(devices=1, precision=fabric_precision(config.precision))
    add_lora(model, config.lora)
    if scoring:
        add_score(model, scoring.outputs)
    add_noise(model, config.train.neftune)
    model.set_dropout(config.train.hidden_dropout)
    take_path(model, plan)
    scaled, objective = scales_loss(config.precision), make_objective(fabric, config, scoring)
    return make_learner(fabric, model, config.optimizer, config.train, scaled, objective)


def _some(batches: Sequence[Kind]) -> list[Kind]:
    """Pick at most PASSES of the micro-batches, long ones and short ones."""
    return list(batches[:: -(-len(batches) // PASSES) or 1])


def _tokens(batches: Sequence[AnyBatch]) -> int:
    """Count the tokens of these micro-batches, padding included."""
    return sum(batch.tokens.numel() for batch in batches)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
