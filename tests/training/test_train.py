import json
import logging
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from conftest import LONGLORA, SETTINGS, save_base, tiny_llama, train_tiny
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.config.settings import RopeExtension
from longqlora.data.instruction_set import TOKENS
from longqlora.data.packing import load_training_data, pad_at_right
from longqlora.data.token_files import read_tokens, tokenize_documents
from longqlora.modeling import attention
from longqlora.modeling.chunked_loss import next_token_loss, use_chunked_loss
from longqlora.modeling.devices import check_kernels
from longqlora.modeling.loading import load_model
from longqlora.training import train as training
from longqlora.training.adapters import FLOAT32, BaseDtypes, add_adapter

CPU = torch.device("cpu")
BFLOAT16 = BaseDtypes(torch.bfloat16, torch.bfloat16)


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
    card = train_tiny(model_folder, corpus, tmp_path / "a")
    losses = [row["loss"] for row in card["trace"]]
    assert len(losses) == card["steps"] == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert card["tokens"] == 30 * 4 * 128
    assert json.loads(json.dumps(card)) == card
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    modules = {name.split(".")[-3] for name in weights}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(weights[name].abs().sum() > 0 for name in weights)
    train_tiny(model_folder, corpus, tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("settings", [{"gradient_accumulation": 4, "batch_size": 1}, {"form": "layer_inputs"}])
def test_accumulation_and_checkpointing_change_no_loss(model_folder, corpus, tmp_path, settings):
    reference = train_tiny(model_folder, corpus, tmp_path / "a", steps=3)
    other = train_tiny(model_folder, corpus, tmp_path / "b", steps=3, **settings)
    assert other["activations"] == settings.get("form", "all")
    for row, expected in zip(other["trace"], reference["trace"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-2)  # bfloat16 where the CPU has it


def test_a_training_resumes_with_other_activations(model_folder, corpus, tmp_path):
    """With more or less memory than before, the steps that are done are not lost."""
    train_tiny(model_folder, corpus, tmp_path / "a", steps=4, checkpoint_steps=2)
    card = train_tiny(model_folder, corpus, tmp_path / "a", steps=4, checkpoint_steps=2, memory="smallest", form="layer_inputs")
    assert (card["resumed_from_step"], card["activations"]) == (4, "layer_inputs")


@pytest.mark.parametrize("settings", [{}, {"method": "full", "learning_rate": 1e-3}], ids=["adapter", "all weights"])
def test_the_last_steps_have_full_attention(model_folder, corpus, tmp_path, monkeypatch, settings):
    calls, attend = [], attention.shifted_sparse_attention
    monkeypatch.setattr(attention, "shifted_sparse_attention", lambda *args, **kw: calls.append(1) or attend(*args, **kw))
    sparse = train_tiny(model_folder, corpus, tmp_path / "sparse", steps=8, **settings)["trace"]
    calls_per_step = len(calls) // 8
    calls.clear()
    mixed = train_tiny(model_folder, corpus, tmp_path / "mixed", steps=8, full_attention_share=0.25, **settings)["trace"]
    assert len(calls) == 6 * calls_per_step
    assert mixed[:6] == sparse[:6]
    assert mixed[6]["loss"] != sparse[6]["loss"]
    configs = "".join(path.read_text() for path in (tmp_path / "mixed").glob("*config.json"))
    assert not any(name in configs for name in ("sdpa", attention.register_full_attention()))


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


@pytest.mark.parametrize("settings", [{"attention": "full"}, {"form": "layer_inputs"}])
@pytest.mark.parametrize(("option", "data"), [("isolate_documents", "lines"), ("pack_records", "instructions")])
def test_packed_documents_reach_the_model_and_are_learned(model_folder, tmp_path, monkeypatch, request, option, data, settings):
    positions, rotate = [], LlamaRotaryEmbedding.forward

    def spy(self, hidden, position_ids):
        positions.append(position_ids)
        return rotate(self, hidden, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", spy)
    card = train_tiny(model_folder, request.getfixturevalue(data), tmp_path / "a", **{option: True}, **settings, steps=12)
    losses = [row["loss"] for row in card["trace"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert len(positions) == 12
    assert all((rows == 0).sum() > 2 * 4 for rows in positions)  # beginnings in four windows


def test_short_windows_with_long_positions_are_learned_and_differ_from_epoch_to_epoch(
    model_folder, tmp_path, texts, tokenizer, monkeypatch
):
    tokenize_documents([texts[0][:600]], tokenizer, str(tmp_path / "small.bin"))
    windows = -(-len(read_tokens(str(tmp_path / "small.bin"))) // 32)
    positions, rotate = [], LlamaRotaryEmbedding.forward

    def spy(self, hidden, position_ids):
        positions.append(sorted(position_ids.tolist()))
        return rotate(self, hidden, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", spy)
    settings = {"attention": "full", "pose_window": 32, "batch_size": windows, "steps": 20}
    card = train_tiny(model_folder, tmp_path / "small.bin", tmp_path / "a", **settings)
    losses = [row["loss"] for row in card["trace"]]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    assert card["data"]["windows"] == windows
    assert len(positions) == 20
    assert all(len(row) == 32 and row[-1] < 128 for rows in positions for row in rows)
    assert max(row[-1] for rows in positions for row in rows) > 100
    assert all(rows != positions[0] for rows in positions[1:])  # a step is an epoch


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
        card = train_tiny(model_folder, data, tmp_path / name, steps=32, batch_size=1, attention="full")
        losses = [row["loss"] for row in card["trace"]]
        assert losses.count(0) == (16 if learns else 32)  # two epochs of 16 rows
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        assert any(weight.any() for key, weight in weights.items() if "lora_B" in key) == learns


def test_impossible_trainings_are_refused_before_weights_are_loaded(tmp_path, corpus, model_folder):
    AutoConfig.from_pretrained(model_folder).save_pretrained(tmp_path / "empty")  # a config.json and no weights
    with pytest.raises(ValueError, match="target_context 32 is below the model's own context of 64") as caught:
        train_tiny(tmp_path / "empty", corpus, tmp_path / "a", target_context=32, rank=33)
    assert "rank 33 is above the model's width, hidden_size 32" in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            train_tiny(tmp_path / "empty", corpus, tmp_path / "a", device="cuda")
    with pytest.raises(ValueError, match="holds no weights"):
        train_tiny(tmp_path / "empty", corpus, tmp_path / "a")


@pytest.mark.parametrize(
    ("capability", "architectures", "message"),
    [
        ((7, 0), ["sm_75", "sm_90", "compute_90"], r"Card has compute capability 7\.0, .*build of torch 2\.13 for CUDA 12\.6"),
        ((12, 1), ["sm_80", "sm_90a"], "a newer build of torch has them"),
        ((9, 0), ["sm_80", "sm_100"], "a newer build"),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], None),
        ((8, 6), ["sm_75", "sm_80"], None),  # runs what is built for an older one of the same kind
        ((9, 0), ["sm_80", "sm_90a"], None),
        ((10, 3), ["sm_90", "compute_90"], None),  # compiled by the driver
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_told_before_weights(monkeypatch, capability, architectures, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    if message is None:
        check_kernels(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=message):
        check_kernels(torch.device("cuda", 0))


@pytest.mark.parametrize("data", ["corpus", "instructions"])
def test_data_with_more_tokens_than_the_model_has_are_refused_before_weights_are_loaded(tmp_path, tokenizer, request, data):
    small = save_base(tmp_path / "small", tokenizer, vocab_size=300)
    (tmp_path / "small/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds token id \d+, but the vocabulary of .*small ends at 299; its tokens are of"):
        train_tiny(small, request.getfixturevalue(data), tmp_path / "a")


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_base_that_is_stored_quantized_is_refused_before_weights_are_loaded(tmp_path, corpus, tokenizer, method):
    base = save_base(tmp_path / "base", tokenizer, quantization_config={"quant_method": "gptq", "bits": 4})
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: its weights are stored quantized \(gptq, 4 bit\); training needs the model"):
        train_tiny(base, corpus, tmp_path / "a", method=method)


# --- which weights each method trains and writes --------------------------------------------------------------------------

SYSTEMS = {
    "qlora": ({"tie_word_embeddings": False}, {}),
    "lora": ({"tie_word_embeddings": False}, LONGLORA),
    "lora, tied": ({"tie_word_embeddings": True}, LONGLORA),
    "full": ({"tie_word_embeddings": False}, {"method": "full"}),
    "full, tied": ({"tie_word_embeddings": True}, {"method": "full"}),
}
ADAPTED = [name for name in SYSTEMS if "lora" in name]


def keep_models(patch) -> list:
    """A list that the models which are trained from now on are put into."""
    models, make = [], training.make_trainable

    def make_and_keep(*args, **kwargs):
        models.append(make(*args, **kwargs))
        return models[-1]

    patch.setattr(training, "make_trainable", make_and_keep)
    return models


@pytest.fixture(scope="module")
def systems(tmp_path_factory, texts, tokenizer) -> dict[str, SimpleNamespace]:
    """Each system trained for a few steps: base, folder, card, the model in memory, and its logits on a text."""
    root, trained = tmp_path_factory.mktemp("systems"), {}
    tokenize_documents(texts, tokenizer, str(root / "corpus.bin"))
    ids = torch.tensor([tokenizer("def train(model, corpus):")["input_ids"]])
    for name, (shape, settings) in SYSTEMS.items():
        base = save_base(root / f"{name} base", tokenizer, hidden_size=64, intermediate_size=128, **shape)
        folder = root / name
        with pytest.MonkeyPatch.context() as patch:
            models = keep_models(patch)
            card = train_tiny(base, root / "corpus.bin", folder, steps=12, **settings)
        model = models[0].eval()
        causal = model if settings.get("method") == "full" else model.base_model.model
        with torch.no_grad():
            hidden = causal.get_decoder()(input_ids=ids).last_hidden_state
            logits = causal.get_output_embeddings()(hidden)
        trained[name] = SimpleNamespace(
            base=base, folder=folder, card=card, model=model, ids=ids, logits=logits, data=root / "corpus.bin"
        )
    return trained


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_method_learns(systems, name):
    losses = [row["loss"] for row in systems[name].card["trace"]]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.03  # the 4-bit base's adapter learns the slowest
    trained = [weight for weight in systems[name].model.parameters() if weight.requires_grad]
    assert systems[name].card["trainable_parameters"] == sum(weight.numel() for weight in trained)


@pytest.mark.parametrize("name", ADAPTED)
def test_what_an_adapter_trains_changes_and_nothing_else_does(systems, name):
    system = systems[name]
    lora = {"q_proj", "k_proj", "v_proj", "o_proj"}
    lora |= set() if system.card["settings"]["modules_to_save"] else {"gate_proj", "up_proj", "down_proj"}
    whole = {"embed_tokens", "norm"} if system.card["settings"]["modules_to_save"] else set()
    before = load_file(f"{system.base}/model.safetensors")
    kinds = set()
    for key, weight in load_file(system.folder / "adapter_model.safetensors").items():
        layer = key.removeprefix("base_model.model.").removesuffix(".weight")
        if ".lora_" in layer:
            kinds.add(layer.split(".")[-2])
            assert weight.any()
        elif not layer.endswith("lm_head"):  # a tied one may be there under both names
            kinds.add("norm" if layer.endswith("norm") else layer.split(".")[-1])
            assert not torch.equal(weight, before[f"{layer}.weight"])
        assert weight.dtype == torch.float32
    assert kinds == lora | whole
    for key, weight in system.model.named_parameters():
        name_of_base = key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if not weight.requires_grad and name_of_base in before and weight.is_floating_point():
            torch.testing.assert_close(weight, before[name_of_base], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["full", "full, tied"])
def test_all_weights_change_in_full_training_and_load_with_stock_transformers(systems, name):
    system = systems[name]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (system.base, system.folder))
    assert set(before) == set(after)
    assert not any(torch.equal(before[key], after[key]) for key in before)
    model = AutoModelForCausalLM.from_pretrained(system.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(system.ids).logits, system.logits, atol=1e-5, rtol=1e-4)


def test_a_tied_head_stays_tied_to_the_trained_embeddings(systems):
    causal = systems["lora, tied"].model.base_model.model
    torch.testing.assert_close(causal.get_output_embeddings().weight, causal.get_input_embeddings().weight, atol=0, rtol=0)
    assert systems["lora, tied"].card["trainable_parameters"] == systems["lora"].card["trainable_parameters"]


@pytest.mark.process
def test_adapters_load_with_stock_peft_on_a_stock_base_with_scaled_positions(systems, tmp_path):
    """In a process that cannot import this project."""
    expected = {name: systems[name] for name in ADAPTED}
    expected = {name: (system.base, str(system.folder), system.ids, system.logits) for name, system in expected.items()}
    torch.save(expected, tmp_path / "expected.pt")
    stock = (
        "import sys; sys.modules['longqlora'] = None\n"  # an import of it would fail
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig\n"
        "nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,\n"
        "    bnb_4bit_compute_dtype=torch.float32)\n"
        "for name, (base, adapter, ids, expected) in torch.load('expected.pt').items():\n"
        "    config = AutoConfig.from_pretrained(base)\n"
        "    config.rope_parameters = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500000.0}\n"
        "    config.max_position_embeddings = 128\n"
        "    quantized = {'quantization_config': nf4} if name == 'qlora' else {}\n"
        "    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32, **quantized)\n"
        "    model = PeftModel.from_pretrained(model, adapter).eval()\n"
        "    with torch.no_grad():\n"
        "        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-3, msg=lambda m: name + m)\n"
        "        with model.disable_adapter():\n"
        "            assert not torch.allclose(model(ids).logits, expected, atol=1e-2), name\n"
        "print('equal')\n"
    )
    run = subprocess.run([sys.executable, "-c", stock], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "equal"


@pytest.mark.parametrize("method", [{"method": "qlora", "modules_to_save": ["embed_tokens", "norm"]}, LONGLORA])
@pytest.mark.parametrize("tied", [True, False])
def test_trained_weights_are_32_bit_where_the_base_has_16(tmp_path, tokenizer, method, tied):
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16, tie_word_embeddings=tied)
    model = add_adapter(load_model(base, device=CPU, precision="bfloat16"), SETTINGS.model_copy(update=method), base=None)
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert {"lora_A", "modules_to_save"} <= {part for name in trained for part in name.split(".")}
    if method["method"] == "lora":
        assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        use_chunked_loss(model.base_model.model)
        ids = torch.arange(3, 40)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in grads)


def test_full_training_writes_the_precision_of_the_base_and_its_new_context(tmp_path, corpus, tokenizer):
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    card = train_tiny(base, corpus, tmp_path / "model", method="full", steps=2, learning_rate=1e-2, rope_scaling="yarn")
    assert (card["precision"]["base"], card["rope_scaling"]) == ("float32", "yarn")
    assert {weight.dtype for weight in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.dtype, config.rope_parameters["rope_type"], config.max_position_embeddings) == (torch.bfloat16, "yarn", 128)


@pytest.mark.parametrize(
    ("zero_stage", "dtypes", "trained"), [(0, BFLOAT16, torch.float32), (2, FLOAT32, None)], ids=["alone", "DeepSpeed"]
)
def test_deepspeed_gets_a_4_bit_base_in_float32_and_casts_it_itself(model_folder, monkeypatch, zero_stage, dtypes, trained):
    asked = []
    monkeypatch.setattr(training, "base_dtypes", lambda device: BFLOAT16)
    monkeypatch.setattr(training, "add_adapter", lambda model, settings, **given: asked.append(given))
    settings = SETTINGS.model_copy(update={"zero_stage": zero_stage})
    training.make_trainable(model_folder, RopeExtension(target_context=128), settings, CPU)
    assert asked == [{"base": dtypes, "trained": trained, "revision": None}]


def test_the_card_says_what_was_trained_on_what_and_where(systems):
    for system in systems.values():
        card = system.card
        data = {"path": str(system.data), "sha256": sha256(system.data.read_bytes()).hexdigest()}
        assert card["data"] == data | {"windows": card["data"]["windows"]}
        assert card["data"]["windows"] > 10
        assert card["paged_optimizer_bytes"] == 0
        assert {"python", "torch", "transformers", "peft"} <= set(card["versions"])
        assert card["versions"]["torch"] == torch.__version__
        assert card["machine"]["cores"] >= 1
        assert card["machine"]["system"]
        assert 2**20 < card["peak_memory_bytes"] < 2**40
        assert card["base_model"] == system.base
        assert card["tokens_per_second"] > 0
        assert json.loads(json.dumps(card)) == card


def test_events_and_the_trainers_state_hold_the_losses_of_the_trace(systems):
    for system in systems.values():
        events = EventAccumulator(f"{system.folder}-events")
        events.Reload()
        expected = [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in system.card["trace"]]
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected
        state = json.loads((system.folder / "trainer_state.json").read_text())
        assert [row["loss"] for row in state["log_history"] if "loss" in row] == [row["loss"] for row in system.card["trace"]]
        assert state["global_step"] == 12


def test_the_log_has_a_line_a_logged_step(model_folder, corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="longqlora")
    train_tiny(model_folder, corpus, tmp_path / "a", steps=4, logging_steps=2)
    lines = [line.split(":")[0] for line in caplog.messages if line.startswith("step")]
    assert [line.split(",")[0] for line in lines] == ["step 2 of 4", "step 4 of 4"]
    assert lines[0].endswith(" s left")


def test_slow_steps_are_logged_more_often(model_folder, corpus, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="longqlora")
    monkeypatch.setattr("longqlora.training.progress.LONGEST_SILENCE", 0)
    train_tiny(model_folder, corpus, tmp_path / "a", steps=4, logging_steps=100)
    assert sum(line.startswith("step") for line in caplog.messages) == 4


@pytest.mark.parametrize("name", ["full", "full, tied"])
def test_a_model_trained_whole_has_its_cache_at_inference(systems, name):
    assert AutoConfig.from_pretrained(systems[name].folder).use_cache
