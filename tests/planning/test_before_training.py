"""What is decided about a training's memory before its weights are loaded."""

import pytest
from conftest import SETTINGS, save_base

from longqlora.config.settings import RopeExtension
from longqlora.planning import before_training, training_plans
from longqlora.planning.before_training import prepare_memory
from longqlora.planning.peak_memory import Memory

MIB = 2**20
EXTENSION = RopeExtension(target_context=4096)


@pytest.fixture
def machine(monkeypatch) -> list[str]:
    """A machine of 100 MiB on which a training keeps 10 MiB for each window, or a tenth; lists the forms that are traced."""
    traced = []

    def training_memory(model, extension, settings, device, compute, form) -> Memory:
        traced.append(form)
        window = (10 if form == "all" else 1) * MIB
        return Memory({"weights": 40 * MIB, "inputs": settings.batch_size * window, "allowance": 50 * MIB}, "", 0)

    monkeypatch.setattr(training_plans, "training_memory", training_memory)
    monkeypatch.setattr(before_training, "total_memory", lambda device: 100 * MIB)
    return traced


def prepared(base: str, check: bool = True, extension=EXTENSION, **changes) -> str:
    return prepare_memory(base, extension, SETTINGS.model_copy(update=changes), "cpu", check=check)


def test_the_fastest_form_that_fits_is_chosen(machine, model_folder):
    assert prepared(model_folder, memory="auto", batch_size=1) == "all"
    assert prepared(model_folder, memory="auto", batch_size=2) == "linear_outputs"
    assert prepared(model_folder, memory="smallest", batch_size=2) == "layer_inputs"


def test_a_training_that_cannot_fit_is_refused_with_the_change_that_makes_it_fit(machine, model_folder):
    """The allowance for what no trace sees is no reason to refuse."""
    assert prepared(model_folder, memory="speed", batch_size=6) == "all"  # 40 + 60 MiB
    with pytest.raises(ValueError, match=r"needs .* this machine has 0\.1") as refused:
        prepared(model_folder, memory="speed", batch_size=8, gradient_accumulation=1)
    assert "It fits with batch_size: 1, gradient_accumulation: 8; training.check_memory: false starts it" in str(refused.value)
    assert prepared(model_folder, memory="speed", batch_size=8, check=False) == "all"


def test_no_context_below_the_models_own_is_tried(machine, model_folder, monkeypatch):
    """It could not be trained, and would hide the refusal behind an error of its own."""
    own = 64

    def training_memory(model, extension, settings, device, compute, form) -> Memory:
        assert extension.target_context >= own
        return Memory({"inputs": 10**9 + extension.target_context}, "", 0)

    monkeypatch.setattr(training_plans, "training_memory", training_memory)
    with pytest.raises(ValueError, match="No change of its settings that was tried makes it fit"):
        prepared(model_folder, memory="auto")


def test_a_training_far_smaller_than_the_machine_is_not_traced(machine, model_folder, monkeypatch):
    monkeypatch.setattr(before_training, "total_memory", lambda device: 2**35)
    assert prepared(model_folder, memory="auto") == "all"
    assert prepared(model_folder, memory="smallest") == "layer_inputs"
    assert not machine
    prepared(model_folder, memory="auto", extension=RopeExtension(target_context=2**20))
    assert machine


def test_no_estimate_is_no_reason_to_refuse(machine, model_folder, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("an unusual layer")

    monkeypatch.setattr(training_plans, "training_memory", fail)
    assert prepared(model_folder, memory="auto") == "layer_inputs"
    assert prepared(model_folder, memory="speed") == "all"
    assert prepared(model_folder, memory="auto", zero_stage=2) == "layer_inputs"  # sharded state is not traced


def test_the_bound_is_above_the_memory_of_a_real_step(tmp_path, tokenizer):
    """Otherwise a training that does not fit would not be traced."""
    from longqlora.modeling.loading import load_config
    from longqlora.planning.peak_memory import training_memory

    base = save_base(tmp_path / "base", tokenizer, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    model = load_config(base).to_dict()
    for method in ("qlora", "full"):
        settings = SETTINGS.model_copy(update={"method": method, "memory": "speed", "batch_size": 2})
        parts = training_memory(model, EXTENSION, settings, "cpu", "float32", "all").parts
        bound = before_training.upper_bound(model, EXTENSION, settings)
        assert sum(parts.values()) - parts["allowance"] < bound
