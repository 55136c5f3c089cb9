"""Small models, tokenizers and texts that the tests share; everything runs on a CPU with no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import FakeHub, serve
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.config.settings import EvaluatedModel, ProgressSettings, RopeExtension, TrainingSettings
from longqlora.data.token_files import tokenize_documents
from longqlora.training.pretraining import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TIERS = {"process", "workflow", "distributed", "cluster"}
TIER_OF_MODULE = {"test_workflow": "workflow", "test_workflow_module": "workflow", "test_launch": "distributed"}

SETTINGS = TrainingSettings(
    rank=4, dropout=0.0, steps=30, batch_size=4, gradient_accumulation=1, learning_rate=5e-3, warmup_steps=2, max_grad_norm=1.0,
    optimizer="adamw_torch", memory="speed",
)  # fmt: skip
PROGRESS = ProgressSettings(logging_steps=1, checkpoint_steps=100)
LONGLORA = {
    "method": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": ["embed_tokens", "norm"],
}  # fmt: skip

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template whose answers end with another token than texts."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items) -> None:
    """Mark each test with its tier: that of its module or its own mark, otherwise unit."""
    for item in items:
        if item.path.stem in TIER_OF_MODULE:
            item.add_marker(TIER_OF_MODULE[item.path.stem])
        elif not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("unit")


@pytest.fixture(autouse=True)
def _no_processes_in_unit_tests(request, monkeypatch) -> None:
    """Let a unit test fail that starts a process: it needs another mark."""

    def refuse(*_, **__):
        raise PermissionError("a unit test must not start processes; mark it with @pytest.mark.process")

    if request.node.get_closest_marker("unit"):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(BaseProcess, "start", refuse)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def demo(root, monkeypatch) -> dict:
    """The demo's configuration, as parsed from YAML; its paths begin at the root, which becomes the current folder."""
    monkeypatch.chdir(root)
    return yaml.safe_load((root / "config/config.yaml").read_text())


@pytest.fixture
def demo_pretraining(root, monkeypatch) -> dict:
    """The configuration that trains the demo's base model, as parsed from YAML; its paths begin at the root, too."""
    monkeypatch.chdir(root)
    return yaml.safe_load((root / "config/demo-pretraining.yaml").read_text())


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """An empty hub on this machine, which huggingface_hub uses in this test, with an empty cache and no token."""
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Frozen texts of about 200,000 characters in all."""
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/texts").glob("*.txt"))]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, vocab_size=512)


def tiny_llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


def save_base(folder, tokenizer, dtype: torch.dtype = torch.float32, **overrides) -> str:
    """A model of 64 tokens of context on disk, with its tokenizer; its theta is not the default of the library."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    tiny_llama(**{"rope_parameters": rope, **overrides}).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evaluated_model(path, **fields) -> EvaluatedModel:
    """A model to evaluate in float32, unless the fields say otherwise."""
    return EvaluatedModel(path=str(path), **{"precision": "float32", "group_ratio": 0.25, **fields})


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> str:
    return save_base(tmp_path / "base", tokenizer)


@pytest.fixture
def corpus(tmp_path, texts, tokenizer) -> str:
    path = tmp_path / "corpus.bin"
    tokenize_documents(texts, tokenizer, str(path))
    return str(path)


def train_tiny(
    base_model, data, output, /, *, target_context=128, rope_scaling="linear", device="cpu", form="all", **changes
) -> dict:
    """Train a system with :data:`SETTINGS` and :data:`PROGRESS`, some of them changed. TensorBoard events and checkpoints are
    written to folders named after the output."""
    from longqlora.training.train import TrainingFiles, train  # slow to import, and few tests train

    progress = {key: changes.pop(key) for key in list(changes) if key in ProgressSettings.model_fields}
    return train(
        files=TrainingFiles(str(base_model), str(data), str(output), f"{output}-events", f"{output}-checkpoints"),
        extension=RopeExtension(scaling=rope_scaling, target_context=target_context),
        settings=SETTINGS.model_copy(update=changes),
        progress=PROGRESS.model_copy(update=progress),
        seed=1,
        device=device,
        form=form,
    )
