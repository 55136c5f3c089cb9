"""Hours, bytes and money of runs that are much larger than any that was made, by calculation: the tables of docs/scale.md.

    python benchmarks/scale.py            # prints the tables, in seconds
    python benchmarks/scale.py FOLDER     # also writes the experiments there, for longqlora plan

Times and disk space are those of longqlora.planning for an H100, whose rates were measured. Sampling has the rates that
RESULTS.md has in "Data stages". The sizes of the models are those of their published config.json files.
"""

import argparse
import json
import math
from pathlib import Path

import yaml

from longqlora.config.completed import Experiment
from longqlora.config.experiment import load_experiment
from longqlora.config.settings import RetrievalSettings
from longqlora.config.systems import extension_of
from longqlora.planning import cost
from longqlora.planning.cards import card_named
from longqlora.planning.disk import system_bytes
from longqlora.planning.work import shape_of

CARD = card_named("H100-80GB")
CORPUS_BYTES, CORPUS_FILES = 1.2e12 * 4, 2084  # RedPajama-1T: its tokens at 4 bytes each, and its files
IN_RANGE = 0.39  # of the bytes of the benchmark that are in texts of suitable length
SAMPLING_RATES = {0.0025: 195e6, 0.01: 169e6, 1: 7e6}  # bytes per second and core, by examined_share
NODE_CORES, NODE_BANDWIDTH = 64, 1e9  # bytes per second: an assumption
EVALUATED_TOKENS = 10e6  # of all evaluation sets: an assumption
GPU_PRICE, CORE_PRICE = 3.0, 0.05  # dollars per hour: an assumption
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MODELS = {
    "llama2-7b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "dtype": "float16",
    },
    "llama2-70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "dtype": "float16",
    },
    "llama3-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": "bfloat16",
    },
}  # fmt: skip


def experiment(folder: str, model: str, target: int, trainings: dict[str, dict], lengths: list[int]) -> dict:
    """A configuration: a row for the base, and a row for each training."""
    systems = {name: {"label": name, "target_context": target, "training": changes} for name, changes in trainings.items()}
    return {
        "experiment": f"{model}-{target}",
        "seed": 1,
        "device": "cuda",
        "base_model": {"path": f"{folder}/{model}"},
        "corpus": {"sources": [{"paths": ["corpus.jsonl"]}], "num_texts": 54212, "min_tokens": 4096, "max_tokens": target},
        "training": {"steps": 1000},
        "systems": {"base": {"label": "base"}} | systems,
        "evaluation": {
            "lengths": lengths,
            "protocol": "longqlora",
            "precision": "nf4",
            "datasets": {"books": {"label": "books", "paths": ["books.bin"]}},
        },
    }


def experiments(folder: str) -> dict[str, dict]:
    """The configurations of the page, by name. Both trainings see 524 million tokens."""
    million = {"steps": 500, "gradient_accumulation": 1}
    short = million | {"attention": "full", "pose_window": 32768, "gradient_accumulation": 32}
    return {
        "70b-32k": experiment(folder, "llama2-70b", 2**15, {"sparse": {}, "full": {"attention": "full"}}, [8192, 2**15]),
        "8b-1m": experiment(
            folder,
            "llama3-8b",
            2**20,
            {"sparse": million, "full": million | {"attention": "full"}, "full-pose": short},
            [2**17],
        ),
    }


def table(head: tuple, *body: tuple) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *body)]
    return "\n".join([lines[0], "|:--" + "|--:" * (len(head) - 1) + "|", *lines[1:]])


def sampling() -> list[tuple]:
    """Sampling RedPajama-1T on one node."""
    rows: list[tuple] = [("examined_share", "core hours", "hours of 64 cores", "hours of reading", "candidates, GB", "dollars")]
    for share, rate in SAMPLING_RATES.items():
        hours = CORPUS_BYTES / rate / 3600
        reading, written = CORPUS_BYTES / NODE_BANDWIDTH / 3600, share * IN_RANGE * CORPUS_BYTES / 1e9
        node = max(hours / NODE_CORES, reading)
        price = node * NODE_CORES * CORE_PRICE
        rows.append((share, f"{hours:.0f}", f"{hours / NODE_CORES:.2f}", f"{reading:.1f}", f"{written:.0f}", f"{price:.0f}"))
    return rows


def training(planned: Experiment, model: dict) -> list[tuple]:
    """The trainings of an experiment on one GPU."""
    rows: list[tuple] = [("system", "s a step", "GPU hours", "million tokens", "dollars", "model, GB", "at most, GB")]
    for name, system in planned.systems.items():
        if (settings := system.training) is None:
            continue
        time = cost.training_seconds(model, extension_of(system), settings, CARD)
        tokens = settings.steps * settings.gradient_accumulation * (settings.pose_window or system.target_context)
        hours, disk = time.run / 3600, system_bytes(model, settings)
        after, passing = disk["model"] + disk["adapter"], max(disk["checkpoints"], disk["merging"])
        sizes = f"{after / 1e9:.0f}", f"{(after + passing) / 1e9:.0f}"
        rows.append((name, f"{time.step:.0f}", f"{hours:.0f}", f"{tokens / 1e6:.0f}", f"{hours * GPU_PRICE:.0f}", *sizes))
    return rows


def evaluation(retrieved: RetrievalSettings, names: dict[str, list[int]], systems: int = 10) -> list[tuple]:
    """Ten systems of a model: perplexity and retrieval at each length."""
    rows: list[tuple] = [("model, lengths", "jobs", "perplexity, GPU hours", "retrieval, GPU hours", "loading", "dollars")]
    for name, lengths in names.items():
        model = MODELS[name]
        loading = 2 * len(lengths) * cost.loading_seconds(shape_of(model))
        windows = {length: math.ceil(EVALUATED_TOKENS / length) for length in lengths}
        perplexity = sum(cost.evaluation_seconds(model, length, windows[length], "nf4", CARD) for length in lengths)
        retrieval = sum(cost.retrieval_seconds(model, length, retrieved, "nf4", CARD) for length in lengths)
        hours = [systems * seconds / 3600 for seconds in (perplexity, retrieval)]
        row = f"{name}: {', '.join(map(str, lengths))}", systems * 2 * len(lengths), *(f"{each:.1f}" for each in hours)
        rows.append((*row, f"{loading / (perplexity + retrieval):.0%}", f"{sum(hours) * GPU_PRICE:.0f}"))
    return rows


def tables() -> dict[str, str]:
    """The tables of the page, by what they show."""
    loaded = {name: load_experiment(configuration) for name, configuration in experiments("models").items()}
    lengths = {"llama2-7b": [1024, 2048, 4096, 8192], "llama2-70b": [8192, 2**15]}
    return {
        f"sampling RedPajama-1T, {CORPUS_FILES} jobs": table(*sampling()),
        "training 70B at 32,768 tokens": table(*training(loaded["70b-32k"], MODELS["llama2-70b"])),
        "training 8B at 1,048,576 tokens": table(*training(loaded["8b-1m"], MODELS["llama3-8b"])),
        "evaluating ten systems": table(*evaluation(loaded["70b-32k"].retrieval, lengths)),
    }


def write_experiments(folder: Path) -> None:
    """Write the configurations and the models' config.json, as ``longqlora plan`` reads them."""
    for name, model in MODELS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(model, indent=2), encoding="utf-8")
    for name, configuration in experiments(str(folder)).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="folder for the configurations and the models' config.json")
    if folder := parser.parse_args().folder:
        write_experiments(folder)
    for title, text in tables().items():
        print(f"{title}:\n\n{text}\n")
