"""The trace against real steps, and few layers against all of them."""

import itertools
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM

from longqlora.config.settings import RopeExtension, TrainingSettings
from longqlora.modeling import attention, chunked_loss
from longqlora.planning import traced_jobs
from longqlora.planning.fake_models import config_of, put_weights
from longqlora.planning.memory_trace import MemoryTrace, fake_loss, fake_tensors, pretend_gpu, two_documents
from longqlora.planning.traced_jobs import TrainingStep, composed, trace_step
from longqlora.training.activations import keep_activations
from longqlora.training.adapters import FLOAT32

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 512,
}


def training_step(model=LLAMA, *, tokens=512, on_gpu=True, form="layer_inputs", dtypes=None, **settings) -> TrainingStep:
    compute_dtype = torch.bfloat16 if on_gpu else torch.float32
    extension = RopeExtension(target_context=tokens)
    return TrainingStep(model, extension, TrainingSettings(rank=8, **settings), on_gpu, compute_dtype, form, dtypes)


def real_layer(weight: torch.Tensor) -> Linear4bit:
    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    return layer


def real_model(model: dict, *, precision, compute_dtype, extension, attn_implementation):
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config_of(model), attn_implementation=attn_implementation)
    put_weights(built, partial(torch.ones, dtype=compute_dtype), real_layer if precision == "nf4" else None)
    built.is_loaded_in_4bit = precision == "nf4"
    return built


def allocated_at_most(function) -> int:
    """The most bytes that torch's allocator has given out during a call, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("layer_inputs", {}),
        ("layer_inputs", {"dtypes": FLOAT32}),
        ("all", {}),
        ("all", {"isolate_documents": True}),
        ("all", {"isolate_documents": True, "attention": "full"}),
    ],
    ids=str,
)
def test_the_traced_peak_is_that_of_a_real_step(monkeypatch, form, settings):
    small = {"num_hidden_layers": 2, "vocab_size": 64}
    step = training_step(LLAMA | small, form=form, **settings)
    traced = trace_step(step)
    monkeypatch.setattr(attention, "document_lengths", two_documents)
    monkeypatch.setattr(traced_jobs, "fake_model", real_model)
    monkeypatch.setattr(chunked_loss, "summed_nll", fake_loss)  # on a CPU, torch's has float32 gradients of hidden states
    with pretend_gpu(torch.bfloat16):
        model = traced_jobs.build_step(step)
        for weight in (trained := [weight for weight in model.parameters() if weight.requires_grad]):
            weight.grad = torch.zeros_like(weight)
        real = allocated_at_most(lambda: traced_jobs.take_micro_step(model, step))
    held = ("weights", "quantization constants", "adapter", "optimizer", "gradients")
    during_the_step = sum(size for part, size in traced.largest.parts.items() if part not in held)
    assert 0.93 * real < during_the_step <= 1.005 * real  # a real kernel has a workspace; the trace rounds up to 512 bytes
    assert traced.trained == sum(weight.numel() for weight in trained)
    assert traced.largest.parts["gradients"] == 4 * traced.trained


def test_the_traced_loss_is_torchs():
    """In float32, which a CPU computes as a GPU does."""

    def lose():
        hidden, weight = torch.zeros(2048, 64, requires_grad=True), torch.zeros(4096, 64)
        chunked_loss.summed_nll(hidden, weight, torch.zeros(2048, dtype=torch.long)).backward()

    real = allocated_at_most(lose)
    with fake_tensors(trace := MemoryTrace()), trace:
        lose()
    assert trace.peaks["loading"].total == pytest.approx(real, rel=0.05)


FORMS = [
    {},
    {"form": "offloaded"},
    {"form": "all", "attention": "full"},
    {"method": "full", "optimizer": "adamw_torch"},
    {"method": "lora", "modules_to_save": ["embed_tokens", "norm"], "gradient_accumulation": 1},
    {"isolate_documents": True},
    {"isolate_documents": True, "attention": "full"},
    {"on_gpu": False, "batch_size": 2},
]


@pytest.mark.parametrize("changed", FORMS, ids=str)
def test_two_layers_and_three_tell_of_all(changed):
    def trace(model):
        return trace_step(training_step(model, **changed))

    whole, few = trace(LLAMA).largest, composed(LLAMA, trace).largest
    assert few.total == pytest.approx(whole.total, rel=0.01)
    for part, size in whole.parts.items():
        assert few.parts[part] == pytest.approx(size, abs=0.02 * whole.total), part


def test_16_bit_halves_what_a_forward_pass_saves_and_offloading_takes_it_away():
    width, tokens, few = 64, 512, LLAMA | {"num_hidden_layers": 2}
    forms = {"float32": {"dtypes": FLOAT32}, "current": {}, "offloaded": {"form": "offloaded"}}
    found = {name: trace_step(training_step(few, tokens=tokens, attention="full", **form)) for name, form in forms.items()}
    saved = {name: traced.largest.parts["layer inputs"] for name, traced in found.items()}
    assert saved["float32"] - saved["current"] >= 2 * tokens * width * 2
    assert saved["current"] - saved["offloaded"] == 2 * 2 * tokens * width  # the inputs of both layers, in 16 bit
    assert found["float32"].largest.total > found["current"].largest.total >= found["offloaded"].largest.total
    assert found["offloaded"].host - found["current"].host >= 2 * 2 * tokens * width


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16, "layer_types": ["full_attention"] * 6},
        {"model_type": "mistral", "sliding_window": None},
    ],
    ids=str,
)
def test_every_family_can_be_traced(changed):
    model = LLAMA | changed
    traced = composed(model, lambda few_layers: trace_step(training_step(few_layers)))
    with torch.device("meta"):
        number = AutoModelForCausalLM.from_config(config_of(model)).num_parameters()
    assert 0.5 * number < traced.largest.parts["weights"] < 2 * number


@pytest.mark.parametrize(
    "settings", [{"dora": True}, {"pose_window": 128, "attention": "full"}, {"optimizer": "paged_adamw_8bit"}]
)
def test_settings_can_be_traced(settings):
    assert trace_step(training_step(LLAMA | {"num_hidden_layers": 1}, **settings)).largest.total > 0


def test_a_real_step_after_a_traced_one_has_real_gradients():
    """A training chooses its form by traces in the same process."""
    trace_step(training_step(on_gpu=False, form="linear_outputs"))
    model = AutoModelForCausalLM.from_config(config_of(LLAMA)).train()
    keep_activations(model, "linear_outputs")
    ids = torch.arange(40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert {type(weight.grad) for weight in model.parameters()} == {torch.Tensor}
