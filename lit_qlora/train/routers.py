"""The routers of a mixture in training: how evenly the tokens of a step go to experts, and losses that make them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_qlora.model.mlp import Router, Seen

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


class RouterLosses:
    """Losses of the routers over all blocks and all tokens of a step, without those of padding.

    The shares of choices count as constants, so with those of the whole step each loss is a sum over its tokens: the
    split into micro-batches and processes makes no difference.

    Args:
        balance, z: factors of balance_loss and z_loss; 0 leaves one out.

    Attributes:
        names: of the losses in the log.
        values: the part of this process in each since it was set to zero, without the factor, (len(names),) float32.
    """

    def __init__(self, model: nn.Module, balance: float, z: float) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.config = self.routers[0].config
        factors = {name: factor for name, factor in (("router_balance", balance), ("router_z", z)) if factor}
        self.names, self.balances = tuple(factors), balance > 0
        device = self.routers[0].weight.device
        self.values = torch.zeros(len(factors), device=device)
        self.factors = torch.tensor(list(factors.values()), device=device)

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Collect the scores and choices of a forward pass; recomputation in the backward pass adds none."""
        seen: Seen = []
        try:
            for router in self.routers:
                router.seen = seen
            yield seen
        finally:
            for router in self.routers:
                router.seen = None

    def loss(self, seen: Seen, mask: Tensor, positions: int, counts: Tensor | None = None) -> Tensor:
        """The part of a micro-batch in the losses of its step, times their factors; a scalar.

        Args:
            mask: (N,), 1 for a token and 0 for padding.
            positions: of the step, without padding.
            counts: (n_expert,), choices of the whole step; None if it is this micro-batch.
        """
        assert len(seen) == len(self.routers), "each block shows its scores once"
        found = []
        if self.balances:
            counts = count_choices(seen, mask) if counts is None else counts
            found.append(balance_loss(seen, mask, positions, counts, self.config.router == "sigmoid"))
        if len(found) < len(self.names):
            found.append(z_loss(seen, mask, positions))
        losses = torch.stack(found)
        self.values += losses.detach()
        return losses @ self.factors


def count_choices(seen: Seen, mask: Tensor) -> Tensor:
    """Count the tokens that chose each expert, over all blocks, (n_expert,); see RouterLosses.loss."""
    counts = mask.new_zeros(seen[0][0].size(-1))
    for _, chosen in seen:
        counts.index_add_(0, chosen.flatten(), mask.repeat_interleave(chosen.size(-1)))
    return counts


def balance_loss(seen: Seen, mask: Tensor, positions: int, counts: Tensor, sigmoid: bool = False) -> Tensor:
    """n_expert times the sum over experts of choices a token and mean probability; k if both are even.

    Fedus et al. 2021 (Switch Transformers), eq. 4 to 6, with all blocks together as transformers has it. Probabilities
    are the softmax of scores; with `sigmoid` the sigmoids divided by their sum (DeepSeek-AI 2024b, eq. 17 to 20).
    """
    total = len(seen) * positions
    shares = [_normalized(scores.sigmoid()) if sigmoid else scores.softmax(dim=-1) for scores in _scores(seen)]
    probability = torch.stack([mask @ one for one in shares]).sum(dim=0) / total
    return len(counts) * (counts / total) @ probability


def z_loss(seen: Seen, mask: Tensor, positions: int) -> Tensor:
    """The mean of the square of the log of the sum of exponentials of a token's scores. Zoph et al. 2022 (ST-MoE)."""
    squares = [mask @ scores.logsumexp(dim=-1).square() for scores in _scores(seen)]
    return torch.stack(squares).sum() / (len(seen) * positions)


def _normalized(shares: Tensor) -> Tensor:
    return shares / shares.sum(dim=-1, keepdim=True)


def _scores(seen: Seen) -> Sequence[Tensor]:
    """In float32 at least; autocast makes them of 16 bits."""
    return [scores.to(torch.promote_types(scores.dtype, torch.float32)) for scores, _ in seen]
