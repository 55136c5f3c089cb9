import json
import re
from pathlib import Path

import numpy
import pandas
import pytest

from longqlora.config.settings import Protocol
from longqlora.evaluation.statistics import paired_difference
from longqlora.reporting.answer_report import SHOWN_CHARACTERS, read_answers, render_answers, shorten_middle, write_samples

LABELS = {"chat": "chat & model", "other": "other"}
SAMPLE = {"source": "s", "messages": [{"role": "user", "content": "# no heading\n```"}], "reference": "r", "answer": ""}


def write_record(path: Path, system: str, gain: float, count: int = 40) -> str:
    """A record whose answers have a loss of 3 nats per token before the fine-tuning, about ``gain`` less after it."""
    rng = numpy.random.default_rng(len(system))
    tokens = rng.integers(5, 100, count)
    after = tokens * (3 - gain + rng.normal(0, 0.05, count))
    conversations = [
        {"source": "s", "id": str(number), "num_tokens": int(n), "nll_before": 3.0 * n, "nll_after": float(nll)}
        for number, (n, nll) in enumerate(zip(tokens, after, strict=True))
    ]
    described = {"precision": "nf4", "rope_scaling": "linear", "rope_factor": 2.0, "target_context": 256}
    record = {"system": system, **described, "conversations": conversations, "samples": [SAMPLE, SAMPLE]}
    path.write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def records(tmp_path) -> list[str]:
    return [write_record(tmp_path / "a.json", "chat", gain=0.5), write_record(tmp_path / "b.json", "other", gain=0)]


def render(table: pandas.DataFrame, folder: Path) -> dict[str, str]:
    paths = {name: folder / f"t.{name}" for name in ("csv", "markdown", "latex")}
    render_answers(table, **{name: str(path) for name, path in paths.items()})
    return {name: path.read_text() for name, path in paths.items()}


def test_losses_are_means_over_tokens_and_the_difference_is_paired(records):
    """As for perplexity, where a document is what a conversation is here."""
    table = read_answers(records, LABELS)
    for row, path in zip(table.to_dict("records"), records, strict=True):
        rows = pandas.DataFrame(json.loads(Path(path).read_text())["conversations"]).rename(
            columns={"num_tokens": "num_scored"}
        )
        assert row["mean_nll_before"] == pytest.approx(3)
        assert row["standard_error_before"] == pytest.approx(0, abs=1e-9)
        assert row["mean_nll_after"] == pytest.approx(rows["nll_after"].sum() / rows["num_scored"].sum())
        windows = [rows.assign(document=rows.index, begin=0, nll=rows[name]) for name in ("nll_after", "nll_before")]
        expected = paired_difference(*windows, Protocol(name="exact", window=64, stride=64))
        assert (row["difference"], row["standard_error"]) == pytest.approx((expected.mean, expected.standard_error))
        assert (row["low"], row["high"]) == pytest.approx(expected.interval())
        assert (row["num_conversations"], row["num_tokens"]) == (40, rows["num_scored"].sum())
    assert table["significant"].tolist() == [True, False]
    assert table["label"].tolist() == ["chat & model", "other"]


def test_the_table_has_a_row_for_each_system_in_all_formats(records, tmp_path):
    written = render(read_answers(records, LABELS), tmp_path)
    pattern = (
        r"\| chat & model +\| 3\.000 ± 0\.000 \| 2\.\d{3} ± 0\.\d{3} \| +−0\.\d{3} \| \[−0\.\d{3}, −0\.\d{3}\] \| +20\.09 \|"
    )
    assert re.search(pattern, written["markdown"])
    assert "Weights: nf4." in written["markdown"]
    assert "| 95 % interval |" in re.sub(" +", " ", written["markdown"])
    assert re.search(r"chat \\& model & 3\.000 \$\\pm\$ 0\.000 & .* & \$-\$0\.\d{3} & \[\$-\$0\.\d{3}, ", written["latex"])
    assert r"95\,\% interval" in written["latex"]
    lines = pandas.read_csv(tmp_path / "t.csv")
    assert lines["system"].tolist() == ["chat", "other"]
    assert lines["perplexity_before"].tolist() == pytest.approx([numpy.exp(3)] * 2)


def test_a_single_conversation_has_no_interval(tmp_path):
    table = read_answers([write_record(tmp_path / "a.json", "chat", gain=0.5, count=1)], LABELS)
    written = render(table, tmp_path)
    assert table["significant"].tolist() == [False]
    assert re.search(r"\| chat & model +\| +3\.000 \| +2\.\d{3} \| +−0\.\d{3} \| +– \|", written["markdown"])
    assert "nan" not in written["markdown"] + written["latex"]


def test_sample_answers_have_the_losses_above_them_and_markup_stays_text(records, tmp_path):
    outputs = [str(tmp_path / "chat.md"), str(tmp_path / "other.md")]
    write_samples(read_answers(records, LABELS), records, outputs)
    text = (tmp_path / "chat.md").read_text()
    assert text.startswith("# Answers of chat & model\n\nThe loss on the answers of 40 conversations")
    assert re.search(
        r"is 3\.000 ± 0\.000 nats per token before it and 2\.\d{3} ± 0\.\d{3} after it: a difference of −0\.", text
    )
    assert text.count("**Answer**") == 2
    assert "\n    # no heading\n    ```" in text
    assert "\n    (nothing)" in text
    assert (tmp_path / "other.md").read_text().startswith("# Answers of other\n")


def test_long_questions_are_shortened_in_their_middle_for_reading():
    text = "a" * SHOWN_CHARACTERS
    assert shorten_middle(text) == text
    shown = shorten_middle("begin" + text + "end")
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert "\n[… 8 characters …]\n" in shown
