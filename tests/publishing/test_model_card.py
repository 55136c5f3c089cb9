import re

import pytest
import yaml
from conftest import SETTINGS

from longqlora.publishing.model_card import Stage, model_card

CARD = {
    "base_model": "owner/name", "target_context": 8192, "rope_scaling": "yarn", "settings": SETTINGS.model_dump(),
    "data": {"sha256": "ab" * 32},
    "steps": 30, "tokens": 1234567, "trainable_parameters": 7654321, "seconds": 12.5, "tokens_per_second": 98765.4,
    "peak_memory_bytes": 3 * 2**30, "paged_optimizer_bytes": 0,
    "machine": {"processor": "Abacus", "cores": 2}, "versions": {"torch": "2.13.0"},
    "trace": [{"loss": 5.25}, {"loss": 4.0}, {"loss": 3.125}],
}  # fmt: skip
ROW = {"perplexity": 8.5, "kl_divergence": 0.01, "top_1_agreement": 0.975}
REPORT = {
    "published": "merge: 16-bit",
    "sample": {"tokens": 16384, "window": 8192, "path": "results/x/tokens/corpus.bin", "held_out": True},
    "models": {"merge: 16-bit": ROW, "base": ROW | {"perplexity": 99.125}},
}


def card_of(label: str, card: dict, report: dict | None = None) -> str:
    return model_card([Stage(label, card, report)])


def header(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_hub_is_told_the_base_only_if_it_is_there(tmp_path):
    assert header(card_of("x", CARD))["base_model"] == "owner/name"
    assert "base_model" not in header(card_of("x", CARD | {"base_model": str(tmp_path)}))
    pinned = card_of("x", CARD | {"base_model": "owner/name@0123abc"})
    assert header(pinned)["base_model"] == "owner/name"
    assert "`owner/name@0123abc` with its context extended" in pinned
    assert header(card_of("x", CARD))["library_name"] == "transformers"


def test_the_card_tells_what_was_done_on_what_and_at_what_cost():
    text = card_of("My model", CARD, REPORT)
    assert "# My model\n" in text
    for part in (
        "extended to 8192 tokens", "`yarn`", "rank 4", "4-bit", "abababababababab", "1,234,567", "5.250 → 3.125", "3.00 GiB",
        "Abacus, 2 cores", "torch 2.13.0", "Published: **merge: 16-bit**",
        "16,384 tokens in windows of 8192: the held-out end of the training data", "| base | 99.125 |",
    ):  # fmt: skip
        assert part in text
    assert "chosen" not in text
    choice = {"chosen": "yarn", "scalings": dict.fromkeys(["linear", "ntk", "yarn", "llama3"])}
    assert "`yarn` (chosen as the best of 4 before training), a LoRA" in card_of("x", CARD | {"scaling_choice": choice})
    gpu = CARD | {"machine": {"gpu": "H100", "processor": "Abacus", "cores": 2}}
    assert "H100, 2 cores" in card_of("x", gpu)


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"method": "full"}, "all its weights trained", "rank"),
        ({"method": "lora"}, "trained on its 16-bit weights", "4-bit"),
        ({"attention": "full"}, "full attention in training", "shifted sparse"),
        ({"rslora": True, "loraplus_ratio": 16.0}, "a rsLoRA and LoRA+ adapter (rank 4)", "DoRA"),
        ({"attention": "full", "pose_window": 4096}, "full attention in training, in windows of 4096 tokens", "shifted sparse"),
        ({"data": "sft"}, "Its prompt is the tokenizer's chat template", "## Merge"),
        ({"data": "corpus"}, "AutoModelForCausalLM", "chat template"),
    ],
)
def test_the_card_follows_the_settings(settings, present, absent):
    text = card_of("x", CARD | {"settings": SETTINGS.model_dump() | settings})
    assert present in text
    assert absent not in text


