"""The speed of the fast path, estimated from the operations of a step and the rates that were measured on one card."""

from collections.abc import Mapping, Sequence
from functools import cache

from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import Recompute

MEASURED_ON = ("H100 80GB", "H200")
"""GPUs whose rate is known; both compute alike. Source: benchmarks/results.csv."""
RATE, RATE_OF_EXPERTS = 520e12, 425e12
"""Operations a second of a step in bfloat16, of dense models and of mixtures."""
AGAIN: Mapping[Recompute, float] = {
    "none": 0.0, "mlp": 0.4, "attn": 0.5, "offload": 0.5, "full": 0.75, "full-offload": 0.75
}  # fmt: skip
"""Share of a block's forward pass that a backward pass takes longer; of "mlp" by its operations, others measured."""
LAUNCHES = 0.0025
"""Seconds that the host takes to launch a block's kernels, forward and backward, without CUDA graphs."""
OTHER_KINDS = ("kv_latent_size", "delta_layers", "conv_layers", "per_layer_size")
"""Fields of models with layers whose rate was not measured."""


def tokens_per_second(model: ModelConfig, recompute: Sequence[Recompute], rows: int, length: int) -> float | None:
    """Estimate the speed of steps with a micro-batch of so many rows of `length` tokens on a GPU of MEASURED_ON.

    Frozen weights have no gradients, so the backward pass has as many operations as the forward pass.

    Args:
        recompute: of each block.

    Returns:
        None for a model with layers whose rate was not measured.
    """
    if any(getattr(model, name) for name in OTHER_KINDS):
        return None
    attended = model.n_layer * model.n_head * model.head_size * min(length, model.sliding_window or length)
    forward = 2.0 * _multiplied(model) + 2.0 * attended
    backward = 2.0 * _multiplied(model) + 5.0 * attended
    again = forward * sum(AGAIN[policy] for policy in recompute) / len(recompute)
    rate = RATE_OF_EXPERTS if model.n_expert else RATE
    seconds = max(rows * length * (forward + backward + again) / rate, LAUNCHES * model.n_layer)
    return rows * length / seconds


@cache
def _multiplied(model: ModelConfig) -> float:
    """Count the weights that a token is multiplied with."""
    count = float(model.vocab_size * model.n_embd if model.tied_head else 0)
    for name, parameter in GPT.skeleton(model).named_parameters():
        if parameter.ndim == 2 and not name.startswith(("embed.", "positions.")):
            met = model.n_expert_per_token / model.n_expert if ".experts." in name else 1.0
            count += parameter.numel() * met
    return count
