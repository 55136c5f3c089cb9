import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.config.settings import RopeExtension
from longqlora.modeling.loading import load_config
from longqlora.publishing.served_config import served_config


def config_of(model: str, scaling: str) -> dict:
    theta = 8000.0 if scaling == "theta" else None
    return load_config(model, RopeExtension(scaling=scaling, target_context=512, theta=theta)).to_dict()


@pytest.fixture
def base(root) -> str:
    return str(root / "demo/model")


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "llama3", "ntk", "theta"])
def test_transformers_computes_the_same_with_the_further_keys(scaling, base, tmp_path):
    frequencies = []
    for name, change in (("trained", dict), ("published", served_config)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(change(config_of(base, scaling))))
        config = AutoConfig.from_pretrained(tmp_path / name)
        frequencies.append((LlamaRotaryEmbedding(config), config.rope_parameters))
    (ours, before), (published, after) = frequencies
    assert torch.equal(ours.inv_freq, published.inv_freq)
    assert ours.attention_scaling == published.attention_scaling
    assert before == after


def test_readers_of_the_old_keys_find_theta_and_scaling(base):
    assert (
        served_config(config_of(base, "linear")).items()
        >= {
            "rope_theta": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        }.items()
    )
    llama3 = served_config(config_of(base, "llama3"))
    assert llama3["original_max_position_embeddings"] == 128
    assert llama3["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    theta = served_config(config_of(base, "theta"))
    assert theta["rope_theta"] == 8000.0
    assert not theta.get("rope_scaling")


def test_a_model_without_rotary_embeddings_stays_as_it_is():
    assert served_config({"model_type": "mpt", "max_seq_len": 2048}) == {"model_type": "mpt", "max_seq_len": 2048}
