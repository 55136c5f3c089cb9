"""Means with standard errors, and the difference of two systems measured on the same windows, with a confidence interval.

Losses are summed over units (windows or documents) of unequal size, so a mean over tokens is a ratio of two sums; its error
is that of the ratio estimator (Cochran 1977, Sampling Techniques, §6.4). Overlapping windows are not independent: their
covariances are added with Bartlett's weights (Newey & West 1987, Econometrica 55).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy
import pandas

from longqlora.evaluation.protocols import weighs_windows_equally

ENOUGH_DOCUMENTS = 30  # from so many on they are the units: what lies in one document is alike
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both in the unit of what was averaged.

    Attributes:
        mean: ``sum(values) / sum(weights)``.
        standard_error: None for a single unit.
        num_units: how many units it rests on, those that overlap counted as one.
    """

    mean: float
    standard_error: float | None
    num_units: int

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Confidence interval by Student's t; None for a single unit."""
        if self.standard_error is None:
            return None
        half = student_quantile(0.5 + confidence / 2, self.num_units - 1) * self.standard_error
        return self.mean - half, self.mean + half


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by closed forms for 1 and 2 degrees of freedom and the expansion of Abramowitz &
    Stegun 26.7.5 from 3 on (within 1 % at 3, 0.1 % from 6 on, for the quantile of a 95 % interval)."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        a = 2 * probability - 1
        return a * math.sqrt(2 / (1 - a * a))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def ratio_estimate(values: numpy.ndarray, weights: numpy.ndarray, overlap: int = 0) -> Estimate:
    """Mean of units of unequal size.

    Args:
        values: ``[units]``, the sum over each.
        weights: ``[units]``, the size of each.
        overlap: how many of the units before it each unit shares tokens with.
    """
    count, total = len(values), weights.sum()
    mean = values.sum() / total
    if count < 2:
        return Estimate(float(mean), None, count)
    residuals = values - mean * weights
    squares = (residuals**2).sum()
    for lag in range(1, min(overlap, count - 1) + 1):
        squares += 2 * (1 - lag / (overlap + 1)) * (residuals[lag:] * residuals[:-lag]).sum()
    reach = overlap + 1  # Bartlett's weights lose up to a third of covariances that fall linearly, as shared tokens make them
    squares *= 3 * reach**2 / (2 * reach**2 + 1)
    return Estimate(float(mean), math.sqrt(count / (count - 1) * squares) / float(total), max(2, count // reach))


def units_of(windows: pandas.DataFrame, equally: bool) -> tuple[numpy.ndarray, numpy.ndarray, str]:
    """Values and weights of the sampling units of an evaluation: documents where there are enough of them, else windows.

    Args:
        windows: a row a window: document, num_scored, and nll, summed over its scored tokens.
        equally: each window counts alike, by the mean over its tokens.

    Returns:
        values, weights, and what the units are.
    """
    if equally:
        return (windows["nll"] / windows["num_scored"]).to_numpy(), numpy.ones(len(windows)), "windows"
    if windows["document"].nunique() >= ENOUGH_DOCUMENTS:
        sums = windows.groupby("document")[["nll", "num_scored"]].sum()
        return sums["nll"].to_numpy(), sums["num_scored"].to_numpy(), "documents"
    return windows["nll"].to_numpy(), windows["num_scored"].to_numpy(), "windows"


def overlap_of(protocol: dict) -> int:
    """How many windows before it each window shares scored tokens with; none where every token is scored once."""
    return math.ceil(protocol["window"] / protocol["stride"]) - 1 if protocol["protocol"] == "longlora" else 0


def mean_nll(windows: pandas.DataFrame, protocol: dict) -> tuple[Estimate, str]:
    """Mean negative log-likelihood (nats) of an evaluation under its protocol, and what its units are.

    Args:
        windows: see :func:`units_of`.
        protocol: its protocol, window and stride.
    """
    values, weights, units = units_of(windows, weighs_windows_equally(protocol["protocol"]))
    return ratio_estimate(values, weights, overlap_of(protocol)), units


def paired_difference(windows: pandas.DataFrame, others: pandas.DataFrame, protocol: dict) -> Estimate | None:
    """Difference of two systems' mean negative log-likelihood (nats), window by window on the same text, so that what is hard
    for both cancels out; None where they were not measured on the same windows.

    Args:
        windows, others: of both systems, see :func:`units_of`.
        protocol: its protocol, window and stride, the same for both.
    """
    same = ["document", "begin", "num_scored"]
    if len(windows) != len(others) or (windows[same].to_numpy() != others[same].to_numpy()).any():
        return None
    equally = weighs_windows_equally(protocol["protocol"])
    values, weights, _ = units_of(windows.assign(nll=windows["nll"] - others["nll"]), equally)
    return ratio_estimate(values, weights, overlap_of(protocol))
