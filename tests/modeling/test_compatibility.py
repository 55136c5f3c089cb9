import re

import pytest
from conftest import LONGLORA, SETTINGS
from transformers import Qwen2Config

from longqlora.config.settings import RopeExtension
from longqlora.modeling.compatibility import extension_problems, quantization_problems
from longqlora.modeling.rope import scaling_problems

MODEL = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


def problems(model: dict, target_context: int = 256, **settings) -> list[str]:
    extension = RopeExtension(target_context=target_context)
    shape = extension_problems(MODEL | model, target_context, SETTINGS.model_copy(update=settings))
    return [*shape, *scaling_problems(MODEL | model, extension)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"method": "full"}, LONGLORA, {"target_modules": ["self_attn.q_proj"]}])
def test_a_sound_system_has_no_problem(family, settings):
    assert problems({"model_type": family}, **settings) == []
    assert list(extension_problems(MODEL | {"model_type": family}, 128)) == []  # not trained
    assert list(scaling_problems(MODEL, RopeExtension(target_context=128))) == []  # its own context


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"model_type": "mpt"}, {}, r"is a 'mpt' model; RoPE families that can be extended: llama, mistral, qwen2, qwen3"),
        ({"num_attention_heads": 6}, {}, r"hidden_size 64 is not divisible by num_attention_heads 6"),
        ({"num_key_value_heads": 3}, {}, r"num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"max_position_embeddings": 300}, {}, r"target_context 256 is below the model's own context of 300 tokens"),
        ({}, {"sequence_parallel": 4}, r"sequence_parallel 4 does not divide the model's 2 heads of keys and values"),
        (
            {"sliding_window": 128},
            {"sequence_parallel": 2, "attention": "full"},
            r"sequence_parallel at 256 tokens: the model has a sliding window of 128",
        ),
        ({}, {"rank": 65}, r"rank 65 is above the model's width, hidden_size 64"),
        ({"model_type": "mistral", "sliding_window": 200}, {}, r"shifted_sparse at 256 tokens: .* sliding window of 200"),
        ({}, {"target_modules": ["q_proj", "c_attn"]}, r"target_modules: 'c_attn' matches no layer of a llama model; it has"),
        ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, r"'lm_head' shares its weight with 'embed_tokens'"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.5}}, {}, r"scaled already \(yarn\): only rope_scaling: yarn extends"),
        ({}, {"modules_to_save": ["wte"]}, r"modules_to_save: 'wte' matches no layer of a llama model; it has embed_tokens"),
    ],
)  # fmt: skip
def test_each_problem_names_both_values(model, settings, message):
    (found,) = problems(model, **settings)
    assert re.search(message, found)


def test_a_scaled_model_has_the_context_that_it_is_scaled_to():
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert problems(scaled, target_context=256) == []
    assert problems(scaled, target_context=200) == ["target_context 200 is below the model's own context of 256 tokens"]
    assert problems(scaled, target_context=512) == []  # by a larger factor


@pytest.mark.parametrize("model", [{"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}])
def test_a_theta_that_is_not_larger_than_the_models_own_is_told(model):
    extension = RopeExtension(scaling="theta", target_context=256, theta=500000.0)
    assert list(scaling_problems(MODEL | model, extension)) == [
        "rope_theta 500000 is not above the model's own rope_theta, 1e+06"
    ]
    assert list(scaling_problems(MODEL | model, extension.model_copy(update={"theta": 4e6}))) == []


@pytest.mark.parametrize("given", [{"factor": 4.0}, {"scaling": "theta", "theta": 1e6}])
def test_a_factor_or_theta_without_a_longer_context_is_told(given):
    (found,) = scaling_problems(MODEL, RopeExtension(target_context=128, **given))
    assert found == "target_context 128 is the model's own context: rope_factor and rope_theta have no effect"


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_a_factor_that_does_not_exceed_that_of_a_scaled_model_is_told(scaling):
    scaled = MODEL | {"rope_scaling": {"type": scaling, "factor": 4.0}}
    extension = RopeExtension(scaling=scaling, target_context=1024, factor=2.0)
    message = "rope_factor 2 is not above the model's own factor, 4, which it replaces"
    assert list(scaling_problems(scaled, extension)) == [message]
    assert list(scaling_problems(scaled, extension.model_copy(update={"factor": 8.0}))) == []


def test_a_dynamic_model_reaches_its_context_times_the_factor():
    extension = RopeExtension(scaling="dynamic", target_context=200)
    dynamic = MODEL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    message = "target_context 200 is below the model's own context of 256 tokens"
    assert list(scaling_problems(dynamic, extension)) == [message]
    assert list(scaling_problems(dynamic, extension.model_copy(update={"target_context": 512}))) == []


def test_every_problem_of_a_system_is_told_at_once():
    model = {"num_attention_heads": 6, "num_key_value_heads": 4, "max_position_embeddings": 300, "sliding_window": 8}
    assert len(problems(model, rank=65, target_modules=["c_attn"], modules_to_save=["wte"])) == 7


def test_only_what_applies_to_the_method_is_checked():
    assert problems({}, method="full", rank=65, target_modules=["c_attn"], modules_to_save=["wte"]) == []
    assert problems({"sliding_window": 8}, attention="full") == []
    assert problems({"sliding_window": 256}) == []
    assert problems({"sliding_window": None}) == []
    assert problems({"num_attention_heads": 6, "head_dim": 16, "num_key_value_heads": None}) == []


def test_a_sliding_window_that_is_not_used_is_none():
    unused = {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}
    assert problems(unused) == []
    assert len(problems({**unused, "use_sliding_window": True})) == 1
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Qwen2Config(use_sliding_window=False, sliding_window=8, **shape)
    assert list(extension_problems(config.to_dict(), 256, SETTINGS)) == []


def test_what_a_configuration_leaves_to_its_family_is_no_problem():
    assert list(extension_problems({"model_type": "llama"}, 256, SETTINGS)) == []
    assert list(scaling_problems({"model_type": "llama"}, RopeExtension(target_context=256))) == []


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"bitsandbytes, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes, 8 bit"),
        ({"quant_method": "gptq", "bits": 4}, r"gptq, 4 bit"),
        ({"quant_method": "awq", "bits": 4}, r"awq, 4 bit"),
        ({"quant_method": "fp8"}, r"fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, r"compressed-tensors"),
    ],
)
def test_a_model_that_is_stored_quantized_cannot_be_trained_or_evaluated_as_something_else(stored, words):
    model = MODEL | {"quantization_config": stored}
    (trained,) = quantization_problems(model, trained=True, precision="nf4", original="owner/name")
    assert re.fullmatch(
        rf"its weights are stored quantized \({words}\); training needs .* made from, owner/name, unquantized", trained
    )
    (evaluated,) = quantization_problems(model, trained=False, precision="nf4")
    assert re.search(rf"\({words}\) and cannot be evaluated in precision nf4; its row needs precision: auto", evaluated)
    assert list(quantization_problems(model, trained=False, precision="auto")) == []
    for exact in ({}, {"quantization_config": None}):
        assert list(quantization_problems(MODEL | exact, trained=True, precision="nf4")) == []
