"""Optimizers as a table, learning rates as pure functions of the step."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lit_qlora.settings import OptimizerConfig, TrainConfig

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters, lr, decay: torch.optim.AdamW(parameters, lr=lr, weight_decay=decay),
    "sgd": lambda parameters, lr, decay: torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=0.9),
}


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, train: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over `parameters`."""
    return OPTIMIZERS[config.name](list(parameters), train.learning_rate, train.weight_decay)


def constant(progress: float) -> float:
    """Always the peak."""
    return 1.0


def linear(progress: float) -> float:
    """From the peak to zero along a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From the peak to zero along half a cosine. Loshchilov & Hutter 2017, without restarts."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps of the warm-up: a share of the run if train.warmup is below 1, else that number."""
    return round(config.warmup * total) if config.warmup < 1 else round(config.warmup)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of a step: a line up to the peak, which the last step of the warm-up has, then the schedule.

    Args:
        step: counts from 0; the last one is total - 1.

    Returns:
        A rate above zero for every step, so that none is wasted.
    """
    rise = warmup_steps(config, total)
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    return config.learning_rate * SCHEDULES[config.schedule]((step - rise) / max(1, total - rise))
