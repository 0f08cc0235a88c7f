"""A block in the terms of the kernels; shared by training and decoding."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.fused.attention import Heads
from lit_qlora.fused.qkv_transforms import norms_heads
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.norm import Norm
from lit_qlora.model.attention import Attention
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.delta_net import DeltaNet
from lit_qlora.model.latent_attention import LatentAttention, Narrowed
from lit_qlora.model.mlp import GatedMLP, MoE
from lit_qlora.model.norm import LayerPlusOne, RMSPlusOne
from lit_qlora.model.short_conv import ShortConv
from lit_qlora.model.state_space import StateSpace

ACTIVATIONS = {
    "swiglu": Activation("silu", gated=True),
    "geglu": Activation("gelu", gated=True),
    "geglu_tanh": Activation("gelu_tanh", gated=True),
    "gelu": Activation("gelu", gated=False),
    "gelu_tanh": Activation("gelu_tanh", gated=False),
    "relu2": Activation("relu2", gated=False),
}
"""The kernels' name for each kind of ModelConfig.ffn that they compute."""


class KernelBlock:
    """The norms of a block, and where it stands in the model.

    Attributes:
        parallel: attention and MLP read the same stream.
        post_1, post_2: the norms behind attention and MLP, times ModelConfig.residual_multiplier.
        windowed: it has a sliding window, and the rope of such blocks.
        window: tokens of that window; None without one.
        rotates, scaled: it rotates queries and keys, and multiplies queries by a factor of their position.
        scale: (1,), the factor of what leaves it; None for none.
    """

    def __init__(self, block: Any, config: ModelConfig, number: int, like: Tensor) -> None:
        self.number, self.parallel, share = number, config.parallel_residual, config.residual_multiplier
        self.norm_1 = norm_of(block.norm_1, like)
        self.norm_2 = self.norm_1 if config.shared_norm else norm_of(block.norm_2, like)
        self.post_1, self.post_2 = (norm_of(norm, like, share) for norm in (block.post_norm_1, block.post_norm_2))
        self.windowed, self.rotates = config.windowed(number), config.rotates(number)
        self.scaled = config.scales_queries(number)
        self.interleaved = config.rope_interleaved
        self.window = config.sliding_window if self.windowed else None
        self.scale = None if block.scale is None else block.scale.detach()


def heads_of(attn: Any, config: ModelConfig, windowed: bool) -> Heads:
    """Return the sizes of a block's attention, which has a sliding window or none."""
    return Heads(
        config.n_head,
        config.kv_heads_of(windowed),
        config.head_size_of(windowed),
        config.attention_scale,
        config.sliding_window if windowed else None,
        config.attention_softcap,
        None if attn.sinks is None else attn.sinks.detach(),
    )


def mixer_of(block: Any) -> Any:
    """Return what mixes the tokens in a block of the plain model: attention, or what takes its place."""
    return block.attn or block.delta or block.conv


def takes_torch(block: Any, config: ModelConfig) -> bool:
    """Tell whether no kernel computes what mixes the tokens in a block; see lit_qlora.fused.torch_block."""
    return not isinstance(block.attn, Attention) or (block.attn.query_gate is not None and not norms_heads(config))


def mixing_layers(mixer: Any) -> list[list[nn.Module]]:
    """Return the layers of what mixer_of gives in the order in which they are computed, one list for each input.

    A delta net's or state space's layers with an output for each head are a list of their own.
    """
    if isinstance(mixer, ShortConv):
        return [[mixer.into], [mixer.projection]]
    if isinstance(mixer, DeltaNet):
        wide: list[nn.Module] = [mixer.query, mixer.key, mixer.value, mixer.output_gate]
        return [wide, [mixer.beta, mixer.decay], [mixer.projection]]
    if isinstance(mixer, StateSpace):
        return [[mixer.query, mixer.key, mixer.value, mixer.output_gate], [mixer.decay], [mixer.projection]]
    return attention_layers(mixer)


def attention_layers(attn: Any) -> list[list[nn.Module]]:
    """Return the layers of attention in the order in which they are computed, one list for each input."""
    if not isinstance(attn, LatentAttention):
        inputs = (attn.query, attn.key, attn.value, attn.query_gate)
        return [[layer for layer in inputs if layer is not None], [attn.projection]]
    later: list[list[nn.Module]] = [[attn.key, attn.value], [attn.projection]]
    if isinstance(attn.query, Narrowed):
        return [[attn.query.down, attn.latent], [attn.query.up], *later]
    return [[attn.query, attn.latent], *later]


def mixture_of(block: Any) -> MoE | None:
    """Return the mixture of experts of a block of the plain model, if it has one."""
    found = block.mlp if block.beside is None else block.beside.mlp
    return found if isinstance(found, MoE) else None


def dense_mlp_of(block: Any) -> Any:
    """Return what every token goes through, of a block of the plain model: its MLP or a shared expert, or None."""
    return block.mlp.shared if isinstance(block.mlp, MoE) else block.mlp


def mlp_layers(mlp: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the layers that read the MLP's input, and the layers that read the activation's output."""
    return [mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) else [mlp.up], [mlp.down]


def norm_of(module: nn.Module, like: Tensor, factor: float = 1.0) -> Norm:
    """The norm of a module, none for an Identity, times `factor`.

    Args:
        like: (E,), of the dtype that the factor is rounded to, and on the device.
    """
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    weight, bias = (None if tensor is None else tensor.detach() for tensor in (weight, bias))
    if isinstance(module, RMSPlusOne | LayerPlusOne):
        weight = 1 + module.weight.detach().float()
    if factor != 1:
        factors = torch.full_like(like, factor).float()
        weight = factors if weight is None else factors * weight.float()
        bias = None if bias is None else factors * bias.float()
    if isinstance(module, nn.Identity):
        return Norm("none", weight=weight)
    eps: Any = module.eps
    if isinstance(module, nn.RMSNorm) and weight is None:
        weight = torch.ones_like(like).float()  # which the kernels of an RMS norm multiply with
    return Norm("layer" if isinstance(module, nn.LayerNorm) else "rms", eps, weight, bias)
