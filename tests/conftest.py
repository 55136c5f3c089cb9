"""Small models, tokenizers and texts that the tests share; everything runs on a CPU with no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.data.token_files import tokenize_documents
from longqlora.training.pretraining import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {
    "method": "qlora", "data": "corpus", "attention": "shifted_sparse", "group_ratio": 0.25, "rank": 4, "alpha": 16,
    "dropout": 0.0, "target_modules": "all-linear", "modules_to_save": [], "steps": 30, "batch_size": 4,
    "gradient_accumulation": 1, "learning_rate": 5e-3, "warmup_steps": 2, "max_grad_norm": 1.0, "weight_decay": 0.0,
    "optimizer": "adamw_torch", "activation_checkpointing": False, "isolate_documents": False, "pack_records": False,
    "num_processes": 1, "zero_stage": 0, "offload": False,
    "offload_activations": False,
}  # fmt: skip
PROGRESS = {"logging_steps": 1, "checkpoint_steps": 100, "checkpoints_kept": 2}
LONGLORA = {
    "method": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": ["embed_tokens", "norm"],
}  # fmt: skip


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


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


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> str:
    return save_base(tmp_path / "base", tokenizer)


@pytest.fixture
def corpus(tmp_path, texts, tokenizer) -> str:
    path = tmp_path / "corpus.bin"
    tokenize_documents(texts, tokenizer, str(path))
    return str(path)


def train_tiny(base_model, data, output, /, *, target_context=128, rope_scaling="linear", device="cpu", **settings) -> dict:
    """Train a system from the base; its TensorBoard events and its checkpoints lie beside the output."""
    from longqlora.training.train import train  # slow to import, and few tests train

    return train(
        base_model=str(base_model),
        data=str(data),
        output=str(output),
        events=f"{output}-events",
        checkpoint_dir=f"{output}-checkpoints",
        target_context=target_context,
        rope_scaling=rope_scaling,
        settings={**SETTINGS, **{key: value for key, value in settings.items() if key not in PROGRESS}},
        progress={key: settings.get(key, value) for key, value in PROGRESS.items()},
        seed=1,
        device=device,
    )
