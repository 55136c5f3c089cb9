import json
import logging
import math
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.config.settings import RopeExtension, RopeScaling
from longqlora.modeling.loading import load_config, load_model
from longqlora.modeling.rope import context_in, context_of, extend_context, interpolation_factor, rope_of

SCALINGS = [scaling for scaling in get_args(RopeScaling) if scaling != "best"]
STORED = {"ntk": "default", "theta": "default"}  # models with a larger rope_theta are ordinary ones
THETA, WIDTH, ORIGINAL, TARGET = 500000.0, 128, 64, 160  # of a head with many frequencies; the factor is no whole number
FREQUENCIES = THETA ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)


def extension_by(rope_scaling: str, target: int = TARGET) -> RopeExtension:
    return RopeExtension(scaling=rope_scaling, target_context=target, theta=4 * THETA if rope_scaling == "theta" else None)


def config_of(rope_scaling: str, target: int = TARGET) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    return extend_context(config, extension_by(rope_scaling, target))


def frequencies(rope_scaling: str, num_tokens: int, target: int = TARGET) -> torch.Tensor:
    """The frequencies that a model of transformers rotates by, on a sequence of some length."""
    rotary = LlamaRotaryEmbedding(config_of(rope_scaling, target))
    rotary(torch.zeros(1, 1, WIDTH), torch.arange(num_tokens)[None])
    return rotary.inv_freq.double()


@pytest.mark.parametrize(
    ("target", "original", "factor"), [(8192, 4096, 2), (12288, 4096, 3), (6000, 4096, 2), (4096, 4096, 1)]
)
def test_factor_is_the_whole_number_that_covers_the_target(target, original, factor):
    assert interpolation_factor(target, original) == factor


@pytest.mark.parametrize("rope_scaling", SCALINGS)
def test_a_target_below_the_models_own_context_is_refused(rope_scaling):
    with pytest.raises(ValueError, match="2048 is below the model's own context of 4096"):
        extend_context(LlamaConfig(max_position_embeddings=4096), extension_by(rope_scaling, 2048))


def test_the_models_own_theta_is_kept(model_folder):
    config = load_config(model_folder, RopeExtension(target_context=128))
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert config.max_position_embeddings == 128


