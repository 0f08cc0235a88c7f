"""The objective of a run on comparisons: their log-probabilities, the loss of these, and metrics of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_qlora.data import Step
from lit_qlora.data.batches import AnyBatch
from lit_qlora.data.comparisons import CHOSEN, ELSEWHERE, REJECTED, PairBatch
from lit_qlora.settings.preference import PreferenceConfig
from lit_qlora.train.objective import Sum
from lit_qlora.train.preference_losses import FORMULAS, Pairs, kto

SUMS = (
    *("shares", "right", "margin"),
    *("chosen", "reward_chosen", "logp_chosen", "length_chosen"),
    *("rejected", "reward_rejected", "logp_rejected", "length_rejected"),
    *("steps", "kl"),
)
"""Sums over a step: of pairs, of chosen and of rejected answers, each behind its number, and of KTO's drift."""


class Preferences:
    """Learns from comparisons; see train.objective.Objective.

    Attributes:
        drift: () KTO's estimate of KL(model || reference) for the step.
    """

    predicts = False

    def __init__(self, config: PreferenceConfig, device: torch.device) -> None:
        self.config = config
        self.sums: Tensor = torch.zeros(len(SUMS), device=device)
        self.drift = torch.zeros((), device=device)

    @torch.no_grad()
    def prepare(self, model: Any, batches: Sequence[AnyBatch], total: Sum) -> None:
        """Estimate the drift of KTO over the whole step, so that micro-batches make no difference."""
        if self.config.published.paired:
            return
        sums = torch.zeros(2, device=self.drift.device)
        for batch in batches:
            assert isinstance(batch, PairBatch)
            here = on(batch, self.drift.device)
            gained = answers_of(here, token_losses(model, batch))[0] - here.reference
            elsewhere = (here.sides == ELSEWHERE).float()
            sums += torch.stack(((gained * elsewhere).sum(), elsewhere.sum()))
        gained_all, count = total(sums).unbind()
        self.drift = (gained_all / count.clamp(min=1)).clamp(min=0)

    def loss(self, model: Any, batch: AnyBatch, step: Step) -> Tensor:
        """See Objective."""
        assert isinstance(batch, PairBatch)
        return self.of_losses(on(batch, self.drift.device), self.values(model, batch), step.weight, step.labelled)

    def values(self, model: Any, batch: PairBatch) -> Tensor:
        """The losses (B, T) of labelled tokens; of a head minus the number at the last token of each answer."""
        return token_losses(model, batch) if self.config.loss != "reward" else negative_scores(model, batch)

    def of_losses(self, batch: PairBatch, losses: Tensor, weight: float, labelled: int) -> Tensor:
        """The loss of rows of comparisons, and add to the sums.

        Args:
            losses: (B, T) of tokens.
            weight: comparisons of the step.
            labelled: tokens of its chosen answers.
        """
        log_probs, unweighed = answers_of(batch, losses)
        self._add_sums(batch, log_probs.detach(), unweighed.detach())
        if not self.config.published.paired:
            counted = (batch.sides == CHOSEN) | (batch.sides == REJECTED)
            each = kto(log_probs - batch.reference, batch.sides == CHOSEN, self.drift, self.config)
            return (each * counted).sum() / weight
        pairs = pairs_of(batch, log_probs)
        loss = (FORMULAS[self.config.loss](pairs, self.config) * batch.shares).sum() / weight
        if sft_weight := self.config.or_published("sft_weight"):
            of_prompts = (losses * (batch.owners < 0)).sum()
            chosen = (unweighed * (batch.sides == CHOSEN)).sum()
            loss = loss + sft_weight * (of_prompts - chosen) / max(1, labelled)
        return loss

    def of_each(self, batch: PairBatch, losses: Tensor, weight: float, labelled: int) -> Tensor:
        """The loss (C,) of each comparison of rows, row by row; their mean over all rows is the loss.

        The loss of chosen answers, if it is part, is a mean over tokens; a comparison has what its tokens add to it.

        Args:
            losses, weight, labelled: see of_losses.
        """
        log_probs, unweighed = answers_of(batch, losses)
        of_pairs = FORMULAS[self.config.loss](pairs_of(batch, log_probs), self.config) * batch.shares
        each = torch.zeros_like(log_probs).scatter_add(1, batch.chosen, of_pairs)
        if sft_weight := self.config.or_published("sft_weight"):
            numbers = torch.arange(batch.sides.size(1), device=losses.device)
            of_prompts = (losses * (batch.owners < 0))[..., None] * (batch.segments[..., None] == numbers)
            each = each + sft_weight * (of_prompts.sum(dim=1) - unweighed) * weight / max(1, labelled)
        return each[batch.sides == CHOSEN]

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """Rewards and log-probabilities on average, lengths, and how often the chosen answer has the larger reward."""
        s = dict(zip(SUMS, sums, strict=True))
        of_pairs = {"reward_accuracy": s["right"], "reward_margin": s["margin"]} if s["shares"] else {}
        found = {name: value / s["shares"] for name, value in of_pairs.items()}
        for side in ("chosen", "rejected"):
            others = () if self.config.loss == "reward" else (f"logp_{side}", f"length_{side}")
            for name in (f"reward_{side}", *others):
                found |= {name: s[name] / s[side]} if s[side] else {}
        if not self.config.published.paired:
            found |= {"kl": s["kl"] / max(1.0, s["steps"])}
            if s["chosen"] and s["rejected"]:
                found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found

    def _add_sums(self, batch: PairBatch, log_probs: Tensor, unweighed: Tensor) -> None:
        rewards = self._rewards(batch, log_probs)
        of_chosen, of_rejected = (rewards.gather(1, numbers) for numbers in (batch.chosen, batch.rejected))
        share, difference = batch.shares, of_chosen - of_rejected
        parts = [share.sum(), (share * (difference > 0)).sum(), (share * difference).sum()]
        for side in (CHOSEN, REJECTED):
            counted = (batch.sides == side).float()
            parts += [counted.sum(), *((counted * each).sum() for each in (rewards, unweighed, batch.counts))]
        steps = torch.ones_like(self.drift)
        self.sums += torch.stack((*parts, steps, self.drift * steps))

    def _rewards(self, batch: PairBatch, log_probs: Tensor) -> Tensor:
        """(B, A): beta times what the loss compares."""
        published, beta = self.config.published, self.config.or_published("beta") or 1.0
        if published.reference:
            return beta * (log_probs - batch.reference)
        return beta * log_probs / (batch.counts.clamp(min=1) if self.config.loss != "cpo" else 1.0)


