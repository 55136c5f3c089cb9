import math

import numpy
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longqlora.config.settings import Protocol
from longqlora.evaluation.statistics import (
    MIN_DOCUMENTS,
    Estimate,
    mean_nll,
    num_overlapping_windows,
    paired_difference,
    ratio_estimate,
    sampling_units,
)

EXACT = Protocol(name="exact", window=8, stride=8)
LONGLORA = Protocol(name="longlora", window=8, stride=8)
LOSSES = st.lists(st.floats(-100, 100), min_size=2, max_size=40)


def windows_of(nll, num_scored=None, document=None) -> pandas.DataFrame:
    count = len(nll)
    columns = {"document": numpy.zeros(count, int) if document is None else document, "begin": numpy.arange(count)}
    return pandas.DataFrame(columns | {"num_scored": numpy.full(count, 8) if num_scored is None else num_scored, "nll": nll})


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_intervals_are_those_of_the_published_table_of_students_t(degrees, value):
    low, high = Estimate(mean=1.0, standard_error=0.1, num_units=degrees + 1).interval()
    assert (low, high) == (pytest.approx(1 - 0.1 * value, abs=1e-4), pytest.approx(1 + 0.1 * value, abs=1e-4))


def test_the_mean_is_weighted_by_tokens_or_over_windows_as_the_protocol_says():
    windows = windows_of([10.0, 3.0], num_scored=[10, 1])
    exact, _ = mean_nll(windows, EXACT)
    assert exact.mean == pytest.approx(13 / 11)
    for name in ("longqlora", "longlora"):
        protocol = Protocol(name=name, window=8, stride=8)
        assert mean_nll(windows, protocol)[0].mean == pytest.approx((1 + 3) / 2)


def test_windows_with_the_same_mean_have_no_error_whatever_their_sizes():
    estimate, _ = mean_nll(windows_of([10.0, 1.0, 4.0], num_scored=[10, 1, 4]), EXACT)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_a_single_unit_has_no_error_and_no_interval():
    estimate = ratio_estimate(numpy.array([3.0]), numpy.array([2]))
    assert (estimate.mean, estimate.standard_error, estimate.interval()) == (1.5, None, None)


@given(losses=LOSSES, factor=st.floats(0.01, 100), overlap=st.integers(0, 3), data=st.data())
def test_an_estimate_scales_with_its_values_and_inversely_with_its_weights(losses, factor, overlap, data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(losses), max_size=len(losses)))
    values, weights = numpy.array(losses), numpy.array(sizes, dtype=float)
    estimate = ratio_estimate(values, weights, overlap)
    for values_factor, weights_factor in [(factor, 1), (1, factor), (factor, factor)]:
        scaled = ratio_estimate(values_factor * values, weights_factor * weights, overlap)
        ratio = values_factor / weights_factor
        assert scaled.num_units == estimate.num_units
        assert scaled.mean == pytest.approx(ratio * estimate.mean, rel=1e-9, abs=1e-9)
        assert scaled.standard_error == pytest.approx(ratio * estimate.standard_error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sizes", [numpy.full(25, 8), numpy.arange(4, 79, 3)], ids=["equal units", "unequal units"])
def test_the_standard_error_is_the_deviation_of_the_mean_over_repeated_draws(sizes):
    """A unit's loss: its size times a mean of its own (so that units differ), and noise of each token."""
    rng, estimates = numpy.random.default_rng(0), []
    for _ in range(4000):
        drawn = rng.permutation(sizes)
        values = drawn * rng.normal(3.0, 0.5, len(sizes)) + numpy.sqrt(drawn) * rng.normal(0, 1.0, len(sizes))
        estimates.append(ratio_estimate(values, drawn))
    deviation = numpy.std([estimate.mean for estimate in estimates])
    squares = numpy.mean([estimate.standard_error**2 for estimate in estimates])
    assert math.sqrt(squares) == pytest.approx(deviation, rel=0.06)


def test_overlapping_windows_are_not_treated_as_independent():
    """Windows over noise, each sharing three quarters of its tokens with the one before."""
    rng, window, stride = numpy.random.default_rng(0), 32, 8
    protocol = Protocol(name="longlora", window=window, stride=stride)
    assert num_overlapping_windows(protocol) == 3
    right, naive = [], []
    for _ in range(1000):
        noise = rng.normal(2.0, 1.0, 4000)
        values = numpy.lib.stride_tricks.sliding_window_view(noise, window)[::stride].mean(1)
        right.append(mean_nll(windows_of(values * 31, numpy.full(len(values), 31)), protocol)[0])
        naive.append(ratio_estimate(values, numpy.ones(len(values))).standard_error)
    deviation = numpy.std([estimate.mean for estimate in right])
    found = math.sqrt(numpy.mean([estimate.standard_error**2 for estimate in right]))
    assert found == pytest.approx(deviation, rel=0.06)
    assert numpy.mean(naive) < 0.6 * deviation


@pytest.mark.parametrize(("window", "stride", "overlap"), [(1024, 256, 3), (1000, 256, 3), (256, 256, 0), (257, 256, 1)])
def test_a_window_overlaps_those_that_began_less_than_a_window_before_it(window, stride, overlap):
    assert num_overlapping_windows(Protocol(name="longlora", window=window, stride=stride)) == overlap
    assert num_overlapping_windows(Protocol(name="exact", window=window, stride=stride)) == 0


def test_documents_are_the_sampling_units_if_there_are_enough_of_them():
    for documents, unit, units in [(MIN_DOCUMENTS, "documents", MIN_DOCUMENTS), (MIN_DOCUMENTS - 1, "windows", 58)]:
        numbers = numpy.repeat(numpy.arange(documents), 2)
        windows = windows_of(numpy.arange(2.0 * documents), document=numbers)
        values, weights, name = sampling_units(windows, EXACT)
        assert (name, len(values), values.sum(), weights.sum()) == (unit, units, windows["nll"].sum(), 16 * documents)
        assert sampling_units(windows, LONGLORA)[2] == "windows"


def test_windows_of_one_document_do_not_count_as_independent():
    """Ten windows of each document have the same loss: the error is that of 40 documents, not of 400 windows."""
    means = numpy.random.default_rng(0).normal(3.0, 0.5, 40)
    windows = windows_of(8 * numpy.repeat(means, 10), document=numpy.repeat(numpy.arange(40), 10))
    assert mean_nll(windows, EXACT)[0].standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(40), rel=1e-6)