@pytest.mark.parametrize("rope_scaling", SCALINGS)
def test_each_scaling_survives_saving_and_transformers_has_nothing_to_complain_of(rope_scaling, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    config = config_of(rope_scaling)
    config.validate_rope()
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert again.rope_parameters["rope_type"] == STORED.get(rope_scaling, rope_scaling)
    assert (again.rope_parameters["rope_theta"] == THETA) == (rope_scaling not in STORED)
    assert context_of(again) == context_of(config) == (ORIGINAL if rope_scaling == "dynamic" else TARGET)
    LlamaRotaryEmbedding(again)(torch.zeros(1, 1, WIDTH), torch.arange(TARGET)[None])
    assert caplog.text == ""


@pytest.mark.parametrize("rope_scaling", SCALINGS)
def test_a_model_extended_to_its_own_context_is_the_same(rope_scaling):
    config = config_of(rope_scaling, ORIGINAL)
    assert (config.rope_parameters["rope_type"], config.max_position_embeddings) == ("default", ORIGINAL)


@pytest.mark.parametrize("rope_scaling", SCALINGS)
def test_a_loaded_model_rotates_by_what_transformers_computes(model_folder, rope_scaling):
    model = load_model(model_folder, device=torch.device("cpu"), extension=extension_by(rope_scaling, 160))
    model(torch.zeros(1, 160, dtype=torch.long))
    rotary = model.model.rotary_emb
    if rope_scaling in STORED:
        base = model.config.rope_parameters["rope_theta"]
        expected, scaling = torch.tensor([base ** -(i / 8) for i in range(0, 8, 2)]), 1.0
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[rope_scaling](model.config, "cpu", seq_len=160)
    plain = torch.tensor([THETA ** -(i / 8) for i in range(0, 8, 2)])
    torch.testing.assert_close(rotary.inv_freq, expected)
    assert rotary.attention_scaling == pytest.approx(scaling)
    assert not torch.allclose(expected, plain, rtol=1e-3)


def test_linear_divides_every_frequency_by_a_whole_number():
    torch.testing.assert_close(frequencies("linear", 160), FREQUENCIES / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_tokens", [30, 64, 100, 160])
def test_dynamic_scales_the_base_by_the_length_at_hand_beyond_the_original(num_tokens):
    factor, grown = TARGET / ORIGINAL, max(num_tokens, ORIGINAL) / ORIGINAL
    base = THETA * (factor * grown - (factor - 1)) ** (WIDTH / (WIDTH - 2))
    expected = base ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    torch.testing.assert_close(frequencies("dynamic", num_tokens), expected, rtol=1e-5, atol=0)


def test_yarn_keeps_high_frequencies_divides_low_ones_and_rescales_attention():
    found, factor = frequencies("yarn", 160), TARGET / ORIGINAL
    turns = ORIGINAL * FREQUENCIES / (2 * math.pi)  # in the original context; here the fastest has about 10
    ratio = FREQUENCIES / found
    assert ratio[0] == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(ratio[turns < 0.5], torch.full_like(ratio[turns < 0.5], factor), rtol=1e-5, atol=0)
    assert ((ratio > 1 - 1e-5) & (ratio < factor + 1e-5)).all()
    assert (ratio.diff() > -1e-5).all()
    rotary = LlamaRotaryEmbedding(config_of("yarn"))
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    found, factor = frequencies("llama3", 160), TARGET / ORIGINAL
    turns = ORIGINAL * FREQUENCIES / (2 * math.pi)  # in the original context
    smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)  # 0 where a wavelength exceeds the context, 1 within a quarter of it
    assert (smooth == 0).any()
    assert (smooth == 1).any()
    torch.testing.assert_close(found, FREQUENCIES * (smooth + (1 - smooth) / factor), rtol=1e-5, atol=0)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor():
    ratio = FREQUENCIES / frequencies("ntk", 160)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(TARGET / ORIGINAL, rel=1e-5)
    assert (ratio.diff() > 0).all()


def test_theta_is_the_base_of_the_frequencies():
    expected = (4 * THETA) ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    torch.testing.assert_close(frequencies("theta", 160), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rope_scaling", ["linear", "dynamic", "yarn", "llama3", "ntk"])
def test_a_factor_that_is_given_takes_the_place_of_the_computed_one(rope_scaling):
    config = LlamaConfig(max_position_embeddings=ORIGINAL)
    extended = extend_context(config, RopeExtension(scaling=rope_scaling, target_context=100, factor=4.5))
    if rope_scaling == "ntk":
        assert extended.rope_parameters["rope_theta"] == pytest.approx(10000 * 4.5 ** (128 / 126))
    else:
        assert extended.rope_parameters["factor"] == 4.5
    assert extended.max_position_embeddings == (ORIGINAL if rope_scaling == "dynamic" else 100)


def test_interpolated_positions_are_the_original_ones_divided(model_folder):
    cpu = torch.device("cpu")
    original = load_model(model_folder, device=cpu)
    extended = load_model(model_folder, device=cpu, extension=RopeExtension(target_context=128))
    hidden = torch.zeros(1, 1, 32)
    even = torch.arange(0, 128, 2)[None]
    for ours, reference in zip(
        extended.model.rotary_emb(hidden, even), original.model.rotary_emb(hidden, torch.arange(64)[None]), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_within_the_original_context_a_dynamic_model_is_the_original_one(model_folder):
    cpu, ids = torch.device("cpu"), torch.arange(3, 63)[None]
    extension = RopeExtension(scaling="dynamic", target_context=128)
    original, dynamic = (load_model(model_folder, device=cpu, extension=asked) for asked in (None, extension))
    with torch.no_grad():
        torch.testing.assert_close(dynamic(ids).logits, original(ids).logits)
        dynamic(torch.zeros(1, 128, dtype=torch.long))  # a long text in between changes nothing
        torch.testing.assert_close(dynamic(ids).logits, original(ids).logits)


def test_a_model_without_rope_is_refused():
    with pytest.raises(ValueError, match="gpt2 has no rotary position embeddings"):
        extend_context(GPT2Config(), RopeExtension(target_context=2048))


@pytest.mark.parametrize("rope_scaling", SCALINGS)
def test_a_record_is_stamped_with_the_scaling_its_factor_and_the_target(model_folder, tmp_path, rope_scaling):
    assert rope_of(load_config(model_folder)) == {"rope_scaling": "none", "rope_factor": 1.0, "target_context": 64}
    extended = load_config(model_folder, extension_by(rope_scaling, 160))
    factor = 3.0 if rope_scaling == "linear" else 2.5  # Position Interpolation's factors are whole
    stamp = ("none", 1.0) if rope_scaling in STORED else (rope_scaling, factor)
    assert rope_of(extended) == dict(zip(("rope_scaling", "rope_factor", "target_context"), (*stamp, 160), strict=True))
    extended.save_pretrained(tmp_path / "merged")
    assert rope_of(load_config(str(tmp_path / "merged"))) == rope_of(extended)


LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "context"),
    [
        ({"max_position_embeddings": 4096, "max_sequence_length": 16384, "rope_scaling": LINEAR}, 16384),  # Vicuna v1.5 16k
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),  # LongQLoRA, LongLoRA
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),  # Qwen2.5
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),  # Qwen3
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {**LLAMA3, "factor": 8.0}}, 131072),  # Llama 3.1
        ({"max_position_embeddings": 131072, "rope_scaling": {**LLAMA3, "factor": 32.0}}, 131072),  # Llama 3.2
        ({"max_position_embeddings": 8192, "rope_scaling": {**LLAMA3, "factor": 2.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),  # without type
        (
            {"max_position_embeddings": 6000, "original_max_position_embeddings": 4096, "rope_scaling": LINEAR},
            6000,  # what this project publishes
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"rope_scaling": LINEAR}, None),
    ],
)
def test_the_scaled_context_counts_whether_or_not_a_published_model_has_it_as_its_length(tmp_path, model, context):
    assert context_in(model) == context
    if context:
        LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text()) | {"rope_theta": 10000.0}
        own_scaling = {"rope_parameters": None} if "rope_parameters" not in model else {}
        (tmp_path / "config.json").write_text(json.dumps(values | own_scaling | model))
        assert context_of(load_config(str(tmp_path))) == context


