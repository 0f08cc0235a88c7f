"""Adapters of one stack whose ranks or scales differ: the smaller ones are padded with zeros to the largest rank.

A layer's A gets rows of zeros, and its B columns of zeros. In the stack B is multiplied by its scale over that of the
stack. Zeros stay zeros: dZ is zero where columns of B are, and Z is where rows of A are. Rows of A lie end to end, so A
is a view of the stack. Columns of B do not, so B stays where it was and is copied to the stack and back. So it is with
DoRA, where the gradient of a row of B is a factor of what the stack's is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_qlora.lora.layer import LoRALinear


@dataclass(frozen=True)
class PaddedB:
    """The B of an adapter in a stack with a larger rank or another scale.

    Attributes:
        b: (out, r), which learns; gradient: its own.
        in_stack, gradient_in_stack: its columns in the stack, (out, r) views.
        factor: its scale over that of the stack.
        gains: (out, 1) factors of its gradient; None for 1.
    """

    b: nn.Parameter
    gradient: Tensor
    in_stack: Tensor
    gradient_in_stack: Tensor
    factor: float
    gains: Tensor | None = None

    @staticmethod
    def of(
        layer: LoRALinear, factor: float, in_stack: Tensor, gradient_in_stack: Tensor, gains: Tensor | None = None
    ) -> "PaddedB":
        """The B of a layer, with a gradient of zeros."""
        return PaddedB(layer.lora_b, torch.zeros_like(layer.lora_b.data), in_stack, gradient_in_stack, factor, gains)

    def copy(self) -> None:
        """Copy it to the stack."""
        torch.mul(self.b.detach(), self.factor, out=self.in_stack)

    def collect(self) -> None:
        """Add the gradient in the stack to its own."""
        if self.gains is None:
            self.gradient.add_(self.gradient_in_stack, alpha=self.factor)
        else:
            self.gradient.addcmul_(self.gradient_in_stack, self.gains, value=self.factor)
        self.gradient_in_stack.zero_()


def differ(adapters: Sequence[LoRALinear]) -> bool:
    """Tell whether ranks or scales differ, or rows of B have factors of their own."""
    scaled = any(adapter.magnitude is not None for adapter in adapters)
    return scaled or len({(adapter.lora_a.size(0), adapter.scale) for adapter in adapters}) > 1


def padding(adapters: Sequence[LoRALinear]) -> int:
    """Elements of a stack of adapters that do not learn: zeros, and copies of B."""
    if not differ(adapters):
        return 0
    r = max(adapter.lora_a.size(0) for adapter in adapters)
    rows_of_a = sum((r - adapter.lora_a.size(0)) * adapter.in_features for adapter in adapters)
    return rows_of_a + sum(r * adapter.out_features for adapter in adapters)