def token_losses(model: Any, batch: PairBatch) -> Tensor:
    """The losses (B, T) of the labelled tokens of comparisons on the host, see GPT.token_losses."""
    losses: Tensor = model.token_losses(batch.tokens, batch.labels, batch.positions, batch.segments, batch.seen_until)
    return losses


def negative_scores(model: Any, batch: PairBatch) -> Tensor:
    """Minus the outputs of a head with one output at the labelled tokens, (B, T), and 0 elsewhere; see GPT.scores."""
    scores: Tensor = model.scores(batch.tokens, batch.labels, batch.positions, batch.segments, batch.seen_until)
    at = (batch.labels >= 0).to(scores.device)
    return torch.zeros(at.shape, device=scores.device).masked_scatter(at, -scores[:, 0])


def answers_of(batch: PairBatch, losses: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities (B, A) of the answers, with tokens as their weights weigh them, and unweighed."""
    numbers = torch.arange(batch.sides.size(1), device=losses.device)
    of_each = -losses[..., None] * (batch.owners[..., None] == numbers)
    unweighed = of_each.sum(dim=1)
    return unweighed if batch.weights is None else (of_each * batch.weights[..., None]).sum(dim=1), unweighed


def pairs_of(batch: PairBatch, log_probs: Tensor) -> Pairs:
    """The pairs (B, P) of answers with these log-probabilities (B, A); what is missing is a pair of equal answers."""

    def both(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.gather(1, batch.chosen), values.gather(1, batch.rejected)

    before, tokens = both(batch.reference), both(batch.counts.clamp(min=1))
    return Pairs(*both(log_probs), before[0], before[1], tokens[0], tokens[1], batch.margins)


def on(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch on a device."""
    return PairBatch(*(None if t is None else t.to(device, non_blocking=True) for t in batch))  # type: ignore[arg-type]
