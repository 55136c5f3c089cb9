import json
from pathlib import Path

import pandas
import pytest

from longqlora.reporting.loss_curves import plot_loss

TRACES = {"A": ("corpus", [5.0, 4.0, 3.5]), "B & C": ("sft", [2.0, 1.5]), "nothing logged": ("corpus", [])}


@pytest.fixture
def cards(tmp_path) -> dict[str, str]:
    paths = {}
    for number, (label, (data, losses)) in enumerate(TRACES.items()):
        trace = [{"step": 10 * n, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0} for n, loss in enumerate(losses, 1)]
        paths[label] = str(tmp_path / f"{number}.json")
        (tmp_path / f"{number}.json").write_text(json.dumps({"settings": {"data": data}, "trace": trace}))
    return paths


def test_the_table_has_every_logged_step(cards, tmp_path):
    plot_loss(cards, str(tmp_path / "loss.csv"), [str(tmp_path / "loss.svg")])
    rows = pandas.read_csv(tmp_path / "loss.csv")
    expected = [(label, data, 10 * n, loss) for label, (data, losses) in TRACES.items() for n, loss in enumerate(losses, 1)]
    assert list(rows[["label", "data", "step", "loss"]].itertuples(index=False, name=None)) == expected
    assert set(rows["learning_rate"]) == {1e-3}


def test_the_plot_has_a_panel_per_kind_of_data_and_is_reproducible(cards, tmp_path):
    first, second, png = (str(tmp_path / name) for name in ("a.svg", "b.svg", "a.png"))
    plot_loss(cards, str(tmp_path / "loss.csv"), [first, png])
    plot_loss(cards, str(tmp_path / "loss.csv"), [second])
    drawing = Path(first).read_text()
    assert drawing == Path(second).read_text()
    for text in ("A", "B &amp; C", "loss on training texts", "loss on answers of the instruction set"):
        assert f"<!-- {text} -->" in drawing
    assert Path(png).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("labels", [[], ["nothing logged"]])
def test_without_a_logged_step_there_is_still_a_table_and_a_plot(cards, tmp_path, labels):
    plot_loss({label: cards[label] for label in labels}, str(tmp_path / "loss.csv"), [str(tmp_path / "loss.svg")])
    assert pandas.read_csv(tmp_path / "loss.csv").empty
    assert (tmp_path / "loss.svg").exists()
