"""Mean losses with standard errors, and paired differences between two systems with confidence intervals.

Losses are summed over sampling units (windows or documents) of unequal size, so a mean over tokens is a ratio of two sums; its
standard error is that of the ratio estimator (Cochran 1977, Sampling Techniques, §6.4). Overlapping windows are correlated:
their covariances are included with Bartlett weights (Newey & West 1987, Econometrica 55).
"""

import math
from dataclasses import dataclass

import numpy
import pandas
from scipy.special import stdtrit  # quantile of Student's t; importing scipy.stats takes five times as long

from longqlora.config.settings import Protocol
from longqlora.evaluation.protocols import weighs_windows_equally

MIN_DOCUMENTS = 30  # with at least this many, documents are the sampling units, because tokens of one document are correlated
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both in the unit of the averaged values.

    Attributes:
        mean: ``sum(values) / sum(weights)``.
        standard_error: None for a single sampling unit.
        num_units: number of independent sampling units; windows that overlap count as one.
    """

    mean: float
    standard_error: float | None
    num_units: int

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Confidence interval by Student's t distribution; None for a single sampling unit."""
        if self.standard_error is None:
            return None
        half = float(stdtrit(self.num_units - 1, 0.5 + confidence / 2)) * self.standard_error
        return self.mean - half, self.mean + half


def ratio_estimate(values: numpy.ndarray, weights: numpy.ndarray, overlap: int = 0) -> Estimate:
    """Weighted mean over sampling units of unequal size.

    Args:
        values: ``[units]``, sum over each unit.
        weights: ``[units]``, size of each unit.
        overlap: number of preceding units that each unit shares tokens with.
    """
    count, total = len(values), weights.sum()
    mean = values.sum() / total
    if count < 2:
        return Estimate(float(mean), None, count)
    residuals = values - mean * weights
    squares = (residuals**2).sum()
    for lag in range(1, min(overlap, count - 1) + 1):
        squares += 2 * (1 - lag / (overlap + 1)) * (residuals[lag:] * residuals[:-lag]).sum()
    reach = overlap + 1
    # Shared tokens make the covariance fall linearly with the lag; of such covariances Bartlett's weights lose up to a third.
    squares *= 3 * reach**2 / (2 * reach**2 + 1)
    return Estimate(float(mean), math.sqrt(count / (count - 1) * squares) / float(total), max(2, count // reach))


def sampling_units(windows: pandas.DataFrame, protocol: Protocol) -> tuple[numpy.ndarray, numpy.ndarray, str]:
    """The sampling units of an evaluation: documents if there are at least :data:`MIN_DOCUMENTS` of them, else windows; always
    windows under a protocol that averages over windows.

    Args:
        windows: one row per window, with its document, num_scored, and nll (summed over its scored tokens, in nats).
        protocol: how perplexity was measured.

    Returns:
        Values and weights for :func:`ratio_estimate`, and ``documents`` or ``windows``.
    """
    if weighs_windows_equally(protocol):
        return (windows["nll"] / windows["num_scored"]).to_numpy(), numpy.ones(len(windows)), "windows"
    if windows["document"].nunique() >= MIN_DOCUMENTS:
        sums = windows.groupby("document")[["nll", "num_scored"]].sum()
        return sums["nll"].to_numpy(), sums["num_scored"].to_numpy(), "documents"
    return windows["nll"].to_numpy(), windows["num_scored"].to_numpy(), "windows"


def on_key_tokens(windows: pandas.DataFrame) -> pandas.DataFrame:
    """Windows with the loss of their key tokens in place of the loss of all their tokens.

    Args:
        windows: one row per window, with num_key_tokens and key_nll, see
            :func:`longqlora.evaluation.perplexity.score_windows`.
    """
    return windows.assign(num_scored=windows["num_key_tokens"], nll=windows["key_nll"])


def num_overlapping_windows(protocol: Protocol) -> int:
    """Number of preceding windows that each window shares scored tokens with; 0 if every token is scored at most once."""
    return math.ceil(protocol.window / protocol.stride) - 1 if protocol.name == "longlora" else 0


def mean_nll(windows: pandas.DataFrame, protocol: Protocol) -> tuple[Estimate, str]:
    """Mean negative log-likelihood (nats) of an evaluation under its protocol, and its sampling units (documents or windows).

    Args:
        windows: see :func:`sampling_units`.
        protocol: how perplexity was measured.
    """
    values, weights, units = sampling_units(windows, protocol)
    return ratio_estimate(values, weights, num_overlapping_windows(protocol)), units


def paired_difference(windows: pandas.DataFrame, others: pandas.DataFrame, protocol: Protocol) -> Estimate | None:
    """Difference between the mean negative log-likelihoods (nats) of two systems, paired window by window, so that how hard
    the text is cancels out; None if the two were not measured on the same windows.

    Args:
        windows, others: of the two systems, see :func:`sampling_units`.
        protocol: how the perplexity of both was measured.
    """
    same = ["document", "begin", "num_scored"]
    if len(windows) != len(others) or (windows[same].to_numpy() != others[same].to_numpy()).any():
        return None
    values, weights, _ = sampling_units(windows.assign(nll=windows["nll"] - others["nll"]), protocol)
    return ratio_estimate(values, weights, num_overlapping_windows(protocol))
