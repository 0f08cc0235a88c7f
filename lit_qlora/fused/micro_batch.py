"""A micro-batch on its way through the model: its inputs, its saved activations, and its two passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_qlora.fused.block import SavedBlock
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.passes import Pass
from lit_qlora.model.mlp import Seen


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass besides the weights, on the device.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) int32, rows of the table of learned positions; None without one.
        by_token: the loss of each token is wanted, not their sum.
        states: the last stream at the labelled tokens is wanted, not their losses.
    """

    tokens: Tensor
    positions: Tensor | None
    labelled: Labelled
    run: Pass
    by_token: bool = False
    states: bool = False


@dataclass
class SavedPass:
    """The activations that a forward pass saves for its backward pass.

    Attributes:
        tokens: (T,), see Inputs.
        d_out: gradient of the loss at the last stream, (T, E).
        blocks: of each block; None in a pass that saves nothing.
        head_gradients: of the head's adapter, and the terms to add to them.
        number: of the forward pass; a later one overwrites the tensors on the host.
        picked: (N,) int64, of the T tokens those whose stream was wanted instead of losses; None where losses were.
    """

    tokens: Tensor
    d_out: Tensor | None
    blocks: list[SavedBlock | None]
    head_gradients: list[tuple[Tensor, Tensor]]
    number: int
    picked: Tensor | None = None


class Trainable(Protocol):
    """The forward and the backward pass of a model."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, SavedPass]:
        """The loss, or the losses (T, 1) or states (N, E) of tokens, and the activations for the backward pass."""
        ...

    def backward(self, d_loss: Tensor, saved: SavedPass, run: Pass) -> None:
        """Add the adapters' gradients."""
        ...


class Work(Protocol):
    """The two passes of a micro-batch.

    Attributes:
        seen: what the routers computed in the forward pass, if somebody looks.
    """

    @property
    def seen(self) -> Seen:
        """See above."""
        ...

    def forward(self) -> Tensor:
        """The loss."""
        ...

    def backward(self, d_loss: Tensor, d_scores: Sequence[Tensor | None]) -> None:
        """Add the adapters' gradients, given those of the loss and of the scores that were seen."""
        ...


class Eager:
    """Passes whose kernels are launched one by one."""

    def __init__(self, model: Trainable, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    @property
    def seen(self) -> Seen:
        """See Work."""
        return self.inputs.run.seen or []

    def forward(self) -> Tensor:
        """The loss."""
        loss, self.saved = self.model.forward(self.inputs)
        return loss

    def backward(self, d_loss: Tensor, d_scores: Sequence[Tensor | None]) -> None:
        """See Work."""
        self.inputs.run.d_scores = list(d_scores)
        self.model.backward(d_loss, self.saved, self.inputs.run)


class Loss(torch.autograd.Function):
    """The whole model as one function, which writes the adapters' gradients straight to their .grad."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, work: Work) -> tuple[Tensor, ...]:
        """The loss, and the scores that were seen; `anchor` stands for the adapters in autograd's graph."""
        ctx.work = work
        ctx.set_materialize_grads(False)
        loss = work.forward()
        return loss, *(scores for scores, _ in work.seen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        """Once only: it uses up the saved activations."""
        work, ctx.work = ctx.work, None
        d_loss, *d_scores = gradients
        work.backward(d_loss, d_scores)
        return None, None
