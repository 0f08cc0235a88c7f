"""Initial values of adapters: the main part of a weight, or the error of its quantisation.

PiSSA and OLoRA take their start out of the frozen base, which is quantised without it; LoftQ fits the quantised base
and the adapter to the weight. All are functions of the published base and the settings, so a run that goes on finds
the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, frozen_weight

EXACT = 1024
"""Smaller side of the largest matrix with an exact SVD; larger ones use subspace iteration."""

Read = Callable[[str], Tensor]
Quantize = Callable[[Tensor], Tensor]
Start = tuple[Tensor, Tensor, Tensor]
"""New weight of the base (out, in), A (r, in) and B (out, r)."""


def pissa(weight: Tensor, r: int, scale: float) -> Start:
    """Split `weight`: the largest singular values go to A and B, the rest to the base. Meng et al. 2024."""
    a, b = principal(weight, r, scale)
    return weight - scale * b @ a, a, b


def olora(weight: Tensor, r: int, scale: float) -> Start:
    """Take the first columns of Q as B and rows of R as A, where weight = Q R. Bueyuekakyuez 2024."""
    q, upper = torch.linalg.qr(weight)
    a, b = upper[:r], q[:, :r]
    return weight - scale * b @ a, a, b


def loftq(weight: Tensor, r: int, scale: float, quantize: Quantize, steps: int) -> Start:
    """Fit the adapter to the quantisation error of `weight` without it. Li et al. 2023, algorithm 1.

    Args:
        quantize: rounds a weight to its quantised values.
    """
    a, b = weight.new_zeros(r, weight.size(1)), weight.new_zeros(weight.size(0), r)
    for _ in range(steps):
        rest = weight - scale * b @ a
        a, b = principal(weight - quantize(rest), r, scale)
    return rest, a, b


def principal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Find A (r, in) and B (out, r), of like norms, such that scale B A approximates `weight` best."""
    if min(weight.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, q=min(2 * r, *weight.shape), niter=16)
    root = (s[:r] / scale).sqrt()
    return (root * v[:, :r]).T, root * u[:, :r]


@torch.no_grad()
def initialize(model: GPT, init: str, loftq_steps: int, read: Read) -> None:
    """Initialise the adapters that add_lora put into `model`, and their bases, as `init` says.

    Args:
        read: name -> weight of the published base.
    """
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, LoRALinear):
            continue
        weight, r = published_weight(model, path, layer, read), len(layer.lora_a)
        if init == "loftq" and isinstance(layer.base, QuantizedLinear):
            rest, a, b = loftq(weight, r, layer.scale, as_stored_in(layer.base), loftq_steps)
        elif init == "loftq":  # a layer that is not quantised has no error
            rest, a, b = weight, layer.lora_a, torch.zeros_like(layer.lora_b)
        else:
            rest, a, b = (pissa if init == "pissa" else olora)(weight, r, layer.scale)
        set_weight(layer, rest)
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
        layer.origin = (layer.lora_a.detach().clone(), layer.lora_b.detach().clone())
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.row_norms())


@torch.no_grad()
def restore_bases(model: GPT, init: str, loftq_steps: int, read: Read) -> None:
    """Restore the quantised bases of training under an adapter that was saved as a change of the published base.

    The adapter is B A - B0 A0, see lora.saved_state: the base is quantised without B0 A0, and the adapter keeps B A.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear) and isinstance(layer.base, QuantizedLinear):
            weight, r = published_weight(model, path, layer, read), len(layer.lora_a) // 2
            a, b = layer.lora_a[r:], -layer.lora_b[:, r:]
            set_weight(layer, rest_of(weight, a, b, layer.scale, init, loftq_steps, as_stored_in(layer.base)))
            layer.lora_b[:, r:] = 0


def rest_of(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, init: str, loftq_steps: int, quantize: Quantize
) -> Tensor:
    """Return the weight of the base in training before quantisation, from the initial A and B."""
    if init == "loftq":
        return weight if loftq_steps == 1 else loftq(weight, len(a), scale, quantize, loftq_steps)[0]
    return weight - scale * b @ a


def published_weight(model: GPT, path: str, layer: LoRALinear, read: Read) -> Tensor:
    """Read the published weight (out, in) of the layer, float32, on its device."""
    base: Any = layer.base
    if not isinstance(base, QuantizedLinear):
        return frozen_weight(base).float()
    name = "embed.weight" if path == "head" and model.config.tied_head else f"{path}.weight"
    return read(name).to(device=layer.lora_a.device, dtype=base.dtype).float()


def as_stored_in(base: QuantizedLinear) -> Quantize:
    """Round a weight to the values that the storage of `base` can hold."""
    return lambda weight: QuantizedLinear(weight.to(base.dtype), None, base.scheme).dequantize().float()


def set_weight(layer: LoRALinear, weight: Tensor) -> None:
    """Replace the weight (out, in) of the base of `layer`, quantised like the old one."""
    base: Any = layer.base
    if isinstance(base, QuantizedLinear):
        bias = None if base.bias is None else base.bias.data
        layer.base = QuantizedLinear(weight.to(base.dtype), bias, base.scheme)
    else:
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)  # a tied embedding keeps its own
