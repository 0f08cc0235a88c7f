"""State that the blocks share in a forward pass, and in the backward pass that follows it."""

from dataclasses import dataclass, field

from torch import Tensor

from lit_qlora.fused.attention import Layout
from lit_qlora.fused.memory import ON_HOST
from lit_qlora.fused.offload import Offload, OnHost
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.model.mlp import Seen
from lit_qlora.settings import Recompute

Ropes = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines, (P, R / 2) float32, of blocks without a sliding window and with one."""
Workspaces = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Scratch buffers for dequantised weights: one for any layer, one that keeps qkv and one that keeps the projection
during a block's backward pass. None where no weight needs one."""


@dataclass
class Pass:
    """A pass over a micro-batch.

    Attributes:
        positions: (T,) int32, rows of the rope tables.
        query_scale: (T, 1, 1) float32, for blocks with `scaled`; None where there are none.
        seed: of the dropout, see kernels.dropout; None for none.
        saves: there will be a backward pass.
        carries: weights may be carried over from the backward pass to the next forward pass; see FastSizes.carries.
        seen: to which the forward pass adds what routers computed, block by block; None where nobody looks.
        d_scores: gradients of the seen scores that come from elsewhere; the backward pass takes them from the end.
    """

    layout: Layout
    positions: Tensor
    ropes: Ropes
    query_scale: Tensor | None
    workspaces: Workspaces
    offload: Offload
    seed: Tensor | None
    saves: bool
    carries: bool
    seen: Seen | None = None
    d_scores: list[Tensor | None] = field(default_factory=list)

    def save(self, tensor: Tensor, policy: Recompute) -> Tensor | OnHost:
        """The tensor, or where a block offloads its copy on the host."""
        return self.offload.put(tensor) if policy in ON_HOST else tensor


@dataclass(frozen=True)
class Backward:
    """The backward pass of one block.

    Attributes:
        forward: the pass that it belongs to.
        pending: sums that the adapters' gradients wait for.
        workspaces: those of the pass; no buffers where the block's weights are carried over.
    """

    forward: Pass
    pending: Pending
    workspaces: Workspaces
