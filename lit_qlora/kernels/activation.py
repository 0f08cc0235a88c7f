"""What stands between the products of an MLP: an activation, and the product with a second branch where it is gated."""

from dataclasses import dataclass

from lit_qlora.kernels.launch import tl, triton


@dataclass(frozen=True)
class Activation:
    """An activation, h = function(gate) * up or h = function(up).

    Attributes:
        function: silu, gelu or gelu_tanh.
        gated: whether there is a branch that it is multiplied by. Shazeer 2020, "GLU variants improve transformer".
    """

    function: str
    gated: bool

    @property
    def branches(self) -> int:
        """How many products of width F there are."""
        return 2 if self.gated else 1


if triton is not None:

    @triton.jit
    def activate(x, FUNCTION: tl.constexpr):
        """The activation at x, float32, and its derivative there."""
        if FUNCTION == "silu":
            share = tl.sigmoid(x)
            value = x * share
            slope = share + value * (1 - share)
        elif FUNCTION == "gelu":
            share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
            value = x * share
            slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        else:  # 0.5 (1 + tanh(u)) is sigmoid(2 u); u of Hendrycks & Gimpel 2016
            share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            value = x * share
            slope = share + value * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        return value, slope
