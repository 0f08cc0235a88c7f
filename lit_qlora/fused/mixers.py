"""Delta nets, state spaces and short convolutions on the fast path, as functions of autograd that are kernels.

Between the products of a block's stacks there are a convolution, a rule and a norm with a gate, instead of dozens of
torch's operations. They read the product of the first stack where it lies, and their gradients meet in one tensor of
its shape: `Joint`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_qlora.fused.delta_rule import delta_rule, has_kernels
from lit_qlora.fused.documents import Documents
from lit_qlora.fused.passes import Pass
from lit_qlora.kernels.causal_conv import HeadConv, convolve, convolve_backward
from lit_qlora.kernels.delta_gates import gates_backward, gates_forward
from lit_qlora.kernels.gated_conv import GatedConv, gated_conv, gated_conv_backward
from lit_qlora.kernels.gated_norm import GatedNorm, gated_norm, gated_norm_backward
from lit_qlora.model.delta_net import EPS, DeltaNet
from lit_qlora.model.short_conv import ShortConv
from lit_qlora.model.state_space import StateSpace, state_rule

Product = Callable[[Tensor], Tensor]
"""Of all layers of a stack, (T, K) -> (T, N)."""
Mixer = Callable[[Tensor, Pass], Tensor]
"""(T, E) -> (T, E)."""


def mixer_of_kernels(module: nn.Module, products: Sequence[Product]) -> Mixer | None:
    """Return the function that computes a module in the place of attention; None for attention.

    Args:
        products: of the module's layers, as kernel_block.mixing_layers lists them.
    """
    kinds = {DeltaNet: DeltaMixer, StateSpace: StateMixer, ShortConv: ConvMixer}
    kind: Any = kinds.get(type(module))
    return None if kind is None else kind(module, *products)


class DeltaMixer:
    """A gated delta net."""

    def __init__(self, module: DeltaNet, into: Product, shares: Product, projection: Product) -> None:
        c = module.config
        keys, values = c.delta_key_heads * c.delta_key_size, c.delta_value_heads * c.delta_value_size
        self.config, self.into, self.shares, self.projection = c, into, shares, projection
        self.conv = HeadConv(_taps(module.conv), None, keys, values, c.delta_key_size, c.delta_key_size**-0.5, EPS)
        self.rate, self.bias = module.decay_rate.detach().float().exp(), module.decay_bias.detach().float()
        self.norm = GatedNorm(module.norm.weight.detach(), c.norm_eps, c.delta_value_heads)

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        """See Mixer."""
        c, documents, joint = self.config, run.documents, Joint()
        assert documents is not None
        stacked = self.into(x)
        kept, beta = _Gates.apply(self.shares(x), self.rate, self.bias)
        q, k, v = _Convolve.apply(stacked, documents.firsts, self.conv, joint)
        q, k = (t.unflatten(1, (c.delta_key_heads, -1)) for t in (q, k))
        v = v.unflatten(1, (c.delta_value_heads, -1))
        y = delta_rule(q, k, v, kept, beta, documents, has_kernels(x.device, c.delta_key_size))
        return self.projection(_GatedNorm.apply(y, stacked, self.norm, joint))


class StateMixer:
    """A state space; its rule is torch's."""

    def __init__(self, module: StateSpace, into: Product, decay: Product, projection: Product) -> None:
        c = module.config
        keys, values = c.delta_key_heads * c.delta_key_size, c.delta_value_heads * c.delta_value_size
        self.module, self.into, self.decay, self.projection = module, into, decay, projection
        bias = None if module.conv_bias is None else _keys_first(module.conv_bias.detach(), keys, values)
        taps = _taps(_keys_first(module.conv.detach(), keys, values))
        self.conv = HeadConv(taps, bias, keys, values, c.delta_key_size)
        self.norm = GatedNorm(module.norm.weight.detach(), c.norm_eps, c.delta_key_heads, before=True)

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        """See Mixer."""
        documents, joint = run.documents, Joint()
        assert documents is not None
        stacked = self.into(x)
        parts = _Convolve.apply(stacked, documents.firsts, self.conv, joint)
        inputs = [t.unflatten(0, (documents.rows, documents.length)) for t in (*parts, self.decay(x))]
        # The matrices of the chunks are larger than all that they are made of.
        y = checkpoint(self._rule, *inputs, documents, use_reentrant=False, preserve_rng_state=False)
        return self.projection(_GatedNorm.apply(y.flatten(0, 1), stacked, self.norm, joint))

    def _rule(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, documents: Documents) -> Tensor:
        """(B, T, ...) -> (B, T, H Dv)."""
        module, c = self.module, self.module.config
        q, k = (t.unflatten(-1, (c.delta_key_heads, -1)).float() for t in (q, k))
        q, k = (t.repeat_interleave(c.delta_value_heads // c.delta_key_heads, dim=2) for t in (q, k))
        values = v.unflatten(-1, (c.delta_value_heads, -1)).float()
        step = F.softplus(decay.float() + module.decay_bias.detach().float())  # (B, T, H)
        kept = -module.decay_rate.detach().float().exp() * step
        y, _ = state_rule(q, k, values * step[..., None], kept, documents.numbers)
        return (y + module.skip.detach().float()[:, None] * values).to(v.dtype).flatten(2)


class ConvMixer:
    """A short convolution between two gates."""

    def __init__(self, module: ShortConv, into: Product, projection: Product) -> None:
        self.into, self.projection = into, projection
        self.conv = GatedConv(_taps(module.conv), None if module.bias is None else module.bias.detach())

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        """See Mixer."""
        assert run.documents is not None
        return self.projection(_GatedConv.apply(self.into(x), run.documents.firsts, self.conv))


class Joint:
    """The gradient of a stack's product, whose columns come from two functions.

    The gate of a rule's output is read after the rule, so its gradient comes first: it makes the tensor, and the
    convolution before the rule returns it.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def taken(self) -> Tensor:
        """The tensor, which is given away."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None
        return gradient


class _Convolve(torch.autograd.Function):
    """See kernels.causal_conv."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, firsts: Tensor, conv: HeadConv, joint: Joint) -> tuple[Tensor, Tensor, Tensor]:
        """(T, N) -> (T, K), (T, K), (T, V)."""
        ctx.conv, ctx.joint = conv, joint
        ctx.save_for_backward(x, firsts)
        return convolve(x, firsts, conv)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, with that of the gates."""
        x, firsts = ctx.saved_tensors
        d_x = ctx.joint.taken()
        dq, dk, dv = (gradient.contiguous() for gradient in gradients)
        convolve_backward(dq, dk, dv, x, firsts, ctx.conv, d_x)
        return d_x, None, None, None


class _Gates(torch.autograd.Function):
    """See kernels.delta_gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 2 H) -> twice (T, H)."""
        ctx.save_for_backward(x, rate, bias)
        return gates_forward(x, rate, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        d_kept, d_beta = (gradient.contiguous() for gradient in gradients)
        return gates_backward(d_kept, d_beta, *ctx.saved_tensors), None, None


class _GatedNorm(torch.autograd.Function):
    """See kernels.gated_norm."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, stacked: Tensor, norm: GatedNorm, joint: Joint) -> Tensor:
        """(T, V), and (T, N) with the gates in its last V columns -> (T, V)."""
        ctx.norm, ctx.joint = norm, joint
        ctx.save_for_backward(y, stacked)
        return gated_norm(y, stacked[:, -y.size(1) :], norm)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of y; that of the gates is for the convolution to return."""
        y, stacked = ctx.saved_tensors
        ctx.joint.gradient = joint = torch.empty_like(stacked)
        width = y.size(1)
        d_y = gated_norm_backward(gradients[0].contiguous(), y, stacked[:, -width:], ctx.norm, joint[:, -width:])
        return d_y, None, None, None


class _GatedConv(torch.autograd.Function):
    """See kernels.gated_conv."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, firsts: Tensor, conv: GatedConv) -> Tensor:
        """(T, 3 E) -> (T, E)."""
        ctx.conv = conv
        ctx.save_for_backward(x, firsts)
        return gated_conv(x, firsts, conv)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        x, firsts = ctx.saved_tensors
        return gated_conv_backward(gradients[0].contiguous(), x, firsts, ctx.conv), None, None


def _taps(weight: Tensor) -> Tensor:
    """The weights (C, 1, W) of a convolution as the kernels read them, (W, C)."""
    return weight.detach()[:, 0].T.contiguous()


def _keys_first(x: Tensor, keys: int, values: int) -> Tensor:
    """Features in the order query, key, value, given value, key, query."""
    v, k, q = x.split((values, keys, keys))
    return torch.cat((q, k, v))
