"""The losses of pairs of answers, as pure functions of log-probabilities; settings.preference names their papers.

A log-probability is that of a whole answer given its prompt, its end included. Rewards are beta times the change of it
since before training.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.settings.preference import PreferenceConfig, PreferenceLoss


class Pairs(NamedTuple):
    """Pairs of answers to the same prompts; each field is (N,)."""

    chosen: Tensor
    """Log-probabilities of the chosen answers."""
    rejected: Tensor
    reference_chosen: Tensor
    """The same before training; not read by losses without a reference."""
    reference_rejected: Tensor
    chosen_tokens: Tensor
    """Tokens of the chosen answers, each with its end."""
    rejected_tokens: Tensor
    margin: Tensor | float = 0.0
    """How much larger the difference of the rewards should be."""

    @property
    def gained(self) -> Tensor:
        """Change of the chosen answers' log-probabilities."""
        return self.chosen - self.reference_chosen

    @property
    def gained_by_rejected(self) -> Tensor:
        """Change of the rejected answers' log-probabilities."""
        return self.rejected - self.reference_rejected


Formula = Callable[[Pairs, PreferenceConfig], Tensor]
"""The loss of each pair, (N,)."""


def dpo(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Direct preference optimisation: -log s(b (dc - dr)), s being the logistic function."""
    gained, lost = pairs.gained, pairs.gained_by_rejected
    if how.length_normalized:
        gained, lost = gained / pairs.chosen_tokens, lost / pairs.rejected_tokens
    logits, e = how.or_published("beta") * (gained - lost) - pairs.margin, how.or_published("label_smoothing")
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


def robust(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """As dpo, where a share e of the labels is wrong: on average it is the loss of right labels."""
    logits, e = _reward_difference(pairs, how) - pairs.margin, how.or_published("label_smoothing")
    return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)


def hinge(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """As dpo with the loss of a support vector machine: max(0, 1 - b (dc - dr))."""
    return F.relu(1 + pairs.margin - _reward_difference(pairs, how))


def ipo(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Regress the difference on 1 / (2 b). By token, as its authors compute it, not by answer as they write it."""
    difference = pairs.gained / pairs.chosen_tokens - pairs.gained_by_rejected / pairs.rejected_tokens
    return (difference - 1 / (2 * how.or_published("beta"))).square()


def apo_zero(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Push chosen answers up and rejected ones down, each from where it was: 1 - s(b dc) + s(b dr)."""
    beta = how.or_published("beta")
    return 1 - torch.sigmoid(beta * pairs.gained) + torch.sigmoid(beta * pairs.gained_by_rejected)


def orpo(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Odds ratio: -b log s(log odds of chosen - log odds of rejected), of mean probabilities of tokens."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -how.or_published("beta") * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Compare by token, without a reference, and want a difference: -log s(b (c / nc - r / nr) - gamma)."""
    difference = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(how.or_published("beta") * difference - how.or_published("gamma") - pairs.margin)


def cpo(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """As dpo with a reference that likes all answers alike: -log s(b (c - r))."""
    return -F.logsigmoid(how.or_published("beta") * (pairs.chosen - pairs.rejected) - pairs.margin)


def reward(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """Bradley-Terry: -log s(c - r), of numbers that a head gives to answers instead of their log-probabilities."""
    return -F.logsigmoid(pairs.chosen - pairs.rejected - pairs.margin)


def nothing(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    """No comparison; preference.sft_weight is all of the loss."""
    return torch.zeros_like(pairs.chosen)


FORMULAS: dict[PreferenceLoss, Formula] = {
    "dpo": dpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
    "sft": nothing,
    "reward": reward,
}
"""The losses of pairs."""


def kto(gained: Tensor, good: Tensor, drift: Tensor, how: PreferenceConfig) -> Tensor:
    """Kahneman-Tversky optimisation: the loss of each answer, good or bad by itself.

    Args:
        gained: (N,) change of the log-probabilities since before training.
        good: (N,) bool.
        drift: () estimate of KL(model || reference), not below 0; no gradient goes through it.
    """
    beta = how.or_published("beta")
    value = torch.sigmoid(torch.where(good, 1.0, -1.0).to(gained) * beta * (gained - drift.detach()))
    return torch.where(good, how.desirable_weight, how.undesirable_weight).to(gained) * (1 - value)


def _reward_difference(pairs: Pairs, how: PreferenceConfig) -> Tensor:
    return how.or_published("beta") * (pairs.gained - pairs.gained_by_rejected)


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)); p = 1 is taken for the number before it."""
    below_one = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))