def test_a_linear_model_keeps_its_original_length_beside_the_new_one(model_folder, tmp_path):
    load_config(model_folder, RopeExtension(target_context=160)).save_pretrained(tmp_path / "merged")
    merged = load_config(str(tmp_path / "merged"))
    assert (merged.max_position_embeddings, merged.original_max_position_embeddings) == (160, 64)


def test_a_scaled_model_is_its_own_extension_to_its_scaled_context():
    same = extend_context(scaled_llama({"type": "linear", "factor": 2.0}, 64), RopeExtension(target_context=128))
    assert (same.rope_parameters["factor"], context_of(same)) == (2.0, 128)
    with pytest.raises(ValueError, match="64 is below the model's own context of 128"):
        extend_context(scaled_llama({"type": "linear", "factor": 2.0}, 64), RopeExtension(target_context=64))


def scaled_llama(rope_scaling: dict, max_position_embeddings: int) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=max_position_embeddings, rope_scaling=rope_scaling)


@pytest.mark.parametrize(
    ("rope", "length", "target", "factor", "stored_length"),
    [
        ({"type": "linear", "factor": 2.0}, 4096, 16384, 4.0, 16384),
        ({"type": "linear", "factor": 2.0}, 4096, 12000, 4.0, 12000),  # whole factors
        ({"type": "dynamic", "factor": 2.0}, 4096, 16384, 4.0, 4096),
        (YARN, 32768, 262144, 8.0, 262144),  # Qwen2.5
        (YARN, 40960, 262144, 8.0, 262144),  # Qwen3
        ({**LLAMA3, "factor": 8.0}, 131072, 262144, 16.0, 262144),  # Llama 3.1
    ],
)
def test_a_scaled_model_is_extended_further_by_a_larger_factor_of_the_same_scaling(rope, length, target, factor, stored_length):
    scaling = rope.get("rope_type") or rope["type"]
    extended = extend_context(scaled_llama(rope, length), RopeExtension(scaling=scaling, target_context=target))
    assert (extended.rope_parameters["factor"], extended.max_position_embeddings) == (factor, stored_length)
    expected = rope.get("original_max_position_embeddings")
    assert extended.rope_parameters.get("original_max_position_embeddings") == expected
    assert rope_of(extended)["target_context"] == (target if scaling != "linear" else stored_length)
    at_once = extend_context(LlamaConfig(max_position_embeddings=4096), RopeExtension(scaling=scaling, target_context=16384))
    if length == 4096 and target == 16384:
        assert extended.rope_parameters["factor"] == at_once.rope_parameters["factor"]


def test_a_further_extension_by_yarn_computes_the_scaling_of_the_attention_anew():
    rope = {**YARN, "attention_factor": 1.1}
    extended = extend_context(scaled_llama(rope, 32768), RopeExtension(scaling="yarn", target_context=262144))
    assert ROPE_INIT_FUNCTIONS["yarn"](extended, "cpu")[1] == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("asked", ["linear", "dynamic", "llama3", "ntk", "theta"])
def test_a_scaled_model_is_not_extended_by_another_scaling(asked):
    message = "positions are scaled already .yarn.: only rope_scaling: yarn extends it further; for another scaling, start from"
    with pytest.raises(ValueError, match=message):
        extend_context(scaled_llama(YARN, 32768), extension_by(asked, 262144))


def test_a_model_of_an_unknown_scaling_is_not_extended():
    longrope = LlamaConfig(
        max_position_embeddings=4096,
        rope_scaling={
            "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
            "original_max_position_embeddings": 2048,
        },
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"scaled already .longrope.: it cannot be extended; for another scaling, start from"):
        extend_context(longrope, RopeExtension(scaling="yarn", target_context=8192))
