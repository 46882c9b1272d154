"""Means with confidence intervals, and paired differences of two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Self


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, values: Sequence[float]) -> Self:
        """Return the mean of two or more independent items, with an interval by Student's t."""
        from scipy.stats import t  # takes a second to import

        mean = fmean(values)
        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def map(self, increasing: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the estimate."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def difference_text(measure: str, difference: Interval) -> str:
    """Put a difference in words: a ratio of perplexities, or points between accuracies."""
    if measure == "perplexity":
        return f"{difference.value:.3f}x ({difference.low:.3f} to {difference.high:.3f})"
    points = difference.map(lambda value: 100 * value)
    return f"{points.value:+.1f} ({points.low:+.1f} to {points.high:+.1f})"


@dataclass(frozen=True)
class Paired:
    """A measure of the original model and of another model on the same items.

    Attributes:
        difference: the other less the original, or the ratio of the other to it. Its interval is
            narrower than theirs, since items that are hard for one are hard for the other.
    """

    original: Interval
    other: Interval
    difference: Interval


def compare_means(original: Sequence[float], other: Sequence[float]) -> Paired:
    """Return the means over items, and the second less the first."""
    differences = [b - a for a, b in zip(original, other, strict=True)]
    return Paired(
        Interval.of_mean(original), Interval.of_mean(other), Interval.of_mean(differences)
    )


def compare_perplexities(original: Sequence[float], other: Sequence[float]) -> Paired:
    """Return the perplexities of losses, in nats a token, and the second's ratio to the first."""
    losses = compare_means(original, other)
    return Paired(
        *(each.map(math.exp) for each in (losses.original, losses.other, losses.difference))
    )


def mean_of(results: Sequence[Paired]) -> Paired:
    """Return the mean of independent results, all weighted equally."""
    return Paired(
        _mean([each.original for each in results]),
        _mean([each.other for each in results]),
        _mean([each.difference for each in results]),
    )


def _mean(intervals: Sequence[Interval]) -> Interval:
    mean = fmean([each.value for each in intervals])
    half = math.sqrt(sum((each.high - each.value) ** 2 for each in intervals)) / len(intervals)
    return Interval(mean, mean - half, mean + half)
