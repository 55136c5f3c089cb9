"""Table of the serving check: what llama.cpp computes with each GGUF file, compared with transformers."""

import json
from pathlib import Path

import pandas

from longqlora.reporting.notation import markdown_table
from longqlora.reporting.records import Labels

CAPTION = (
    "GGUF files in llama.cpp compared with transformers in float32, at every position of held-out training text. KL "
    "divergence: KL(transformers ‖ llama.cpp) of the next-token distributions in nats, the mean over positions. A file that "
    "differs by more than rounding is not in the table, because its check fails."
)


def read_serving(paths: list[str], labels: Labels) -> pandas.DataFrame:
    """Read the records, see :func:`longqlora.publishing.serving_check.check_serving`.

    Args:
        paths: JSON files.
        labels: names of the systems in the table.

    Returns:
        A row for each file and window.
    """
    rows = []
    for path in paths:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        about = {key: record[key] for key in ("system", "rope_scaling", "format", "file_bytes")}
        rows += [{"label": labels["system"][record["system"]], **about, **window} for window in record["windows"]]
    return pandas.DataFrame(rows)


def render_serving(rows: pandas.DataFrame, *, csv: str, markdown: str) -> None:
    """Write the table.

    Args:
        rows: see :func:`read_serving`.
        csv: file for all values.
        markdown: file for the table and its caption.
    """
    rows.to_csv(csv, index=False)
    shown = pandas.DataFrame(
        {
            "system": rows["label"],
            "scaling": rows["rope_scaling"],
            "format": rows["format"],
            "MB": (rows["file_bytes"] / 1e6).map("{:.1f}".format),
            "tokens": rows["window"].map(str),
            "perplexity": rows["perplexity"].map("{:.3f}".format),
            "in llama.cpp": rows["gguf_perplexity"].map("{:.3f}".format),
            "KL divergence": rows["kl_divergence"].map("{:.1e}".format),
            "same most likely token": rows["top_1_agreement"].map("{:.1%}".format),
        }
    )
    table = markdown_table(shown.set_index("system"))
    Path(markdown).write_text(f"{table}\n\n{CAPTION}\n", encoding="utf-8")
