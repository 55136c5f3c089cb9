"""Which activations are kept: the choice of a form, and that every form trains the same."""

import pytest

from longqlora.config.settings import TrainingSettings
from longqlora.training.activations import choose_form, forms_on

PEAKS = {"all": 40, "linear_outputs": 20, "layer_inputs": 10, "offloaded": 5}


@pytest.mark.parametrize(
    ("device", "budget", "form"),
    [
        ("cuda", 40, "all"),
        ("cuda", 39, "linear_outputs"),
        ("cuda", 10, "layer_inputs"),
        ("cuda", 5, "offloaded"),
        ("cuda", 1, "offloaded"),
        ("cpu", 20, "linear_outputs"),
        ("cpu", 5, "layer_inputs"),
    ],
)
def test_auto_takes_the_fastest_form_that_fits(device, budget, form):
    assert choose_form(TrainingSettings(memory="auto"), device, PEAKS.__getitem__, budget) == form


def no_estimate(form):
    raise AssertionError("nothing is to be estimated")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_speed_and_smallest_need_no_estimate(device):
    assert choose_form(TrainingSettings(memory="speed"), device, no_estimate, 0) == "all"
    assert choose_form(TrainingSettings(memory="smallest"), device, no_estimate, 0) == forms_on(device)[-1]


def test_auto_needs_no_estimate_with_zero():
    assert choose_form(TrainingSettings(zero_stage=2), "cuda", no_estimate, 0) == "layer_inputs"
