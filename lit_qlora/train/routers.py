"""The health of routers: how evenly the tokens of a step go to experts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_qlora.model.mlp import Router

METRICS = ("router_entropy", "router_most", "router_idle")
"""Entropy of the experts' shares of choices, of which 1 is even, the mean over blocks; the largest share of one expert,
of which 1 / n_expert is even, over all blocks; the share of experts that no token took."""


class RouterHealth:
    """Counts on the device which experts the tokens of a step take, tokens of padding too.

    Attributes:
        taken: (blocks, n_expert) int64, choices since the last `measure`; None for a model without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module in model.modules() if isinstance(module, Router)]
        self.taken: Tensor | None = None
        self.device = next(model.parameters()).device
        if routers:
            self.taken = torch.zeros(len(routers), len(routers[0].weight), dtype=torch.int64, device=self.device)
            for router, row in zip(routers, self.taken, strict=True):
                router.taken = row

    def measure(self, summed: Callable[[Tensor], Tensor]) -> Tensor:
        """The METRICS, (3,) float32 on the device, or (0,) without experts; counting begins anew.

        Args:
            summed: adds up what the processes have.
        """
        if self.taken is None:
            return torch.zeros(0, device=self.device)
        taken = summed(self.taken.clone())
        self.forget()
        share = taken / taken.sum(dim=1, keepdim=True).clamp_min(1)
        entropy = torch.special.entr(share).sum(dim=1).mean() / math.log(max(2, share.size(1)))
        return torch.stack((entropy, share.max(), (taken == 0).float().mean()))

    def forget(self) -> None:
        """Begin anew."""
        if self.taken is not None:
            self.taken.zero_()
