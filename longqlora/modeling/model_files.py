"""Which files of a model's folder hold its weights and its tokenizer: those that transformers reads.

Standard library only: the workflow asks on every start, so that new weights in a local folder are noticed.
"""

import json
from pathlib import Path

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",  # older models of the hub have nothing else
    "pytorch_model.bin.index.json",
)
"""Names under which transformers looks for weights; it reads the first that is there, and a list of shards for an index."""
VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in order.

    Raises:
        ValueError: if there is none, or an index names files that are not there.
    """
    for name in WEIGHTS:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{file}: names {len(shards)} files, of which {', '.join(missing[:3])} is missing")
        return [folder / shard for shard in shards]
    raise ValueError(f"{folder}: holds no weights; {' or '.join(WEIGHTS[::2])} is missing")


def model_files(folder: str) -> list[Path]:
    """What decides how a model computes: its configuration and its weights."""
    return [Path(folder) / "config.json", *weight_files(Path(folder))]


def tokenizer_files(folder: str, *, with_chat_template: bool = False) -> list[Path]:
    """What decides how a tokenizer encodes texts, and conversations too if asked for."""
    names = VOCABULARY + (CHAT_TEMPLATES if with_chat_template else ())
    return [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
