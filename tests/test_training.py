import json
import subprocess
import sys

import pyarrow
import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.chat_template import CHAT_TEMPLATE
from longqlora.instruction_set import TOKENS
from longqlora.merging import merge_adapter
from longqlora.models import load_model, next_token_loss, use_chunked_loss
from longqlora.packing import load_training_data, pad_at_right
from longqlora.tokens import tokenize_documents
from longqlora.training import train_adapter

SETTINGS = {
    "attention": "shifted_sparse", "group_ratio": 0.25, "rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear",
    "steps": 30, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 5e-3, "warmup_steps": 2, "max_grad_norm": 1.0,
    "weight_decay": 0.0, "optimizer": "adamw_torch", "activation_checkpointing": False, "logging_steps": 1,
    "isolate_documents": False, "pack_records": False,
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path, texts, tokenizer) -> str:
    path = tmp_path / "corpus.bin"
    tokenize_documents(texts, tokenizer, str(path))
    return str(path)


def train(model_folder, corpus, output, **settings):
    arguments = {
        "base_model": model_folder,
        "data": corpus,
        "output": str(output),
        "context_length": 128,
        "seed": 1,
        "device": "cpu",
    }
    return train_adapter(**arguments, settings={**SETTINGS, **settings})


def test_the_chunked_loss_and_its_gradients_are_the_plain_ones():
    model = tiny_llama()
    ids = torch.randint(512, (3, 40))
    labels = ids.clone()
    labels[0, :10] = -100
    plain = model(input_ids=ids, labels=labels).loss
    expected = torch.autograd.grad(plain, list(model.parameters()))
    chunked = next_token_loss(model, ids, labels)
    torch.testing.assert_close(chunked, plain)
    for gradient, reference in zip(torch.autograd.grad(chunked, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(use_chunked_loss(model)(input_ids=ids, labels=labels).loss, plain)


def test_training_learns_reproducibly_and_leaves_a_standard_adapter(model_folder, corpus, tmp_path):
    card = train(model_folder, corpus, tmp_path / "a")
    losses = [row["loss"] for row in card["trace"]]
    assert len(losses) == card["steps"] == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert card["tokens"] == 30 * 4 * 128
    assert json.loads((tmp_path / "a" / "training.json").read_text()) == card
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    modules = {name.split(".")[-3] for name in weights}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(weights[name].abs().sum() > 0 for name in weights)
    train(model_folder, corpus, tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("settings", [{"gradient_accumulation": 4, "batch_size": 1}, {"activation_checkpointing": True}])
def test_accumulation_and_checkpointing_change_no_loss(model_folder, corpus, tmp_path, settings):
    reference = train(model_folder, corpus, tmp_path / "a", steps=3)
    other = train(model_folder, corpus, tmp_path / "b", steps=3, **settings)
    for row, expected in zip(other["trace"], reference["trace"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-2)  # bfloat16 where the CPU has it


@pytest.fixture
def lines(tmp_path, texts, tokenizer) -> str:
    """A corpus whose documents are shorter than a window."""
    tokenize_documents((line for text in texts for line in text.splitlines()), tokenizer, str(tmp_path / "lines.bin"))
    return str(tmp_path / "lines.bin")


def write_tokenized(path, rows: list[list[int]], labels: list[list[int]]) -> str:
    with pyarrow.ipc.new_stream(str(path), TOKENS) as writer:
        writer.write_table(pyarrow.table({"input_ids": rows, "labels": labels}, schema=TOKENS))
    return str(path)


@pytest.fixture
def instructions(tmp_path, texts, tokenizer) -> str:
    """Records of 10 to 60 tokens, the second half of each learned."""
    ids = tokenizer(texts[0])["input_ids"]
    rows = [ids[start : start + 10 + start % 51] for start in range(0, 1000, 7)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    return write_tokenized(tmp_path / "sft.arrow", rows, labels)


@pytest.mark.parametrize("settings", [{"attention": "full"}, {"activation_checkpointing": True}])
@pytest.mark.parametrize(("option", "data"), [("isolate_documents", "lines"), ("pack_records", "instructions")])
def test_packed_documents_reach_the_model_and_are_learned(model_folder, tmp_path, monkeypatch, request, option, data, settings):
    positions, rotate = [], LlamaRotaryEmbedding.forward

    def spy(self, hidden, position_ids):
        positions.append(position_ids)
        return rotate(self, hidden, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", spy)
    card = train(model_folder, request.getfixturevalue(data), tmp_path / "a", **{option: True}, **settings, steps=12)
    losses = [row["loss"] for row in card["trace"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert len(positions) == 12
    assert all((rows == 0).sum() > 2 * 4 for rows in positions)  # beginnings in four windows


def test_the_loss_of_packed_records_is_that_of_the_records_alone(instructions):
    model = tiny_llama(max_position_embeddings=128).train()
    packed, plain = (load_training_data(instructions, 128, pack_records=packed) for packed in (True, False))
    alone = [next_token_loss(model, row["input_ids"][None], row["labels"][None], num_items_in_batch=1) for row in plain]
    batch = pad_at_right([packed[index] for index in range(len(packed))])
    together = next_token_loss(model, **batch, num_items_in_batch=1)
    torch.testing.assert_close(together, sum(alone))


@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)])
def test_where_nothing_is_to_be_learned_loss_and_gradients_are_zero(num_items_in_batch):
    model, ids = tiny_llama(), torch.randint(512, (2, 20))
    loss = next_token_loss(model, ids, torch.full_like(ids, -100), num_items_in_batch)
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_a_batch_with_nothing_to_learn_leaves_the_adapter_finite(model_folder, tmp_path, texts, tokenizer):
    ids = tokenizer(texts[0])["input_ids"]
    rows = [ids[start : start + 40] for start in range(0, 160, 10)]
    masked, half = [[-100] * 40] * 16, [[-100] * 20 + row[20:] for row in rows]
    for name, labels, learns in [("nothing", masked, False), ("some", masked[:8] + half[:8], True)]:
        data = write_tokenized(tmp_path / f"{name}.arrow", rows, labels)
        card = train(model_folder, data, tmp_path / name, steps=32, batch_size=1, attention="full")
        losses = [row["loss"] for row in card["trace"]]
        assert losses.count(0) == (16 if learns else 32)  # two epochs of 16 rows
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        assert any(weight.any() for key, weight in weights.items() if "lora_B" in key) == learns


def test_options_of_packing_are_checked_before_weights_are_loaded(model_folder, corpus, instructions, tmp_path):
    with pytest.raises(ValueError, match="pack_records is for an instruction set"):
        train(model_folder, corpus, tmp_path / "a", pack_records=True)
    with pytest.raises(ValueError, match="isolate_documents is for a corpus"):
        train(model_folder, instructions, tmp_path / "a", isolate_documents=True)


def test_a_merged_model_is_base_plus_adapter_and_loads_without_this_project(model_folder, corpus, tmp_path, tokenizer):
    train(model_folder, corpus, tmp_path / "adapter")
    arguments = {"base_model": model_folder, "adapter": str(tmp_path / "adapter"), "context_length": 128}
    merge_adapter(**arguments, output=str(tmp_path / "merged"), is_chat_model=False)
    ids = torch.tensor([tokenizer("def merge(adapter):")["input_ids"]])
    base = load_model(model_folder, device=torch.device("cpu"), context_length=128)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-3)
        with adapted.disable_adapter():
            assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-2)
    stock = (
        "import sys; sys.modules['longqlora'] = None\n"  # an import of it would fail
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "rope = model.config.rope_parameters\n"
        "assert (rope['rope_type'], rope['factor'], rope['rope_theta']) == ('linear', 2.0, 500000.0), rope\n"
        "assert tokenizer.model_max_length == model.config.max_position_embeddings == 128\n"
        "print(model.generate(**tokenizer('def', return_tensors='pt'), max_new_tokens=4).shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", stock, tmp_path / "merged"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size" in run.stdout


def test_the_chat_template_goes_with_a_merged_chat_model_alone(model_folder, corpus, tmp_path):
    train(model_folder, corpus, tmp_path / "adapter", steps=1)
    arguments = {"base_model": model_folder, "adapter": str(tmp_path / "adapter"), "context_length": 128}
    for name, is_chat_model in [("chat", True), ("plain", False)]:
        merge_adapter(**arguments, output=str(tmp_path / name), is_chat_model=is_chat_model)
    chat, plain = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("chat", "plain"))
    assert chat.chat_template == CHAT_TEMPLATE
    assert plain.chat_template is None
    prompt = chat.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("to the user's questions. USER: Hi! ASSISTANT:")


def test_impossible_trainings_are_refused_before_weights_are_loaded(model_folder, corpus, tmp_path):
    arguments = {"base_model": model_folder, "data": corpus, "output": str(tmp_path / "a"), "settings": SETTINGS, "seed": 1}
    with pytest.raises(ValueError, match="32 is below the model's own context of 64"):
        train_adapter(**arguments, context_length=32, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            train_adapter(**arguments, context_length=128, device="cuda")
