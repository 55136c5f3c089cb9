"""Small models, tokenizers and texts that the tests share; everything runs on a CPU with no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.pretraining import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The project's own sources: real text of a few hundred thousand characters."""
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("longqlora/[a-z]*.py"))]


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


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> str:
    """A model of 64 tokens of context on disk, with its tokenizer; its theta is not the default of the library."""
    folder = tmp_path / "base"
    tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