def test_the_card_has_what_a_gpus_allocator_reserved_and_the_paged_state():
    text = card_of("x", CARD | {"peak_reserved_bytes": 4 * 2**30, "paged_optimizer_bytes": 2**30})
    assert "| peak memory | 3.00 GiB, 4.00 GiB reserved, 1.00 GiB of paged optimizer state in addition |" in text
    assert "reserved" not in card_of("x", CARD)


def test_the_windows_of_a_step_are_those_of_all_processes():
    settings = SETTINGS.model_dump() | {"num_nodes": 2, "num_processes": 4, "sequence_parallel": 2}
    batch = f"{SETTINGS.batch_size} × {SETTINGS.gradient_accumulation}"
    assert f"| 30 of {batch} windows |" in card_of("x", CARD)
    assert f"| 30 of {batch} × 4 windows |" in card_of("x", CARD | {"settings": settings})
    earlier = {name: value for name, value in settings.items() if name not in ("num_nodes", "sequence_parallel")}
    assert f"| 30 of {batch} × " in card_of("x", CARD | {"settings": earlier})  # of a version without these keys


def test_a_training_without_a_logged_step_has_a_card():
    assert "| loss, first and last | – |" in card_of("x", CARD | {"trace": []})


def test_the_card_of_a_model_that_was_trained_in_stages_has_each_with_its_data_steps_and_merge():
    weights = {"base_model": "results/x/weights/longer", "target_context": 16384, "data": {"sha256": "cd" * 32}, "steps": 7}
    settings = SETTINGS.model_dump() | {"data": "sft", "method": "lora"}
    full = CARD | {"settings": SETTINGS.model_dump() | {"method": "full"}}
    report = REPORT | {"models": {"adapter, as trained": ROW | {"perplexity": 8.25}} | REPORT["models"]}
    last = Stage("Chat", CARD | weights | {"settings": settings}, report)
    text = model_card([Stage("Longer", CARD, report), Stage("Again", full), last])
    assert header(text)["base_model"] == "owner/name"
    assert "# Chat\n\nAgain (see below) with its context extended to 16384 tokens" in text
    assert "`owner/name` was trained in 3 stages" in text
    batch = f"{SETTINGS.batch_size} × {SETTINGS.gradient_accumulation} windows"
    merge = "8.500 (merge: 16-bit), as trained 8.250"
    assert [line for line in text.splitlines() if re.match(r"\| \d\. ", line)] == [
        f"| 1. Longer | corpus, SHA-256 abababababababab… | qlora | 8192 | 30 of {batch} | {merge} |",
        f"| 2. Again | corpus, SHA-256 abababababababab… | full | 8192 | 30 of {batch} | – (all weights trained) |",
        f"| 3. Chat | sft, SHA-256 cdcdcdcdcdcdcdcd… | lora | 16384 | 7 of {batch} | {merge} |",
    ]
    assert "## Stages" not in card_of("x", CARD, REPORT)


def test_the_card_of_a_chat_model_that_was_trained_further_on_texts_names_its_chat_template():
    chat = CARD | {"settings": SETTINGS.model_dump() | {"data": "sft"}}
    assert "Its prompt is the tokenizer's chat template" in model_card([Stage("chat", chat), Stage("further", CARD)])


@pytest.mark.parametrize(
    ("scaling", "present", "absent"),
    [
        ("yarn", "vllm serve <this folder> --max-model-len 8192\n", "multiplies"),
        ("linear", "Without `--max-model-len`, vLLM multiplies the context by the factor again", "which every server reads"),
        ("llama3", "llama-server --model model.gguf --ctx-size 8192\n", "multiplies"),
        ("theta", "larger `rope_theta`, which every server reads", "multiplies"),
        ("dynamic", "Beyond the original context, vLLM's results are not numbers", "vllm serve"),
    ],
)
def test_the_card_has_the_commands_of_the_servers_that_have_the_scaling(scaling, present, absent):
    text = card_of("x", CARD | {"rope_scaling": scaling})
    assert "transformers serve <this folder>\n" in text
    assert present in text
    assert absent not in text
