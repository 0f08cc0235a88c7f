"""Intervals of means, and of differences between runs that validated on the same samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom. Source: NIST handbook, 1.3.6.7.2."""
NORMAL_95 = 1.960


@dataclass(frozen=True)
class Interval:
    """A value with half the width of its 95 % interval; the width is None where it is not known."""

    value: float
    half: float | None = None

    @property
    def differs_from_zero(self) -> bool:
        """True if zero lies outside."""
        return self.half is not None and abs(self.value) > self.half


def quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table a little too large, so that intervals are safe."""
    if degrees > len(T_95):
        return T_95[-1] if degrees < 100 else NORMAL_95 + 0.03
    return T_95[degrees - 1]


def mean(values: Sequence[float]) -> Interval:
    """Estimate a mean; one value alone has no width."""
    if len(values) < 2:
        return Interval(fmean(values))
    return Interval(fmean(values), quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def difference(
    losses: Sequence[Sequence[float]], others: Sequence[Sequence[float]], labelled: Sequence[int]
) -> Interval:
    """Estimate by how much the loss per labelled token of one setting exceeds that of another.

    Samples are paired, so what is hard for both settings does not count as noise. The loss is a ratio of sums, hence
    the residuals (Cochran 1977, sec. 6.4). The spread between repetitions adds to the variance.

    Args:
        losses, others: for each repetition the summed loss of each sample.
        labelled: labelled tokens of each sample.
    """
    tokens, count = sum(labelled), len(labelled)
    mine, theirs = (list(map(fmean, zip(*runs, strict=True))) for runs in (losses, others))
    gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
    value = sum(gaps) / tokens
    if count < 2:
        return Interval(value)
    residuals = [gap - value * n for gap, n in zip(gaps, labelled, strict=True)]
    variance = count / (count - 1) * sum(r * r for r in residuals) / tokens**2
    half = quantile(count - 1) * math.sqrt(variance)
    for runs in (losses, others):
        half = math.hypot(half, mean([sum(run) / tokens for run in runs]).half or 0.0)
    return Interval(value, half)
