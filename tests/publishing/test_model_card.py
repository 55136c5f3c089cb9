import re

import pytest
import yaml
from conftest import SETTINGS

from longqlora.publishing.model_card import model_card

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


def header(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_hub_is_told_the_base_only_if_it_is_there(tmp_path):
    assert header(model_card("x", CARD))["base_model"] == "owner/name"
    assert "base_model" not in header(model_card("x", CARD | {"base_model": str(tmp_path)}))
    pinned = model_card("x", CARD | {"base_model": "owner/name@0123abc"})
    assert header(pinned)["base_model"] == "owner/name"
    assert "`owner/name@0123abc` with its context extended" in pinned
    assert header(model_card("x", CARD))["library_name"] == "transformers"


def test_the_card_tells_what_was_done_on_what_and_at_what_cost():
    text = model_card("My model", CARD, REPORT)
    assert "# My model\n" in text
    for part in (
        "extended to 8192 tokens", "`yarn`", "rank 4", "4-bit", "abababababababab", "1,234,567", "5.250 → 3.125", "3.00 GiB",
        "Abacus, 2 cores", "torch 2.13.0", "Published: **merge: 16-bit**",
        "16,384 tokens in windows of 8192: the held-out end of the training data", "| base | 99.125 |",
    ):  # fmt: skip
        assert part in text
    assert "chosen" not in text
    choice = {"chosen": "yarn", "scalings": dict.fromkeys(["linear", "ntk", "yarn", "llama3"])}
    assert "`yarn` (chosen as the best of 4 before training), a LoRA" in model_card("x", CARD | {"scaling_choice": choice})
    gpu = CARD | {"machine": {"gpu": "H100", "processor": "Abacus", "cores": 2}}
    assert "H100, 2 cores" in model_card("x", gpu)


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"method": "full"}, "all its weights trained", "rank"),
        ({"method": "lora"}, "trained on its 16-bit weights", "4-bit"),
        ({"attention": "full"}, "full attention in training", "shifted sparse"),
        ({"data": "sft"}, "Its prompt is the tokenizer's chat template", "## Merge"),
        ({"data": "corpus"}, "AutoModelForCausalLM", "chat template"),
    ],
)
def test_the_card_follows_the_settings(settings, present, absent):
    text = model_card("x", CARD | {"settings": SETTINGS.model_dump() | settings})
    assert present in text
    assert absent not in text


def test_the_card_has_what_a_gpus_allocator_reserved_and_the_paged_state():
    text = model_card("x", CARD | {"peak_reserved_bytes": 4 * 2**30, "paged_optimizer_bytes": 2**30})
    assert "| peak memory | 3.00 GiB, 4.00 GiB reserved, 1.00 GiB of paged optimizer state in addition |" in text
    assert "reserved" not in model_card("x", CARD)


def test_a_training_without_a_logged_step_has_a_card():
    assert "| loss, first and last | – |" in model_card("x", CARD | {"trace": []})
