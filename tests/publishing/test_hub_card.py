import json
from pathlib import Path

import pytest
from huggingface_hub import CardData, ModelCard

from longqlora.publishing.hub_card import License, hub_card, license_in

CARD = "---\nlibrary_name: transformers\n---\n\n# My model\n\nOf the base. Load `<this folder>`.\n\n## Training\n\nDone.\n"


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def results(tmp_path) -> Path:
    """An experiment with the model folder of one system, ``mine``, and nothing measured."""
    write(tmp_path / "models/mine/README.md", CARD)
    return tmp_path


def card_of(results: Path, **more) -> ModelCard:
    """The card of the system, written and read again, as the hub does."""
    given = {"repository": "me/mine", "license": License("mit"), "base": None} | more
    return ModelCard(str(hub_card(results, "mine", **given)))


def values(card: ModelCard) -> dict[tuple[str, str], float]:
    """The results by data set and metric."""
    return {(found.dataset_name, found.metric_name): found.metric_value for found in card.data.eval_results}


def measure(results: Path) -> None:
    """Write a table of perplexities at two lengths of two systems, and records of one that has a third length."""
    rows = [f"{system},prose,Prose,{length}" for system in ("base", "mine") for length in (128, 256)]
    write(results / "tables/perplexity.csv", "\n".join(["system,dataset,dataset_label,eval_length", *rows, "published,,,128"]))
    write(results / "tables/perplexity.md", "| the table |")
    for length, perplexity in ((128, 17.77674), (256, 16.87539), (512, 99.0)):
        record = {"eval_length": length, "perplexity": perplexity}
        write(results / f"perplexity/mine/prose/{length}.json", record)


def test_without_an_evaluation_the_card_stays_as_it_is(results):
    card = card_of(results, base="them/base")
    assert card.data.to_dict() == {"library_name": "transformers", "base_model": "them/base", "license": "mit"}
    assert card.text == CARD.split("---\n")[2].replace("<this folder>", "me/mine")


def test_the_model_is_downloaded_before_it_is_converted(results):
    commands = "vllm serve <this folder>\npython convert_hf_to_gguf.py <this folder> --outtype f16\n"
    write(results / "models/mine/README.md", CARD + commands)
    downloaded = "hf download me/mine --local-dir mine\npython convert_hf_to_gguf.py mine --outtype f16"
    assert card_of(results).text.endswith(f"vllm serve me/mine\n{downloaded}\n")


def test_perplexities_of_the_table_are_in_the_metadata_and_the_table_is_before_the_training(results):
    measure(results)
    card = card_of(results)
    assert values(card) == {("Prose", "perplexity at 128 tokens"): 17.7767, ("Prose", "perplexity at 256 tokens"): 16.8754}
    assert card.data.model_name == "mine"
    assert "Of the base. Load `me/mine`.\n\n## Evaluation\n\n| the table |\n\n## Training\n\nDone." in card.text


def test_a_system_that_was_trained_by_several_seeds_has_its_own_values(results):
    measure(results)  # the table has one row for all seeds, under the name of the first one
    write(results / "tables/perplexity.csv", "system,dataset,dataset_label,eval_length\nother-seed,prose,Prose,128\n")
    assert values(card_of(results)) == {("Prose", "perplexity at 128 tokens"): 17.7767}


def test_a_table_that_does_not_have_the_system_is_left_out(results):
    measure(results)
    (results / "perplexity/mine").rename(results / "perplexity/other")
    card = card_of(results)
    assert card.data.eval_results is None
    assert "Evaluation" not in card.text


def test_retrieval_harness_and_answers(results):
    write(results / "tables/retrieval.csv", "label,eval_length,task\nMine,256,induction\nMine,256,passkey\n")
    cells = [{"task": task} for task in ("induction", "passkey", "induction")]
    write(results / "retrieval/mine/256.json", {"eval_length": 256, "accuracy": 14 / 15, "cells": cells})
    write(results / "tables/harness.csv", "label,requested\nMine,mmlu\nMine,ruler\n")
    scores = [("mmlu", "acc", "none", 0.25, None), ("mmlu_law", "acc", "none", 0.5, None)]
    ruler = [("niah", "score", "none", 0.75, 256), ("niah", "score", "strict", 0.5, 256)]
    keys = ("task", "metric", "filter", "value", "eval_length")
    write(results / "harness/mine/mmlu.json", {"results": [dict(zip(keys, row, strict=True)) for row in scores]})
    write(results / "harness/mine/ruler.json", {"results": [dict(zip(keys, row, strict=True)) for row in ruler]})
    write(results / "tables/harness.md", "# Scores\n\n| scores |\n")
    write(results / "tables/answers.csv", "system,perplexity_after\nother,9.9\nmine,6.01238\n")
    card = card_of(results)
    assert values(card) == {
        ("synthetic retrieval (induction, passkey)", "accuracy at 256 tokens"): 0.9333,
        ("mmlu (lm-evaluation-harness)", "acc"): 0.25,
        ("niah (lm-evaluation-harness)", "score at 256 tokens"): 0.75,
        ("niah (lm-evaluation-harness)", "score (strict) at 256 tokens"): 0.5,
        ("answers of held-out conversations", "perplexity"): 6.0124,
    }
    assert "## Evaluation\n\n| scores |\n" in card.text  # its title is a heading of the first level


def test_an_infinite_perplexity_is_text_because_metadata_are_json(results):
    measure(results)
    write(results / "perplexity/mine/prose/128.json", '{"eval_length": 128, "perplexity": Infinity}')
    assert values(card_of(results))[("Prose", "perplexity at 128 tokens")] == "inf"


def test_a_damaged_record_is_named(results):
    measure(results)
    write(results / "perplexity/mine/prose/128.json", "{")
    with pytest.raises(ValueError, match=r"prose/128\.json: is not JSON"):
        card_of(results)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"license": ["mit", "apache-2.0"]}, None),
        ({"license": "mit"}, License("mit")),
        (
            {"license": "other", "license_name": "own", "license_link": "https://a.org/b"},
            License("other", "own", "https://a.org/b"),
        ),
    ],
)
def test_the_license_of_a_card(metadata, expected):
    assert license_in(CardData(**metadata)) == expected
