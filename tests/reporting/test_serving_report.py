import json

import pandas

from longqlora.reporting.serving_report import read_serving, render_serving

LABELS = {"system": {"longer": "Longer model"}, "dataset": {}}
WINDOW = {
    "window": 64,
    "count": 32,
    "perplexity": 6.04751,
    "gguf_perplexity": 6.0526,
    "kl_divergence": 8.7e-4,
    "top_1_agreement": 0.984,
}
RECORD = {"system": "longer", "rope_scaling": "yarn", "format": "q8_0", "file_bytes": 1_219_744}


def test_each_file_has_a_row_for_each_length(tmp_path):
    for gguf_format in ("f16", "q8_0"):
        record = RECORD | {"format": gguf_format, "windows": [WINDOW, WINDOW | {"window": 128}]}
        (tmp_path / f"longer-{gguf_format}.json").write_text(json.dumps(record))
    rows = read_serving([str(tmp_path / "longer-f16.json"), str(tmp_path / "longer-q8_0.json")], LABELS)
    render_serving(rows, csv=str(tmp_path / "x.csv"), markdown=str(tmp_path / "x.md"))
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "x.md").read_text().splitlines() if "|" in line
    ]
    assert [row[2:5] for row in table[2:]] == [[name, "1.2", length] for name in ("f16", "q8_0") for length in ("64", "128")]
    assert table[2] == ["Longer model", "yarn", "f16", "1.2", "64", "6.048", "6.053", "8.7e-04", "98.4%"]
    assert pandas.read_csv(tmp_path / "x.csv")["kl_divergence"].tolist() == [8.7e-4] * 4
