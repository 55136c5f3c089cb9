import pytest
import torch
from conftest import tiny_llama
from transformers import GPT2Config, LlamaConfig

from longqlora.models import load_config, load_model
from longqlora.positions import extend_context, interpolation_factor


@pytest.mark.parametrize(
    ("target", "original", "factor"), [(8192, 4096, 2), (12288, 4096, 3), (6000, 4096, 2), (4096, 4096, 1)]
)
def test_factor_is_the_whole_number_that_covers_the_target(target, original, factor):
    assert interpolation_factor(target, original) == factor


def test_a_target_below_the_models_own_context_is_refused():
    with pytest.raises(ValueError, match="2048 is below the model's own context of 4096"):
        extend_context(LlamaConfig(max_position_embeddings=4096), 2048)


def test_the_models_own_theta_is_kept(model_folder):
    config = load_config(model_folder, 128)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert config.max_position_embeddings == 128


def test_interpolated_positions_are_the_original_ones_divided(model_folder):
    cpu = torch.device("cpu")
    original = load_model(model_folder, device=cpu)
    extended = load_model(model_folder, device=cpu, context_length=128)
    hidden = torch.zeros(1, 1, 32)
    even = torch.arange(0, 128, 2)[None]
    for ours, reference in zip(
        extended.model.rotary_emb(hidden, even), original.model.rotary_emb(hidden, torch.arange(64)[None]), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_a_model_without_rope_or_scaled_already_is_refused():
    with pytest.raises(ValueError, match="gpt2 has no rotary position embeddings"):
        extend_context(GPT2Config(), 2048)
    scaled = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}).config
    with pytest.raises(ValueError, match="scaled already"):
        extend_context(scaled, 128)
