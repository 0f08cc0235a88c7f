"""A micro-batch on its way through the model: its inputs, its saved activations, and its two passes."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_qlora.fused.block import SavedBlock
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.passes import Pass


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass besides the weights, on the device.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) int32, rows of the table of learned positions; None without one.
        by_token: the loss of each token is wanted, not their sum.
    """

    tokens: Tensor
    positions: Tensor | None
    labelled: Labelled
    run: Pass
    by_token: bool = False


@dataclass
class SavedPass:
    """The activations that a forward pass saves for its backward pass.

    Attributes:
        d_out: gradient of the loss at the last stream, (T, E).
        blocks: of each block; None in a pass that saves nothing.
        head_gradients: of the head's adapter, and the terms to add to them.
        number: of the forward pass; a later one overwrites the tensors on the host.
    """

    d_out: Tensor | None
    blocks: list[SavedBlock | None]
    head_gradients: list[tuple[Tensor, Tensor]]
    number: int


class Trainable(Protocol):
    """The forward and the backward pass of a model."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, SavedPass]:
        """The loss, or the losses (T, 1) of tokens, and the activations for the backward pass."""
        ...

    def backward(self, d_loss: Tensor, saved: SavedPass, run: Pass) -> None:
        """Add the adapters' gradients."""
        ...


class Work(Protocol):
    """The two passes of a micro-batch."""

    def forward(self) -> Tensor:
        """The loss."""
        ...

    def backward(self, d_loss: Tensor) -> None:
        """Add the adapters' gradients."""
        ...


class Eager:
    """Passes whose kernels are launched one by one."""

    def __init__(self, model: Trainable, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    def forward(self) -> Tensor:
        """The loss."""
        loss, self.saved = self.model.forward(self.inputs)
        return loss

    def backward(self, d_loss: Tensor) -> None:
        """Add the adapters' gradients."""
        self.model.backward(d_loss, self.saved, self.inputs.run)


class Loss(torch.autograd.Function):
    """The whole model as one function, which writes the adapters' gradients straight to their .grad."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, work: Work) -> Tensor:
        """The loss; `anchor` stands for the adapters in autograd's graph."""
        ctx.work = work
        return work.forward()

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[None, None]:
        """Once only: it uses up the saved activations."""
        work, ctx.work = ctx.work, None
        work.backward(d_loss[0])
        return None, None
