"""Smaller ranks for an adapter, each with the least loss of its update (Eckart & Young 1936)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_qlora.errors import UsageError
from lit_qlora.settings import LoRAConfig


@dataclass(frozen=True)
class Spectrum:
    """scale B A of a layer as left diag(values) right.

    Attributes:
        left: (out, r), orthonormal columns; values: (r,), falling; right: (r, in), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def spectra(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Spectrum]:
    """Compute the singular value decomposition of each layer's update without forming the update.

    Args:
        state: "<layer>.lora_a" (r, in) and "<layer>.lora_b" (out, r).
    """
    found = {}
    for layer in (name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")):
        a, b = state[f"{layer}.lora_a"].double(), state[f"{layer}.lora_b"].double()
        q_b, r_b = torch.linalg.qr(b)  # (out, r), (r, r)
        q_a, r_a = torch.linalg.qr(a.T)  # (in, r), (r, r)
        u, values, v = torch.linalg.svd(config.scale(layer) * r_b @ r_a.T)
        found[layer] = Spectrum(q_b @ u, values, v @ q_a.T)
    return found


def loss_at(found: Mapping[str, Spectrum], rank: int) -> tuple[float, float]:
    """Return the loss of a cut to `rank`, of all layers and the worst: the norm cut off, relative to the update's norm.

    A layer whose update is zero loses nothing.
    """
    squares = {layer: (s.values[rank:].square().sum(), s.values.square().sum()) for layer, s in found.items()}
    lost, whole = (torch.stack(part).sum() for part in zip(*squares.values(), strict=True))
    worst = max(float((part / size).sqrt()) if size else 0.0 for part, size in squares.values())
    return float((lost / whole).sqrt()) if whole else 0.0, worst


def cut(
    state: Mapping[str, Tensor], found: Mapping[str, Spectrum], config: LoRAConfig, rank: int
) -> tuple[dict[str, Tensor], LoRAConfig]:
    """Return the adapter of this rank that is nearest to `state`, and its settings; the scale of B A is the same.

    Tensors other than A and B do not change.
    """
    scale = config.scale("")
    smaller = replace(
        config,
        r=rank,
        alpha=scale * rank ** (0.5 if config.rslora else 1),
        rank_pattern={},
        alpha_pattern={},
        tied=False,
    )
    cut_state = dict(state)
    for layer, spectrum in found.items():
        values = torch.zeros(rank, dtype=torch.float64)
        kept = min(rank, len(spectrum.values))
        values[:kept] = (spectrum.values[:kept] / scale).sqrt()
        a = torch.zeros(rank, spectrum.right.size(1), dtype=torch.float64)
        b = torch.zeros(spectrum.left.size(0), rank, dtype=torch.float64)
        a[:kept], b[:, :kept] = spectrum.right[:kept], spectrum.left[:, :kept]
        cut_state[f"{layer}.lora_a"], cut_state[f"{layer}.lora_b"] = (values[:, None] * a).float(), (b * values).float()
    return cut_state, smaller


def candidates(found: Mapping[str, Spectrum]) -> list[int]:
    """List the ranks to try: powers of two below the largest rank, and the largest."""
    most = max(len(spectrum.values) for spectrum in found.values())
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def smallest_rank(found: Mapping[str, Spectrum], loss: float) -> int:
    """Find the smallest rank that loses at most `loss` over all layers.

    Raises:
        UsageError: if no rank below the present one does.
    """
    most = max(len(spectrum.values) for spectrum in found.values())
    rank = next((rank for rank in range(1, most) if loss_at(found, rank)[0] <= loss), None)
    if rank is None:
        raise UsageError(f"max_loss {loss:g}: every rank below {most} loses more.")
    return rank
