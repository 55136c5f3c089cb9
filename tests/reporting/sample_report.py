"""A folder of results as the workflow leaves it, for the tests of the report; its names and texts are hostile."""

import json
from pathlib import Path

from sample_results import DATASETS, windows_of, write_cells, write_retrieval_cells

from longqlora.reporting.answer_report import read_answers, render_answers
from longqlora.reporting.loss_curves import plot_loss
from longqlora.reporting.plots import loss_by_position, plot_loss_by_position, plot_perplexity
from longqlora.reporting.records import read_records
from longqlora.reporting.report_sources import Sources
from longqlora.reporting.retrieval_report import plot_retrieval, read_retrieval, render_retrieval
from longqlora.reporting.tables import read_results, render_table

SCRIPT = "<script>document.title = 'run'</script><img src=https://example.com/a.png onerror=\"document.title='run'\"> & <b>"
LONG_WORD = "x" * 300
MARKUP = "![image](https://example.com/b.png) [link](javascript:document.title='run')"
LABELS = {
    "system": {"base": "base", "long": SCRIPT, "chat_model": MARKUP},
    "dataset": dict(zip(DATASETS, ["PG19 & <i>", "Proof-pile"], strict=True)),
}


def write_json(path: Path, content: object) -> str:
    """Write a record; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def training_card() -> dict:
    """A training card."""
    return {
        "base_model": "base", "base_model_contents": "base/model.safetensors 0123", "target_context": 256,
        "data": {"path": "corpus.bin", "sha256": "ab" * 32}, "rope_scaling": "linear",
        "settings": {"method": "qlora", "data": "corpus", "rank": 8, "attention": "shifted_sparse"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "machine": {"system": "Linux", "processor": "Xeon", "cores": 2},
        "steps": 2, "tokens": 2048, "seconds": 5400.0, "tokens_per_second": 0.4, "peak_memory_bytes": 3 * 2**29,
        "trace": [{"step": step, "loss": 3.5 - step, "learning_rate": 0.1, "grad_norm": 1.0} for step in (1, 2)],
    }  # fmt: skip


def merge_report() -> dict:
    """A merge report."""
    names = ["adapter on the NF4 base, as trained", "merge: 16-bit"]
    model = {"perplexity": 7.125, "kl_divergence": 0.0125, "top_1_agreement": 0.875}
    return {
        "published": names[1], "sample": {"held_out": True, "tokens": 16384}, "models": dict.fromkeys(names, model)
    }  # fmt: skip


def answers_record() -> dict:
    """A record of answers, whose texts are hostile."""
    return {
        "system": "chat_model", "precision": "nf4", "rope_scaling": "linear", "rope_factor": 2.0, "target_context": 256,
        "conversations": [{"num_tokens": 10, "nll_before": 30.0 + n, "nll_after": 20.0} for n in range(4)],
        "samples": [
            {"source": SCRIPT, "messages": [{"content": LONG_WORD}], "reference": SCRIPT, "answer": "</pre>&amp;"},
        ],
    }  # fmt: skip


def corpus_card() -> dict:
    """A data card of the corpus."""
    counts = {"read": 1200, "malformed": 0, "sampled": 1000}
    return {
        "total": counts, "sources": {SCRIPT: counts}, "sampled_tokens": 512_000,
        "files": [{"path": f"{LONG_WORD}.jsonl", "sha256": "cd" * 32}],
    }  # fmt: skip


def experiment() -> dict:
    """A completed configuration, as far as the report uses it."""
    system = {"target_context": 256, "training": {"rank": 8}, "weights_of": None}
    base = {"label": "base", "target_context": None, "training": None, "weights_of": None}
    systems = {name: {**system, "label": LABELS["system"][name]} for name in ("long", "chat_model")}
    return {
        "name": f"trial of {SCRIPT}", "base_model": "base", "listed": ["base", *systems], "rows": ["base", *systems],
        "systems": {"base": base, **systems}, "ablations": {}, "seed": 1,
    }  # fmt: skip


def write_evaluation(results: Path) -> None:
    """Tables and plots of perplexity and retrieval."""
    (results / "tables").mkdir(parents=True)
    (results / "plots").mkdir()
    records, retrieval = write_cells(results / "perplexity"), write_retrieval_cells(results / "retrieval")
    tables, plots = results / "tables", results / "plots"
    shown = read_results(
        records=records, windows=windows_of(records), retrieval=retrieval, choices={}, labels=LABELS, published=[], base="base",
        extended={},
    )  # fmt: skip
    paths = {
        "csv": "perplexity.csv",
        "markdown": "perplexity.md",
        "latex": "perplexity.tex",
        "differences_csv": "differences.csv",
    }
    render_table(shown, **{name: str(tables / path) for name, path in paths.items()})
    plot_perplexity(records, LABELS, [], [str(plots / "perplexity.svg")])
    plot_loss_by_position(loss_by_position(read_records(records, LABELS)), [str(plots / "loss_by_position.svg")])
    accuracies = read_retrieval(retrieval, LABELS)
    render_retrieval(accuracies, csv=str(tables / "retrieval.csv"), markdown=str(tables / "retrieval.md"))
    plot_retrieval(accuracies, [str(plots / "retrieval.svg")])


def write_training(results: Path) -> None:
    """Records, table and plot of a training and of its data."""
    card = write_json(results / "training/long.json", training_card())
    plot_loss({"long": card}, str(results / "tables/loss.csv"), [str(results / "plots/loss.svg")])
    write_json(results / "merges/long.json", merge_report())
    write_json(results / "corpus/sample.json", corpus_card())
    (results / "plots/text_lengths.svg").write_text((results / "plots/loss.svg").read_text())
    table = read_answers([write_json(results / "answers/chat_model.json", answers_record())], LABELS["system"])
    render_answers(table, **{name: str(results / f"tables/answers.{name}") for name in ("csv", "markdown", "latex")})
    (results / "tables/answers.markdown").rename(results / "tables/answers.md")


def write_benchmark(results: Path, name: str, seconds: float, memory: str = "1024.0") -> None:
    """Time and memory of a job, as Snakemake writes them."""
    path = results / f"benchmarks/{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:00\t{memory}\n")


def sources_of(results: Path, **changes) -> Sources:
    """What the report of a folder is made from: all of its tables, plots and records."""
    shown = [str(path) for path in results.rglob("*") if path.suffix in (".md", ".csv", ".json", ".svg")]
    fields = {
        "experiment": experiment(),
        "base": "base",
        "jobs": frozenset({"base", "long", "256"}),
        "versions": {"python": "3"},
    }
    return Sources(results=results, **{"files": shown, **fields, **changes})
