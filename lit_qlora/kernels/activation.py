"""The step between the products of an MLP: an activation, and the product with a second branch where it is gated."""

from dataclasses import dataclass

from lit_qlora.kernels.launch import tl, triton


@dataclass(frozen=True)
class Activation:
    """An activation, h = function(gate) * up or h = function(up).

    Attributes:
        function: silu, gelu, gelu_tanh or relu2 (So et al. 2021, "Primer").
        gated: True with a second branch that it is multiplied by. Shazeer 2020, "GLU variants improve transformer".
    """

    function: str
    gated: bool

    @property
    def branches(self) -> int:
        """Number of products of width F."""
        return 2 if self.gated else 1


if triton is not None:

    @triton.jit
    def sigmoid(x):
        """1 / (1 + exp(-x)) of float32, in 5 instructions of a GPU where tl.sigmoid has 12.

        The other ones scale what is too small or too large for `exp` and for a division. Here the power of two may
        become 0 or infinite, and a root has no such limits. Their errors are 2^-22.5 and 2^-22.9 of the value.
        """
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
        return root * root

    @triton.jit
    def activate(x, FUNCTION: tl.constexpr):
        """The activation at x, float32, and its derivative there."""
        if FUNCTION == "silu":
            share = sigmoid(x)
            value = x * share
            slope = share + value * (1 - share)
        elif FUNCTION == "gelu":
            share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
            value = x * share
            slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        elif FUNCTION == "relu2":
            positive = tl.maximum(x, 0.0)
            value = positive * positive
            slope = 2 * positive
        else:  # 0.5 (1 + tanh(u)) is sigmoid(2 u); u of Hendrycks & Gimpel 2016
            share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            value = x * share
            slope = share + value * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        return value, slope

    @triton.jit
    def combine_branches(gate, up, FUNCTION: tl.constexpr):
        """The value of function(gate) * up, float32, and its derivatives by gate and by up.

        FUNCTION "clamped" is gpt-oss's: gate at most 7, up within 7, gate * sigmoid(1.702 gate) * (up + 1).
        """
        if FUNCTION == "clamped":
            low, high = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
            share = sigmoid(1.702 * low)
            value = low * share
            slope = tl.where(gate <= 7.0, share + 1.702 * value * (1 - share), 0.0) * (high + 1)
            h, by_up = value * (high + 1), tl.where((up >= -7.0) & (up <= 7.0), value, 0.0)
        else:
            value, slope = activate(gate, FUNCTION)
            h, slope, by_up = value * up, slope * up, value
        return h, slope, by_up

    @triton.jit
    def combine_weighted(gate, up, weight, FUNCTION: tl.constexpr, BEFORE: tl.constexpr):
        """The value of combine_branches with a weight, and its derivatives by gate, by up and by the weight.

        The weight multiplies gate and up if BEFORE, and else what is made of them.
        """
        if BEFORE:
            h, by_gate, by_up = combine_branches(weight * gate, weight * up, FUNCTION)
            by_weight = by_gate * gate + by_up * up
        else:
            by_weight, by_gate, by_up = combine_branches(gate, up, FUNCTION)
            h = weight * by_weight
        return h, weight * by_gate, weight * by_up, by_weight
