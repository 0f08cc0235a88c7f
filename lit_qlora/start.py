"""Where adapters start: at what is most of a weight, at what quantisation lost of it, or at another adapter.

PiSSA and OLoRA take their start out of the frozen base, which is quantised without it; LoftQ fits the quantised base
and the adapter to the weight. All are functions of the published base and the settings, so a run that goes on finds
the same.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.adapter import check_base, load_adapter, read_adapter
from lit_qlora.checkpoint import open_weights
from lit_qlora.errors import UsageError
from lit_qlora.lora import LoRALinear, frozen_weight
from lit_qlora.model import GPT
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import LoRAConfig

EXACT = 1024
"""Smaller side of the largest matrix whose singular values are computed exactly; of others by subspace iteration."""


def settle(config: LoRAConfig, checkpoint_dir: Path) -> LoRAConfig:
    """The settings of the adapter that config.start names, if it names one.

    Raises:
        CheckpointError: if it cannot be read, or was trained on another base.
        UsageError: for a setting that was given and is not the adapter's.
    """
    if config.start is None:
        return config
    adapter = read_adapter(config.start)
    check_base(adapter, checkpoint_dir)
    default = LoRAConfig()
    for setting in dataclasses.fields(LoRAConfig):
        given, own = getattr(config, setting.name), getattr(adapter.config, setting.name)
        if setting.name not in ("dropout", "start") and given not in (own, getattr(default, setting.name)):
            raise UsageError(
                f"lora.{setting.name} is {given}, but the adapter in {config.start} has {own}.\n"
                f"Leave it out; an adapter goes on as it is."
            )
    return dataclasses.replace(adapter.config, dropout=config.dropout, start=config.start)


@torch.no_grad()
def start_adapters(model: GPT, config: LoRAConfig, checkpoint_dir: Path) -> None:
    """Bring the adapters that add_lora put into `model` to where the settings let them start."""
    if config.start is not None:
        load_adapter(model, config.start)
    if config.init == "default":
        return
    weights = open_weights(checkpoint_dir)
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, LoRALinear):
            continue
        base: Any = layer.base
        if isinstance(base, QuantizedLinear):
            name = "embed.weight" if path == "head" and model.config.tied_head else f"{path}.weight"
            weight = weights.read(name).to(device=layer.lora_a.device, dtype=base.dtype).float()
        else:
            weight = frozen_weight(base).float()
        a, b = INITS[config.init](layer, weight, config)
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
        layer.origin = (layer.lora_a.detach().clone(), layer.lora_b.detach().clone())
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.row_norms())


def pissa(layer: LoRALinear, weight: Tensor, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """A and B hold the largest singular values of `weight`, and the base what is left. Meng et al. 2024."""
    a, b = _principal(weight, len(layer.lora_a), layer.scale)
    set_weight(layer, weight - layer.scale * b @ a)
    return a, b


def olora(layer: LoRALinear, weight: Tensor, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """B is orthonormal: the first columns of Q and rows of R in weight = Q R. Bueyuekakyuez 2024."""
    r = len(layer.lora_a)
    q, upper = torch.linalg.qr(weight)
    a, b = upper[:r], q[:, :r]
    set_weight(layer, weight - layer.scale * b @ a)
    return a, b


def loftq(layer: LoRALinear, weight: Tensor, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """The base is `weight` without the adapter, quantised, and the adapter what that lost. Li et al. 2023, algorithm 1.

    A layer that is not quantised has lost nothing: its B is zero.
    """
    a, b = layer.lora_a.detach(), torch.zeros_like(layer.lora_b)
    if isinstance(layer.base, QuantizedLinear):
        for _ in range(config.loftq_steps or 1):
            set_weight(layer, weight - layer.scale * b @ a)
            a, b = _principal(weight - frozen_weight(layer.base).float(), len(layer.lora_a), layer.scale)
    return a, b


INITS: dict[str, Callable[[LoRALinear, Tensor, LoRAConfig], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
}
"""Each gives the base of a layer its weight, from the published one (out, in), and returns A and B."""


def set_weight(layer: LoRALinear, weight: Tensor) -> None:
    """Give the base of `layer` another weight (out, in), quantised like the one it has."""
    base: Any = layer.base
    if isinstance(base, QuantizedLinear):
        bias = None if base.bias is None else base.bias.data
        layer.base = QuantizedLinear(weight.to(base.dtype), bias, base.scheme)
    else:
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)  # a tied embedding keeps its own


def _principal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), alike in size, such that scale B A is the best approximation of `weight` of rank r."""
    if min(weight.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.T
    else:
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, q=min(2 * r, *weight.shape), niter=16)
    root = (s[:r] / scale).sqrt()
    return (root * v[:, :r]).T, root * u[:, :r]
