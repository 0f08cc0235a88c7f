"""The gate of the expert that every token goes to: the sigmoid of a learnt score of the token (Qwen2-MoE)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_qlora.fused.group import Group
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.kernels.dropout import Dropout


@dataclass
class SavedGate:
    """Activations of a SharedGate for its backward pass.

    Attributes:
        given: (T, E), what the expert gives.
        share: (T, 1), what is left of it.
        z: (T, r), see Group.
    """

    given: Tensor
    share: Tensor
    z: Tensor | None


class SharedGate:
    """sigmoid(score(x)) * given, where the score is a linear layer with one output.

    Args:
        number: for dropout, see Group.dropout.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, number: int) -> None:
        self.group, self.number = Group([layer], dtype), number

    def forward(self, x: Tensor, given: Tensor, run: Pass) -> tuple[Tensor, SavedGate]:
        """The product (T, E), and what its backward pass reads; x is (T, E), rows contiguous."""
        group, both, z = self.group, x, None
        if group.a is not None:
            both = group.empty_input(len(x))
            z = group.project(x, both, self._dropout(run), copy=True)
        share = torch.sigmoid(group.product(both, group.matrix(run.workspaces[0])))
        return share * given, SavedGate(given, share, z)

    def backward(self, x: Tensor, d_out: Tensor, saved: SavedGate, back: Backward) -> tuple[Tensor, Tensor]:
        """The gradients of what the expert gives and of x, both (T, E); the adapter's is added in place."""
        group, dropout, share = self.group, self._dropout(back.forward), saved.share
        d_share = (d_out * saved.given).sum(1, keepdim=True)
        d_score = d_share * share * (1 - share)
        group.add_grad_b(d_score, saved.z, back.pending)
        d_x, dz = group.back(d_score, back.workspaces[0])
        group.add_grad_a(x, dz, back.pending, dropout)
        return d_out * share, group.d_input(d_x, dz, dropout)

    def _dropout(self, run: Pass) -> Dropout:
        return self.group.dropout(run.seed, self.number)
