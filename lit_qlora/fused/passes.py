"""State that the blocks share in a forward pass, and in the backward pass that follows it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_qlora.fused.attention import Layout
from lit_qlora.fused.documents import Documents
from lit_qlora.fused.memory import ON_HOST
from lit_qlora.fused.offload import Offload, OnHost
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.model.mlp import Seen
from lit_qlora.settings import Recompute

Ropes = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines, (P, R / 2) float32, of blocks without a sliding window and with one."""
Workspaces = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Scratch buffers for dequantised weights: one for any layer, one that keeps qkv and one that keeps the projection
during a block's backward pass. None where no weight needs one."""


class Lent:
    """Keys and values of a block that later blocks read too, (T, K, D) each, and the sums of their gradients."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k.clone(), v.clone()  # not views, which would hold the block's queries
        self.gradients: list[Tensor] = []

    def add(self, d_k: Tensor, d_v: Tensor) -> None:
        """Add the gradients of a block that has read them, in float32."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (self.k, self.v)]
        for total, more in zip(self.gradients, (d_k, d_v), strict=True):
            total.add_(more)

    def total(self, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, ...]:
        """Those of all blocks, given those of the block itself."""
        own = (d_k, d_v)
        if not self.gradients:
            return own
        return tuple(total.add_(more).to(more.dtype) for total, more in zip(self.gradients, own, strict=True))


@dataclass
class Shared:
    """Tensors of a pass that several blocks read.

    Attributes:
        own: (T, n_layer, per_layer_size), an embedding of each token for each block, or of blocks whose backward pass
            is done the gradient; None without any.
        embedded: (T, E), what they were made of; None where nothing learns from their gradient.
        lent: keys and values that a block has lent to later ones, for blocks with and without a window and rotation.
    """

    own: Tensor | None = None
    embedded: Tensor | None = None
    lent: dict[tuple[bool, bool], Lent] = field(default_factory=dict)


@dataclass
class Pass:
    """A pass over a micro-batch.

    Attributes:
        positions: (T,) int32, rows of the rope tables.
        query_scale: (T, 1, 1) float32, for blocks with `scaled`; None where there are none.
        seed: of the dropout, see kernels.dropout; None for none.
        p: GPT.dropout.
        saves: there will be a backward pass.
        carries: weights may be carried over from the backward pass to the next forward pass; see FastSizes.carries.
        keeps_mlp: see FastSizes.keeps_mlp.
        seen: to which the forward pass adds what routers computed, block by block; None where nobody looks.
        documents: for blocks with a state or a short convolution; None without any. Each forward pass makes them anew.
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
    documents: Documents | None = None
    d_scores: list[Tensor | None] = field(default_factory=list)
    shared: Shared = field(default_factory=Shared)
    p: float = 0.0
    keeps_mlp: bool = False

    def dropout(self, place: int) -> Dropout:
        """The dropout at one of the numbered places where the model itself drops; inputs of adapters are no such."""
        return NONE if self.seed is None or not self.p else Dropout(self.p, self.seed, -1 - place)

    def save(self, tensor: Tensor, policy: Recompute) -> Tensor | OnHost:
        """The tensor, or where a block offloads its copy on the host."""
        return self.offload.put(tensor) if policy in ON_HOST else tensor

    def own_of(self, block: int) -> Tensor:
        """The embedding of each token for a block, (T, per_layer_size)."""
        assert self.shared.own is not None
        return self.shared.own[:, block]


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
