"""Records of an evaluation as the workflow writes them, for the tests of tables and plots."""

import json
import re
from pathlib import Path

import numpy
import pandas

CONTEXT = 128  # of the base, whose perplexity explodes beyond it
PERPLEXITY = {
    "base": {64: 9.0, 128: 8.0, 256: 2345.0},
    "Long & 100 %": {64: 9.02, 128: 8.5, 256: 7.9},
    "chat_model": {64: 12.0, 128: 11.0, 256: 10.0},
}
SIMILAR = {("Long & 100 %", 64)}  # not significantly different from the best
DATASETS = ["PG19", "Proof-pile"]
SYSTEMS = [*PERPLEXITY, "MPT & co", "a", "b", "x", "x.rank-8"]
LABELS = {"system": {name.split()[0].lower(): name for name in SYSTEMS}, "dataset": {name: name for name in DATASETS}}
PUBLISHED = [{"label": "Paper", "dataset": "PG19", "perplexity": {"64": 9.1, "256": 8.0}}]
NUM_WINDOWS, NUM_SCORED = 20, 10


def window_losses(label: str, length: int, perplexity: float) -> pandas.DataFrame:
    """Windows with the given perplexity: how hard a window is for all systems, and noise of this one."""
    hard = numpy.random.default_rng(length).normal(0, 0.5, NUM_WINDOWS)
    own = numpy.random.default_rng(len(label)).normal(0, 0.1 if (label, length) in SIMILAR else 0.001, NUM_WINDOWS)
    nll = numpy.log(perplexity) + (hard - hard.mean()) + (own - own.mean())
    frame = {"document": 0, "begin": numpy.arange(NUM_WINDOWS) * length, "num_scored": NUM_SCORED, "nll": NUM_SCORED * nll}
    return pandas.DataFrame(frame)


def write_cell(folder: Path, label: str, dataset: str, length: int, perplexity: float, **changes) -> str:
    """Write a record of perplexity and its windows; the path of the record."""
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    window_losses(label, length, perplexity).to_parquet(path.with_suffix(".parquet"))
    positions = [1, 2, 8, length]
    cell = {
        "system": label.split()[0].lower(), "dataset": dataset, "eval_length": length,
        "perplexity": perplexity, "mean_nll": numpy.log(perplexity), "standard_error": 0.01, "standard_error_units": "windows",
        "protocol": "exact", "window": length, "stride": length, "precision": "nf4", "attention": "full",
        "model": label.split()[0].lower(), "model_context": CONTEXT, "code_digest": "89ab",
        "has_own_tokenizer": False, "is_within_context": label != "base" or length <= CONTEXT, "dataset_warning": None,
        "loss_by_position": {
            "tokens_before": positions, "num_scored": [10] * 4, "nll": [10 * (numpy.log(perplexity) + 1 / n) for n in positions]
        },
    }  # fmt: skip
    path.write_text(json.dumps(cell | changes))
    return str(path)


def write_cells(folder: Path) -> list[str]:
    """Write a record of perplexity for each system, evaluation set and length; the paths."""
    folder.mkdir()
    return [
        write_cell(folder, label, dataset, length, value)
        for label, by_length in PERPLEXITY.items()
        for dataset in DATASETS
        for length, value in by_length.items()
    ]


def add_longppl(records: list[str], evaluator: str) -> None:
    """Add to records of perplexity and their windows a LongPPL of half the perplexity, over two tokens a window.

    Args:
        records: paths.
        evaluator: name of the system that chose the key tokens.
    """
    for record, windows in zip(records, windows_of(records), strict=True):
        cell, losses = json.loads(Path(record).read_text()), pandas.read_parquet(windows)
        cell |= {
            "evaluator": evaluator, "num_scored": NUM_WINDOWS * NUM_SCORED, "num_key_tokens": NUM_WINDOWS * 2,
            "longppl": cell["perplexity"] / 2, "key_mean_nll": cell["mean_nll"] - numpy.log(2), "key_standard_error": 0.02,
        }  # fmt: skip
        key_nll = 2 * (losses["nll"] / NUM_SCORED - numpy.log(2))
        Path(record).write_text(json.dumps(cell))
        losses.assign(num_key_tokens=2, key_nll=key_nll).to_parquet(windows)


def windows_of(records: list[str]) -> list[str]:
    """The windows' losses of each record."""
    return [record.replace(".json", ".parquet") for record in records]


def write_retrieval_cell(folder: Path, label: str, length: int, shares: dict[str, list[float]]) -> str:
    """Write a record of retrieval; its path."""
    path = folder / f"{label.split()[0]}-{length}.json"
    cells = [
        {"task": task, "depth": depth, "accuracy": share, "samples": 5, "answers": [{"answer": "what a model said"}] * 5}
        for task, by_depth in shares.items()
        for depth, share in zip((0, 1), by_depth, strict=True)
    ]
    accuracy = numpy.mean([cell["accuracy"] for cell in cells])
    stamp = {"rope_scaling": "linear", "rope_factor": 2.0, "target_context": 256, "chat_template": label != "base"}
    cell = {"system": label.split()[0].lower(), "eval_length": length, "accuracy": accuracy, "cells": cells}
    path.write_text(json.dumps(cell | stamp))
    return str(path)


def write_retrieval_cells(folder: Path) -> list[str]:
    """Write records of retrieval; the paths.

    At 256 tokens the second system has a low perplexity and an accuracy of a third, the third one a high perplexity and 0.
    """
    folder.mkdir()
    shares = {
        ("base", 64): {"passkey": [1, 1], "multi_key": [1, 0.8]},
        ("Long & 100 %", 64): {"passkey": [1, 1], "multi_key": [1, 1]},
        ("Long & 100 %", 256): {"passkey": [0.8, 0.4], "multi_key": [0, 0.12]},
        ("chat_model", 256): {"passkey": [0, 0], "multi_key": [0, 0]},
    }
    return [write_retrieval_cell(folder, *place, found) for place, found in shares.items()]


def texts_of(svg: Path) -> set[str]:
    """The texts of a drawing: matplotlib draws them as paths and writes each into a comment."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text()))


def draw_twice(draw, folder: Path) -> set[str]:
    """Draw into two SVG files, which must be equal, and a PNG file; the texts of the drawing."""
    first, second, png = folder / "a.svg", folder / "b.svg", folder / "a.png"
    draw([str(first), str(png)])
    draw([str(second)])
    assert first.read_bytes() == second.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    return texts_of(first)
