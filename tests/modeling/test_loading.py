"""Models of the hub: each part of them is read at the same revision."""

from pathlib import Path

import pytest
import torch
from conftest import save_base
from huggingface_hub import constants
from safetensors.torch import load_file

from longqlora.data.hub import pinned_model
from longqlora.data.tokenizers import load_tokenizer
from longqlora.modeling.generation_settings import generation_settings
from longqlora.modeling.loading import load_config, load_model
from longqlora.publishing.weights import checkpoint_folder, read_weights

CPU = torch.device("cpu")


@pytest.fixture
def versions(hub, tmp_path, tokenizer) -> dict[str, str]:
    """A model on the hub with a newer main and an older v1, which differ in every file; their commits."""
    commits = {}
    for revision, layers in (("v1", 1), ("main", 2)):
        folder = Path(save_base(tmp_path / revision, tokenizer, num_hidden_layers=layers))
        settings = (folder / "generation_config.json").read_text()
        (folder / "generation_config.json").write_text(settings.replace("{", f'{{"top_k": {layers},', 1))
        tokenizer_settings = (folder / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(
            tokenizer_settings.replace("{", f'{{"chat_template": "{revision}",', 1).replace(
                "TokenizersBackend", "LlamaTokenizer"
            )
        )
        commits[revision] = hub.add("models/owner/name", folder, revision)
    return commits


def layers_and_settings(path: str) -> tuple:
    """Number of layers by the configuration, by the loaded model and by its weights; top_k; chat template."""
    weights = dict(read_weights(checkpoint_folder(path)))
    return (
        load_config(path).num_hidden_layers,
        len(load_model(path, device=CPU).model.layers),
        sum(name.endswith("input_layernorm.weight") for name in weights),
        generation_settings(path).top_k,
        load_tokenizer(path).chat_template,
    )


def test_every_part_of_a_model_is_read_at_its_revision(hub, versions):
    assert layers_and_settings("owner/name@v1") == (1, 1, 1, 1, "v1")
    assert layers_and_settings(f"owner/name@{versions['v1']}") == (1, 1, 1, 1, "v1")
    assert layers_and_settings("owner/name") == (2, 2, 2, 2, "main")


def test_a_downloaded_model_is_read_without_a_network(hub, versions, monkeypatch):
    online = layers_and_settings("owner/name@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    number = len(hub.requests)
    assert layers_and_settings("owner/name@v1") == online
    assert pinned_model("owner/name@v1") == f"owner/name@{versions['v1']}"
    assert len(hub.requests) == number


def test_the_only_weights_of_an_older_model_are_read(hub, versions, tmp_path):
    weights = load_file(tmp_path / "v1/model.safetensors")
    torch.save(weights, tmp_path / "v1/pytorch_model.bin")
    (tmp_path / "v1/model.safetensors").unlink()
    hub.add("models/owner/old", tmp_path / "v1")
    read = dict(read_weights(checkpoint_folder("owner/old")))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
