"""What the report of an experiment says, section by section, collected from the small records that its jobs left.

A section is a function in :data:`SECTIONS` and a block of the same name in ``report.html.jinja``. The function returns what the
block shows, or None if the experiment has no data for it; then the section is left out. Nothing is measured or compared anew.
"""

from collections.abc import Callable, Iterable
from typing import Any

import yaml

from longqlora.reporting.answer_report import shorten_middle
from longqlora.reporting.comparisons import price_at_short_lengths
from longqlora.reporting.notation import MARKDOWN
from longqlora.reporting.plan_check import last_run, memory_of, plan_check
from longqlora.reporting.report_sources import Sources
from longqlora.reporting.report_summary import summarize, tokens
from longqlora.reporting.tables import format_price

STAGES = {
    "plan": ("plan_run",),
    "base model, trained from scratch": ("pretrain_model",),
    "evaluation sets": ("prepare_evaluation_set", "retokenize_evaluation_set", "index_evaluation_sets", "find_key_tokens"),
    "training data": ("sample_shard", "sample_corpus", "tokenize_corpus", "build_sft_set", "tokenize_sft"),
    "choice of RoPE scalings": ("choose_scaling",),
    "training": ("train",),
    "merging and publishing": ("merge_adapter", "publish_model"),
    "perplexity": ("evaluate_perplexity",),
    "retrieval": ("evaluate_retrieval",),
    "tasks of lm-evaluation-harness": ("evaluate_harness",),
    "answers": ("evaluate_answers",),
    "GGUF files and their check": ("convert_gguf", "check_gguf"),
}
"""Folders or files in ``benchmarks/`` by the stage of the workflow; all others are tables and plots."""
OTHER_STAGE = "tables and plots"


# --- results ---------------------------------------------------------------------------------------------------------------


def perplexity(sources: Sources) -> dict | None:
    """The table of the experiment, and perplexity as plots."""
    table = sources.text("tables/perplexity.md")
    plots = {"by_length": sources.find("plots/perplexity.svg"), "by_position": sources.find("plots/loss_by_position.svg")}
    return None if table is None else {"table": table, **plots}


def price(sources: Sources) -> dict | None:
    """The change from the base model at the longest length that it reads without an extension."""
    if sources.find("tables/perplexity.csv") is None or sources.base is None:
        return None
    cells = sources.frame("tables/perplexity.csv")
    pairs = sources.frame("tables/differences.csv").query("tokens == 'all'")
    prices = price_at_short_lengths(cells[cells["system"].notna()], pairs, sources.base)
    if prices.empty:
        return None
    sets = prices["dataset_label"].unique()
    widest = max(prices["change"].abs().max(), 0.001)
    rows = [
        {
            "label": label,
            "changes": [
                {"text": format_price(change, MARKDOWN), "share": abs(change["change"]) / widest, "worse": change["change"] > 0}
                for change in of_label.to_dict("records")
            ],
        }
        for label, of_label in prices.groupby("label", sort=False)
    ]
    return {"length": tokens(prices["eval_length"].iloc[0]), "base": sources.base, "sets": list(sets), "rows": rows}


def retrieval(sources: Sources) -> dict | None:
    """Retrieval accuracy as a heat map and as tables."""
    table = sources.text("tables/retrieval.md")
    return None if table is None else {"table": without_title(table), "plot": sources.find("plots/retrieval.svg")}


def harness(sources: Sources) -> dict | None:
    """Scores on tasks of lm-evaluation-harness."""
    table = sources.text("tables/harness.md")
    return None if table is None else {"table": without_title(table)}


def ablations(sources: Sources) -> list[dict] | None:
    """The table and the plot of each grid."""
    found = []
    for name, ablation in sources.experiment["ablations"].items():
        if table := sources.text(f"tables/ablations/{name}.md"):
            plot = sources.find(f"plots/ablations/{name}.svg")
            found.append({"title": ablation["label"], "table": without_title(table), "plot": plot})
    return found or None


def without_title(markdown: str) -> str:
    """Markdown without its first line, a title that the section has already."""
    return markdown.partition("\n")[2] if markdown.startswith("# ") else markdown


# --- training and data -----------------------------------------------------------------------------------------------------


def training(sources: Sources) -> dict | None:
    """Settings and cost of each training, and the loss curves."""
    cards = sources.records("training")
    return {"cards": cards, "plot": sources.find("plots/loss.svg")} if cards else None


def merges(sources: Sources) -> dict | None:
    """Each published merge compared with the adapter as it was trained."""
    reports = sources.records("merges")
    rows = [
        {
            "label": label,
            "name": report["published"].removeprefix("merge: "),
            "trained": next(iter(report["models"].values())),
            "merged": report["models"][report["published"]],
            "held_out": report["sample"]["held_out"],
            "tokens": report["sample"]["tokens"],
        }
        for label, report in reports.items()
    ]
    return {"rows": rows, "all_held_out": all(row["held_out"] for row in rows)} if rows else None


def serving(sources: Sources) -> dict | None:
    """GGUF files in llama.cpp compared with transformers."""
    table = sources.text("tables/serving.md")
    return None if table is None else {"table": table}


