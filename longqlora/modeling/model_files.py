"""The files that transformers reads from a model's folder: configuration, weights, tokenizer.

Standard library only, because the workflow looks at them whenever it starts, to notice changed weights.
"""

import json
import re
from pathlib import Path

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",  # the only weights of older models on the hub
    "pytorch_model.bin.index.json",
)
"""Names under which transformers looks for weights, in this order; an index names several files (shards)."""
VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(path: str) -> bool:
    """Whether a model's path is a hub id (``owner/name``) and not a folder of this machine."""
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in order.

    Raises:
        ValueError: if there is none, or an index names missing files.
    """
    for name in WEIGHTS:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        try:
            shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: is not an index of weights (JSON with a weight_map)") from None
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{file}: names {len(shards)} files, but {', '.join(missing[:3])} is missing")
        return [folder / shard for shard in shards]
    raise ValueError(f"{folder}: holds no weights; {' or '.join(WEIGHTS[::2])} is missing")


def model_files(folder: str) -> list[Path]:
    """The files that decide a model's output: its configuration and its weights."""
    return [Path(folder) / "config.json", *weight_files(Path(folder))]


def tokenizer_files(folder: str, *, with_chat_template: bool = False) -> list[Path]:
    """The files that decide how a tokenizer encodes texts, and with ``with_chat_template`` conversations too."""
    names = VOCABULARY + (CHAT_TEMPLATES if with_chat_template else ())
    return [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
