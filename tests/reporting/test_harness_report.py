import json

import numpy
import pandas
import pytest

from longqlora.reporting.harness_report import read_harness, render_harness

LABELS = {
    "system": {"base": "base (128)", "long": "extended", "long.seed-2": "extended", "other": "other documents"},
}


def write_record(path, system: str, requested: str, *results: dict, **fields) -> str:
    """A record of a system on a task; each result with scores by document, or with another value."""
    usual = {
        "metric": "acc", "eval_length": None, "filter": "none", "standard_error": 0.05, "higher_is_better": True,
        "num_documents": 100, "num_truncated": 0, "task_version": 1.0, "num_fewshot": 0, "documents": "same", "scores": None,
    }  # fmt: skip
    record = {"system": system, "requested": requested, "precision": "nf4", "chat_template": False, "lm_eval_version": "0.4"}
    full = [usual | {"task": requested, "value": numpy.mean(result.get("scores") or [0.5])} | result for result in results]
    path.write_text(json.dumps(record | fields | {"results": full}))
    return str(path)


@pytest.fixture
def render(tmp_path):
    def run(*records: str, base: str | None = "base") -> tuple[str, pandas.DataFrame]:
        cells = read_harness(list(records), LABELS, base)
        render_harness(cells, csv=str(tmp_path / "x.csv"), markdown=str(tmp_path / "x.md"))
        return (tmp_path / "x.md").read_text(), pandas.read_csv(tmp_path / "x.csv")

    return run


def rows_of(text: str, system: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if line.startswith("|") and line.strip("|").split("|")[0].strip() == system
    ]


def test_systems_are_compared_by_document(render, tmp_path):
    base, better = [1.0] * 60 + [0.0] * 40, [1.0] * 80 + [0.0] * 20
    similar = [0.0] + [1.0] * 60 + [0.0] * 39  # as many right, others
    text, table = render(
        write_record(tmp_path / "0", "base", "arc", {"scores": base}, {"scores": base, "metric": "acc_norm"}),
        write_record(tmp_path / "1", "long", "arc", {"scores": better}, {"scores": similar, "metric": "acc_norm"}),
        write_record(
            tmp_path / "2", "other", "arc", {"scores": base, "documents": "x"}, {"scores": base, "metric": "acc_norm"}
        ),
    )
    assert rows_of(text, "base (128)") == [["0.600 ± 0.050", "**0.600 ± 0.050**"]]
    assert rows_of(text, "extended") == [["**0.800 ± 0.050**", "**0.600 ± 0.050**"], ["+0.200 ± 0.040", "+0.000 ± 0.014"]]
    assert rows_of(text, "other documents")[1] == ["–", "+0.000 ± 0.000"]
    assert "Difference from base (128)" in text
    assert table.loc[table["is_best"], ["label", "metric"]].to_numpy().tolist() == [
        ["base (128)", "acc_norm"], ["extended", "acc"], ["extended", "acc_norm"], ["other documents", "acc_norm"],
    ]  # fmt: skip


def test_a_lower_perplexity_is_better(render, tmp_path):
    lower = {"metric": "byte_perplexity", "higher_is_better": False}
    text, _ = render(
        write_record(tmp_path / "0", "base", "wiki", lower | {"scores": [3.0, 3.1, 3.0]}),
        write_record(tmp_path / "1", "long", "wiki", lower | {"scores": [5.0, 5.1, 5.0]}),
    )
    assert "**3.033" in text
    assert "**5" not in text


def test_a_group_shows_its_own_score_and_otherwise_its_tasks(render, tmp_path):
    parts = [{"task": f"ruler_{name}", "metric": "score", "eval_length": 8192, "scores": [1.0, 0.0]} for name in ("vt", "cwe")]
    text, table = render(
        write_record(tmp_path / "0", "base", "mmlu", {"value": 0.25}, {"task": "mmlu_law", "value": 0.1}),
        write_record(tmp_path / "1", "base", "ruler", *parts),
    )
    assert "| mmlu: acc |" in " ".join(text.split())
    assert "mmlu_law" not in text
    assert "ruler_vt at 8192: score" in text
    assert set(table["task"]) == {"mmlu", "mmlu_law", "ruler_vt", "ruler_cwe"}
    assert "Difference" not in text  # a single system


def test_a_task_that_is_listed_alone_and_in_a_tag_is_one_column(render, tmp_path):
    text, table = render(
        write_record(tmp_path / "0", "base", "ai2_arc", {"task": "arc_easy", "scores": [1.0, 0.0]}),
        write_record(tmp_path / "1", "base", "arc_easy", {"scores": [1.0, 0.0]}),
    )
    assert rows_of(text, "base (128)") == [["**0.500 ± 0.050**"]]
    assert len(table) == 2


def test_what_was_truncated_or_templated_is_marked(render, tmp_path):
    text, _ = render(
        write_record(tmp_path / "0", "base", "long", {"value": 0.25, "standard_error": None, "num_truncated": 3}),
        write_record(tmp_path / "1", "long", "long", {"value": 0.5}, chat_template=True),
        base=None,
    )
    assert rows_of(text, "base (128)") == [["0.250†"]]
    assert "† some prompts are longer than the model's context" in text
    assert "With a chat template: extended." in text
    assert "long (version 1.0, 0-shot, 100 documents)" in text


def test_seeds_of_a_system_are_one_row_with_their_mean(render, tmp_path):
    base, first, second = [1.0] * 50 + [0.0] * 50, [1.0] * 60 + [0.0] * 40, [1.0] * 80 + [0.0] * 20
    text, table = render(
        write_record(tmp_path / "0", "base", "arc", {"scores": base}),
        write_record(tmp_path / "1", "long", "arc", {"scores": first, "standard_error": 0.02}),
        write_record(tmp_path / "2", "long.seed-2", "arc", {"scores": second, "standard_error": 0.04}),
        write_record(tmp_path / "3", "base", "tag", {"task": "arc", "scores": base}),
        write_record(tmp_path / "4", "long", "tag", {"task": "arc", "scores": first}),
        write_record(tmp_path / "5", "long.seed-2", "tag", {"task": "arc", "scores": second}),
        write_record(tmp_path / "6", "long", "ppl", {"value": 3.0, "standard_error": None}),
        write_record(tmp_path / "7", "long.seed-2", "ppl", {"value": 4.0, "standard_error": None}),
    )
    assert rows_of(text, "base (128)") == [["0.500 ± 0.050", "–"]]
    assert rows_of(text, "extended")[0] == ["**0.700 ± 0.030**", "3.500"]
    assert rows_of(text, "extended")[1][0].startswith("+0.200 ± 0.0")
    assert "Trained by several seeds (extended: 2): the mean over the seeds." in text
    assert table["seeds"].to_list() == [1, 2, 1, 2, 2]