def data(sources: Sources) -> dict | None:
    """The data cards of the training texts and of the instruction set, with plots of lengths and shares."""
    corpus, sft = sources.record("corpus/sample.json"), sources.record("sft/records.json")
    if not corpus and not sft:
        return None
    return {
        "corpus": corpus and card_table({**corpus["sources"], "total": corpus["total"]}),
        "corpus_card": corpus,
        "lengths": sources.find("plots/text_lengths.svg"),
        "sft": sft and card_table(sft["sources"]),
        "sft_card": sft,
        "shares": sources.find("plots/sft_shares.svg"),
    }


def card_table(rows: dict[str, dict[str, int]]) -> dict:
    """What became of the texts of each source; columns of zeros are left out."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if row[key]))
    return {"columns": columns, "rows": {name: [row.get(column, 0) for column in columns] for name, row in rows.items()}}


def answers(sources: Sources) -> dict | None:
    """Loss on held-out answers, and sample answers with their questions and references."""
    table = sources.text("tables/answers.md")
    if table is None:
        return None
    samples = {
        label: [
            {**sample, "question": shorten_middle(sample["messages"][-1]["content"])}
            | {key: shorten_middle(sample[key]) for key in ("reference", "answer")}
            for sample in record["samples"]
        ]
        for label, record in sources.records("answers").items()
    }
    return {"table": without_title(table), "samples": samples}


# --- cost and provenance ---------------------------------------------------------------------------------------------------


def cost(sources: Sources) -> dict | None:
    """Time and peak memory of the jobs, as measured, by the stage of the workflow."""
    folder = sources.results / "benchmarks"
    measured: dict[str, list[dict[str, str]]] = {}
    stage_of = {rule: stage for stage, rules in STAGES.items() for rule in rules}
    for path in sorted(folder.rglob("*.tsv")):
        rule, *wildcards = path.relative_to(folder).with_suffix("").parts
        run = last_run(path)
        if run and sources.jobs.issuperset(wildcards):
            measured.setdefault(stage_of.get(rule, OTHER_STAGE), []).append(run)
    rows = [stage_row(stage, measured[stage]) for stage in (*STAGES, OTHER_STAGE) if stage in measured]
    total = sum(row["seconds"] for row in rows)
    return {"rows": rows, "seconds": total, "jobs": sum(row["jobs"] for row in rows)} if rows else None


def stage_row(stage: str, runs: list[dict[str, str]]) -> dict:
    """Number, time (seconds) and peak memory (bytes) of the jobs of a stage."""
    memory = [size for run in runs if (size := memory_of(run)) is not None]
    seconds = [float(run["s"]) for run in runs]
    times = {"seconds": sum(seconds), "longest": max(seconds)}
    return {"stage": stage, "jobs": len(runs), **times, "memory": max(memory, default=None)}


def provenance(sources: Sources) -> dict:
    """What the results were made from and with: configuration, digests, versions, machines."""
    cards = sources.records("training")
    corpus, sft = sources.record("corpus/sample.json"), sources.record("sft/records.json")
    facts = {
        "base model": [sources.experiment["base_model"], *distinct(card["base_model_contents"] for card in cards.values())],
        "training data": distinct(f"{card['data']['path']}, SHA-256 {card['data']['sha256']}" for card in cards.values()),
        "trained on": distinct(machine_row(card["machine"]) for card in cards.values()),
        "trained with": distinct(version_row(card["versions"]) for card in cards.values()),
        "report made with": [version_row(sources.versions)],
        "commit of the report's code": [sources.checkout] if sources.checkout else [],
    }
    if sources.find("tables/perplexity.csv"):
        digests = sources.frame("tables/perplexity.csv")["code_digest"].dropna()
        facts["digest of the evaluation's code"] = distinct(digests)
    return {
        "facts": {name: values for name, values in facts.items() if any(values)},
        "files": [file for card in (corpus, sft) if card for file in card["files"]],
        "configuration": yaml.safe_dump(sources.experiment, sort_keys=False, allow_unicode=True, width=100),
    }


def distinct(values: Iterable[str]) -> list[str]:
    """Values without repetitions and empty ones, in their first order."""
    return list(dict.fromkeys(value for value in values if value))


def machine_row(machine: dict) -> str:
    """The machine of a training card in a line."""
    return ", ".join(filter(None, [machine.get("gpu"), machine["processor"], f"{machine['cores']} cores", machine["system"]]))


def version_row(versions: dict[str, str]) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


SECTIONS: dict[str, tuple[str, Callable[[Sources], Any]]] = {
    "summary": ("In short", summarize),
    "perplexity": ("Perplexity", perplexity),
    "price": ("Price at short lengths", price),
    "retrieval": ("Retrieval", retrieval),
    "harness": ("Tasks of lm-evaluation-harness", harness),
    "ablations": ("Ablations", ablations),
    "training": ("Training", training),
    "merges": ("Merges", merges),
    "serving": ("Served by llama.cpp", serving),
    "answers": ("Answers", answers),
    "data": ("Training data", data),
    "cost": ("Time and memory", cost),
    "plan": ("Plan against what it took", plan_check),
    "provenance": ("Provenance", provenance),
}
"""The sections in their order: title, and the function that collects what the block of this name shows."""


def collect(sources: Sources) -> dict[str, Any]:
    """What each section shows; None for those that the experiment has no data for."""
    return {name: section(sources) for name, (_, section) in SECTIONS.items()}
