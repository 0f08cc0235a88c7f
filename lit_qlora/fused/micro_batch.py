"""A micro-batch on its way through the model: what it reads, what its forward pass leaves, and its two passes."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_qlora.fused.block import SavedBlock
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.passes import Pass


@dataclass(frozen=True)
class Inputs:
    """What a forward pass reads besides the weights, on the device.

    Attributes:
        tokens: (T,) int64.
        places: (T,) int32, rows of the table of learned positions; None without one.
    """

    tokens: Tensor
    places: Tensor | None
    labelled: Labelled
    run: Pass


@dataclass
class SavedPass:
    """What a forward pass leaves for its backward pass.

    Attributes:
        d_out: gradient of the loss at the last stream, (T, E).
        kept: of each block.
        waiting: the head adapter's gradients, and what has to be added to them.
        number: of the forward pass, among those that may put something on the host.
    """

    d_out: Tensor | None
    kept: list[SavedBlock | None]
    waiting: list[tuple[Tensor, Tensor]]
    number: int


class Trainable(Protocol):
    """The forward and the backward pass of a model."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, SavedPass]:
        """The loss, and what the backward pass needs."""
        ...

    def backward(self, d_loss: Tensor, learnt: SavedPass, run: Pass) -> None:
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
    """The whole model as one function; the adapters' gradients go straight to where their .grad lies."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, work: Work) -> Tensor:
        """The loss; `anchor` is what autograd sees of the adapters."""
        ctx.work = work
        return work.forward()

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[None, None]:
        """Once only: what the forward pass has left is used up."""
        work, ctx.work = ctx.work, None
        work.backward(d_loss[0])
        return None, None
