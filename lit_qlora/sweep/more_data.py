"""The worth of more data: a power law through runs on nested parts of it, and its forecast for twice as much.

Hestness et al. 2017 fit losses by c + a n^-b. Validation samples and repetitions are drawn again for the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.sweep.results import Results, Row

SETTING = "data.max_samples"
LEAST = 3  # sizes; the law has as many parameters
DRAWS = 1000
EXPONENTS = torch.arange(1, 81, dtype=torch.float64) / 40
"""The values of b that are tried: 0.025 to 2."""


@dataclass(frozen=True)
class Law:
    """Losses c + a n^-b, one for each draw: (R,) each."""

    a: Tensor
    b: Tensor
    c: Tensor

    def __call__(self, samples: float) -> Tensor:
        """The losses (R,) of so many training samples."""
        return self.c + self.a * samples**-self.b


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Losses of runs on parts of the data, and of twice as much as the largest."""

    sizes: list[int]
    losses: list[float]
    """Nats per labelled token, as measured."""
    law: Law
    """Of the losses as measured."""
    draws: Law

    @property
    def gain(self) -> tuple[float, float, float]:
        """The change of the loss with twice the data, and the ends of its 95 % interval."""
        both = [law(2.0 * self.sizes[-1]) - law(self.sizes[-1]) for law in (self.law, self.draws)]
        low, high = both[1].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(both[0]), low, high

    def band(self, samples: float) -> tuple[float, float, float]:
        """The loss by the law, and the ends of its 95 % interval."""
        low, high = self.draws(samples).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(self.law(samples)), low, high

    def describe(self) -> str:
        """Answer the question in a sentence."""
        change, low, high = self.gain
        if low <= 0 <= high or change >= 0:
            verdict = "More data of this kind would change little, or it does not show"
        else:
            verdict = "More data of this kind would help"
        c, a, b = (float(value) for value in (self.law.c, self.law.a, self.law.b))
        return (
            f"{verdict}: twice the {self.sizes[-1]:,} samples change val_loss by about {change:+.4f} "
            f"(95 % {low:+.4f} to {high:+.4f}), by the law {c:.4g} + {a:.4g} n^-{b:.3g}."
        )


def forecast(results: Results) -> Forecast | None:
    """Fit the rows of a sweep over the number of training samples alone; None for any other, or too few sizes."""
    if list(results.settings) != [SETTING]:
        return None
    rows = {int(results.setting(row, SETTING)): row for row in results.rows if row.status == "done"}
    sums = {size: _sums(row) for size, row in sorted(rows.items())}
    samples = {row.first.losses.samples for row in rows.values() if row.first.losses is not None}
    if len(rows) < LEAST or len(samples) != 1 or any(found is None for found in sums.values()):
        return None
    labelled = next(row.first.losses.labelled for row in rows.values() if row.first.losses is not None)
    return fit([*sums], [found for found in sums.values() if found is not None], labelled)


def fit(sizes: Sequence[int], sums: Sequence[Tensor], labelled: Sequence[int], seed: int = 0) -> Forecast:
    """Fit the law to losses, and to DRAWS losses of samples and repetitions drawn with replacement.

    Args:
        sums: for each size (repetitions, S), the summed loss of each validation sample.
        labelled: (S,) labelled tokens of each.
    """
    tokens = torch.tensor(labelled, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tokens), (DRAWS, len(tokens)), generator=generator)
    losses, spread = [], []
    for runs in sums:
        losses.append(float(runs.mean(0).sum() / tokens.sum()))
        chosen = torch.randint(len(runs), (DRAWS, len(runs)), generator=generator)
        means = runs[chosen].mean(1)  # (DRAWS, S)
        spread.append(means.gather(1, drawn).sum(1) / tokens[drawn].sum(1))
    law = _law(sizes, torch.tensor([losses], dtype=torch.float64))
    return Forecast(sizes=list(sizes), losses=losses, law=law, draws=_law(sizes, torch.stack(spread, dim=1)))


def _sums(row: Row) -> Tensor | None:
    """The losses of a row, (repetitions, S)."""
    found = [result.last_losses for result in row.results]
    return None if None in found else torch.tensor(found, dtype=torch.float64)


def _law(sizes: Sequence[int], losses: Tensor) -> Law:
    """The least squares of each row of `losses` (R, sizes), with a and c not below zero."""
    x = torch.tensor(sizes, dtype=torch.float64)[None] ** -EXPONENTS[:, None]  # (B, sizes)
    mean_x, mean_y = x.mean(1)[:, None], losses.mean(1)[None]
    centred = x - mean_x
    a = ((centred @ (losses - losses.mean(1, keepdim=True)).T) / centred.square().sum(1)[:, None]).clamp(
        min=0
    )  # (B, R)
    c = mean_y - a * mean_x
    through_zero = (x @ losses.T) / x.square().sum(1)[:, None]
    a, c = torch.where(c < 0, through_zero, a), c.clamp(min=0)
    errors = (c[..., None] + a[..., None] * x[:, None] - losses[None]).square().sum(-1)
    best = errors.argmin(0)
    rows = torch.arange(len(losses))
    return Law(a[best, rows], EXPONENTS[best], c[best, rows])
