"""A dense MLP and experts beside each other (Gemma 4): post(mlp(norm_2(x))) + post'(experts(norm(x))), routed by x."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.experts import Experts, SavedExperts
from lit_qlora.fused.kernel_block import norm_of
from lit_qlora.fused.mlp import DenseMlp, SavedMlp
from lit_qlora.fused.offload import OnHost
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.kernels.norm import Norm, add_norm, apply_norm, norm_backward, post_norm_backward
from lit_qlora.model.config import ModelConfig


@dataclass
class SavedBeside:
    """Activations of both, and what each gives before the norm behind it, (T, E)."""

    dense: SavedMlp
    experts: SavedExperts
    plain: Tensor
    mixed: Tensor


class MlpBeside:
    """See Mlp. The input of the experts is not saved: the stream and their norm give it.

    Attributes:
        own_norm: before the experts.
        post_dense, post_experts: behind each.
    """

    def __init__(
        self, block: Any, norm: Norm, config: ModelConfig, dtype: torch.dtype, number: int, like: Tensor
    ) -> None:
        beside = block.beside
        self.own_norm, self.post_experts, self.post_dense = (
            norm_of(module, like) for module in (beside.norm, beside.mlp_post_norm, beside.plain_post_norm)
        )
        self.experts = Experts(beside.mlp, dtype, number)
        # Experts have the numbers for dropout that a block's MLP has; see ExpertMlp.
        self.dense = DenseMlp(block.mlp, norm, config, dtype, config.n_layer + 1 + number, fp8=False)
        self.groups = (*self.experts.groups, *self.dense.groups)

    def norm(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See Mlp; the input is that of the dense MLP."""
        return self.dense.norm(x, y)

    def forward(
        self, normed: list[Tensor], statistics: Tensor, stream: Tensor, run: Pass, saves: bool
    ) -> tuple[Tensor, SavedBeside]:
        """See Mlp."""
        plain, dense = self.dense.forward(normed, statistics, stream, run, saves)
        x = apply_norm(self.own_norm, stream)
        mixed, experts = self.experts.forward(x, None, run, saves, routed=stream)
        out = apply_norm(self.post_dense, plain).add_(apply_norm(self.post_experts, mixed))
        return out, SavedBeside(dense, experts, plain, mixed)

    def backward(
        self,
        d_y: list[Tensor],
        stream: list[Tensor | OnHost],
        saved: SavedBeside,
        d_out: Tensor,
        back: Backward,
        ahead: Sequence[Tensor | OnHost | None],
    ) -> Tensor:
        """See Mlp."""
        get = back.forward.offload.get
        x, y = get(stream[0]), get(stream[1]) if len(stream) > 1 else None
        stream.clear()
        normed = torch.empty_like(x)
        middle, statistics = add_norm(x, y, self.own_norm, normed)
        del x, y
        d_mixed = post_norm_backward(self.post_experts, saved.mixed, d_y[0])
        dn, d_routed = self.experts.backward(d_mixed, normed, saved.experts, back, routed=middle)
        del d_mixed, normed
        assert d_routed is not None
        d_middle = norm_backward(dn, middle, self.own_norm, statistics, residual=d_routed.add_(d_out))
        del dn, d_routed
        d_y[0] = post_norm_backward(self.post_dense, saved.plain, d_y[0])
        handed: list[Tensor | OnHost] = [middle]
        del middle
        return self.dense.backward(d_y, handed, saved.dense, d_middle, back, ahead)
