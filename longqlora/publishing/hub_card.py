"""The model card on the Hugging Face Hub: the card of the model folder, and the results of the evaluation.

The folder's card is written before the evaluation, which reads the folder. So the results are added when the model is
published: to the metadata (``model-index``), from which the hub shows them beside the model, and to the text.
"""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, constants

from longqlora.publishing.hub_files import read_json

TASK = "text-generation"
FOLDER = "<this folder>"  # what the folder's card calls the model in its examples
CONVERTER = "python convert_hf_to_gguf.py"


@dataclass(frozen=True)
class License:
    """The license of a model, as the metadata of the hub has it.

    Attributes:
        license: the hub's id of it, such as ``apache-2.0``, or ``other``.
        license_name, license_link: of a license that the hub has no id of.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None


def read_card(file: Path) -> ModelCard:
    """A model card.

    Raises:
        ValueError: if its metadata are no YAML.
    """
    try:
        return ModelCard(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: the metadata between the lines --- cannot be read: {error}") from None


def license_in(card: CardData | None, repository: str = "") -> License | None:
    """The license that a model card names; None if it names none.

    Args:
        card: the metadata of the card.
        repository: hub id of the model, where a license link that is a file name points to.
    """
    known = card.to_dict() if card else {}
    if not isinstance(known.get("license"), str):
        return None
    link = known.get("license_link")
    if link and "://" not in link and repository:
        link = f"{constants.ENDPOINT}/{repository}/blob/main/{link}"
    return License(known["license"], known.get("license_name"), link)


def hub_card(results: Path, system: str, *, repository: str, license: License | None, base: str | None) -> ModelCard:
    """The model card of a system, with the results of its evaluation.

    Args:
        results: folder of the experiment.
        system: name of the system.
        repository: hub id that the model will have.
        license: of the base model, which is that of the model too.
        base: hub id of the base model; None if it has none.

    Raises:
        ValueError: if the metadata of the folder's card, or a record of the evaluation, is damaged.
    """
    card = read_card(results / "models" / system / "README.md")
    data: Any = card.data
    data.base_model = base
    if license:
        data.license, data.license_name, data.license_link = license.license, license.license_name, license.license_link
    found = {name: list(read(results, system)) for name, read in RESULTS.items()}
    if any(found.values()):
        data.eval_results, data.model_name = [each for several in found.values() for each in several], repository.split("/")[1]
    section = evaluation_section(results, [name for name in found if found[name]])
    before, heading, after = for_repository(card.text, repository).partition("\n## ")  # the results come first
    return ModelCard(f"---\n{data}\n---\n{before}{section}{heading}{after}")


def for_repository(text: str, repository: str) -> str:
    """A card whose examples load the model from the hub; llama.cpp's converter needs a folder, so the model is downloaded."""
    name = repository.split("/")[1]
    downloaded = f"hf download {repository} --local-dir {name}\n{CONVERTER} {name}"
    return text.replace(f"{CONVERTER} {FOLDER}", downloaded).replace(FOLDER, repository)


def evaluation_section(results: Path, tables: list[str]) -> str:
    """Tables of the experiment, by their names, and a link to its report, in Markdown; empty if there are none."""
    files = [results / "tables" / f"{name}.md" for name in tables]
    parts = [re.sub(r"^# .*\n", "", file.read_text(encoding="utf-8")).strip() for file in files if file.is_file()]
    if (results / "report.html").is_file():
        parts.append("The whole report is in [report.html](report.html): download it, and open it in a browser.")
    return "\n" + "\n\n".join(["## Evaluation", *parts]) + "\n" if parts else ""


def perplexity_results(results: Path, system: str) -> Iterator[EvalResult]:
    """Yield perplexity and retrieval accuracy of a system, at the lengths in the tables of the experiment.

    The values are read from the system's own records, because the tables have the means over several seeds.

    Args:
        results: folder of the experiment.
        system: name of the system.
    """
    cells = {
        (row["dataset"], row["eval_length"]): row["dataset_label"] for row in table(results, "perplexity") if row["dataset"]
    }
    for (dataset, length), label in cells.items():
        if record := read_record(results / "perplexity" / system / dataset / f"{length}.json"):
            yield result(dataset, label, "perplexity", record["perplexity"], record["eval_length"])
    for length in unique(row["eval_length"] for row in table(results, "retrieval")):
        if record := read_record(results / "retrieval" / system / f"{length}.json"):
            tasks = ", ".join(unique(cell["task"] for cell in record["cells"]))
            yield result("retrieval", f"synthetic retrieval ({tasks})", "accuracy", record["accuracy"], record["eval_length"])


def harness_results(results: Path, system: str) -> Iterator[EvalResult]:
    """Yield the scores of a system on tasks of lm-evaluation-harness: for a group without one, on its tasks."""
    for task in unique(row["requested"] for row in table(results, "harness")):
        record = read_record(results / "harness" / system / f"{task}.json") or {"results": []}
        own = [found for found in record["results"] if found["task"] == task]
        for found in own or record["results"]:
            metric = found["metric"] if found["filter"] == "none" else f"{found['metric']} ({found['filter']})"
            yield result(
                found["task"], f"{found['task']} (lm-evaluation-harness)", metric, found["value"], found["eval_length"]
            )


def answer_results(results: Path, system: str) -> Iterator[EvalResult]:
    """Yield the perplexity of held-out answers under a system that was trained on instructions."""
    for row in table(results, "answers"):
        if row["system"] == system:
            yield result("answers", "answers of held-out conversations", "perplexity", float(row["perplexity_after"]), None)


def result(dataset: str, label: str, metric: str, value: float, length: int | None) -> EvalResult:
    """A value of the evaluation in the form of the hub's metadata; the hub shows its metric's name."""
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset,
        dataset_name=label,
        metric_type=metric.partition(" ")[0],
        metric_name=f"{metric} at {length} tokens" if length else metric,
        metric_value=round(value, 4) if math.isfinite(value) else str(value),  # the hub's metadata are JSON: no infinity
        metric_args={"context_length": length} if length else None,
    )


def table(results: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table of the experiment, as the text that they are in CSV; none if there is no such table."""
    file = results / "tables" / f"{name}.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def read_record(file: Path) -> dict | None:
    """A record of the evaluation; None if the system was not measured."""
    return read_json(file) if file.is_file() else None


def unique(values: Iterator[str]) -> list[str]:
    """Values without repetitions, in their order."""
    return list(dict.fromkeys(values))


RESULTS = {"perplexity": perplexity_results, "harness": harness_results, "answers": answer_results}
"""How the results of a system are read that are in a table of the experiment, by the table's name."""