def test_paired_intervals_hold_the_true_difference_as_often_as_they_say():
    rng, held, widths = numpy.random.default_rng(0), 0, []
    for _ in range(800):
        hard = rng.normal(20, 8, 12)  # how hard each window is for both systems
        one, other = windows_of(hard + rng.normal(0.4, 0.5, 12)), windows_of(hard + rng.normal(0, 0.5, 12))
        low, high = paired_difference(one, other, EXACT).interval()
        held += low <= 0.4 / 8 <= high
        widths.append(high - low)
    assert held / 800 == pytest.approx(0.95, abs=0.02)
    alone = mean_nll(one, EXACT)[0].interval()
    assert numpy.mean(widths) < 0.2 * (alone[1] - alone[0])


def test_a_difference_is_below_zero_where_the_first_is_better():
    estimate = paired_difference(windows_of([8.0, 16.0]), windows_of([16.0, 24.0]), EXACT)
    assert (estimate.mean, estimate.standard_error) == (-1.0, 0.0)
    windows, others = (windows_of(nll, num_scored=[10, 1]) for nll in ([10.0, 3.0], [0.0, 0.0]))
    assert paired_difference(windows, others, EXACT).mean == pytest.approx(13 / 11)
    assert paired_difference(windows, others, LONGLORA).mean == pytest.approx(2)


@given(
    losses=LOSSES, protocol=st.sampled_from([EXACT, LONGLORA, Protocol(name="longlora", window=8, stride=3)]), data=st.data()
)
def test_the_difference_changes_its_sign_when_the_systems_change_places(losses, protocol, data):
    others = data.draw(st.lists(st.floats(-100, 100), min_size=len(losses), max_size=len(losses)))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(losses), max_size=len(losses)))
    one, other = windows_of(losses, num_scored=sizes), windows_of(others, num_scored=sizes)
    forward, backward = paired_difference(one, other, protocol), paired_difference(other, one, protocol)
    assert backward.mean == -forward.mean
    assert backward.standard_error == forward.standard_error
    assert backward.interval() == (-forward.interval()[1], -forward.interval()[0])


@pytest.mark.parametrize("change", [{"begin": [0, 2]}, {"num_scored": [8, 7]}, {"document": [0, 1]}])
def test_there_is_no_difference_of_systems_that_read_other_windows(change):
    windows = windows_of([8.0, 16.0])
    assert paired_difference(windows, windows.assign(**change), EXACT) is None
    assert paired_difference(windows, windows.iloc[:1], EXACT) is None
