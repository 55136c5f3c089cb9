"""A tokenizer and a small LLaMA, trained from scratch: its windows, its optimizers, and the folder that is written."""

import hashlib
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longqlora.config.settings import PretrainingSettings
from longqlora.data.token_files import encode
from longqlora.modeling.chunked_loss import next_token_loss
from longqlora.training.pretraining import (
    Muon,
    draw_windows,
    make_model,
    optimizers_of,
    pretrain,
    pretrain_model,
)

SETTINGS = PretrainingSettings.model_validate(
    {
        "paths": ["texts.txt"],
        "license": "PSF-2.0",
        "vocab_size": 512,
        "context": 64,
        "rope_theta": 500,
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "steps": 30,
        "tokens_per_step": 512,
        "muon_learning_rate": 0.02,
        "adamw_learning_rate": 0.01,
    }
)  # fmt: skip


def settings(**changes) -> PretrainingSettings:
    return SETTINGS.model_copy(update=changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- windows ---------------------------------------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_stream():
    stream = 3 * torch.arange(1000)
    windows = draw_windows(stream, settings(), generator())
    assert windows.shape == (8, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + 3 * torch.arange(64))
    assert len(set(windows[:, 0].tolist())) > 5  # places differ
    assert torch.equal(windows, draw_windows(stream, settings(), generator()))
    assert not torch.equal(windows, draw_windows(stream, settings(), generator(1)))


# --- optimizers ------------------------------------------------------------------------------------------------------------


def test_muon_makes_the_updates_of_torch_in_float32(monkeypatch):
    """torch computes in bfloat16; here in float64, so that rounding does not hide a difference."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    numbers = generator()
    ours = [torch.randn(shape, generator=numbers).requires_grad_() for shape in shapes]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    optimizers = [Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)]
    for _ in range(4):
        gradients = [torch.randn(shape, generator=numbers) for shape in shapes]
        for matrices, optimizer in zip((ours, theirs), optimizers, strict=True):
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_step_of_muon_on_a_gradient_of_zero_changes_nothing():
    matrix = torch.ones(4, 8, requires_grad=True)
    matrix.grad = torch.zeros(4, 8)
    Muon([matrix], lr=1.0).step()
    assert torch.equal(matrix, torch.ones(4, 8))


def test_every_weight_has_one_optimizer_and_the_rates_rise_and_fall(tokenizer):
    model = make_model(tokenizer, settings(), seed=1)
    optimizers, schedules = optimizers_of(model, 100, muon_learning_rate=0.02, adamw_learning_rate=0.01)
    muon, adamw = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(map(id, muon + adamw)) == sorted(names)
    assert {names[id(p)].split(".")[-2] for p in muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    rates = []
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        rates.append([schedule.get_last_lr()[0] for schedule in schedules])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    shares = numpy.array(rates) / [0.02, 0.01]
    assert shares[[0, 4, 30, 60, 80, 99]] == pytest.approx(numpy.array([[0.2, 1, 1, 1, 0.5, 0.025]] * 2).T)


# --- training --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(texts, tokenizer) -> torch.Tensor:
    return torch.tensor([token for ids in encode(tokenizer, texts) for token in ids])


def test_training_lowers_the_loss(stream, tokenizer):
    model = make_model(tokenizer, settings(), seed=1)
    windows = draw_windows(stream, settings(), generator(9))

    def loss() -> float:
        with torch.no_grad():
            return next_token_loss(model, windows, windows).item()

    before = loss()
    assert before == pytest.approx(math.log(512), abs=0.2)  # nothing is known yet
    mean = pretrain(model, stream, settings(), seed=1)
    assert loss() < before - 1
    assert loss() < mean < before
    assert not model.training


def test_too_short_texts_are_an_error(tokenizer):
    model = make_model(tokenizer, settings(), seed=1)
    with pytest.raises(ValueError, match=r"^pretraining\.paths: 64 tokens are too few for a window of 64$"):
        pretrain(model, torch.zeros(64, dtype=torch.int64), settings(), seed=1)
    pretrain(model, torch.zeros(65, dtype=torch.int64), settings(steps=1), seed=1)


# --- the folder ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(root):
    """Make a model of two steps; its settings have values of their own, so that the card shows which it names."""

    def make(output: Path, seed: int = 3) -> PretrainingSettings:
        paths = [str(root / f"tests/texts/{name}.txt") for name in ("demo", "readme")]
        chosen = settings(paths=paths, vocab_size=400, steps=2)
        pretrain_model(settings=chosen, seed=seed, command="snakemake made", output=str(output))
        return chosen

    return make


def test_the_folder_loads_in_bfloat16_with_a_tokenizer_that_encodes_any_text(made, tmp_path):
    made(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.max_position_embeddings == 64
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer) == 400
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "def naïve(🙂):\n\treturn '漢字'  \n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.isfinite().all()


def test_addresses_may_have_wildcards(made, root, tmp_path):
    chosen = made(tmp_path / "named")
    found = chosen.model_copy(
        update={"paths": [f"file://{root}/tests/texts/{pattern}.txt" for pattern in ("dem[o]", "readme")]}
    )
    pretrain_model(settings=found, seed=3, command="snakemake made", output=str(tmp_path / "found"))
    named, found = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("named", "found"))
    assert named == found


def test_the_card_names_every_file_with_its_digest_and_says_how_the_model_was_made(made, tmp_path):
    chosen = made(tmp_path)
    card = (tmp_path / "README.md").read_text()
    files = [path for path in tmp_path.iterdir() if path.name != "README.md"] + list(map(Path, chosen.paths))
    digests = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card, re.MULTILINE))
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "readme.txt"} <= set(digests)
    for part in (
        "| made by | `snakemake made` |", "hidden_size 32", "vocabulary 400", "| context | 64 tokens, rope_theta 500 |",
        "| steps | 2 of 512 tokens, seed 3 |", "Muon 0.02, AdamW 0.01", f"torch {torch.__version__}",
        "license_name: psf-2.0",
    ):  # fmt: skip
        assert part in card


def test_the_same_seed_makes_the_same_model_and_another_seed_another(made, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(tmp_path / name, seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
