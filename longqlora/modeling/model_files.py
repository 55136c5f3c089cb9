"""The files that transformers reads from a model's folder: configuration, weights, tokenizer.

Standard library only, because the workflow looks at them whenever it starts, to notice changed weights.
"""

import json
import re
from operator import index
from pathlib import Path

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",  # the only weights of older models on the hub
    "pytorch_model.bin.index.json",
)
"""Names under which transformers looks for weights, in this order; an index names several files (shards)."""
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
GENERAL_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of any tokenizer.json
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its library allows
BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?(\w[\w.-]*/\w[\w.-]*)", re.MULTILINE)  # in a model card


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
            shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: is not an index of weights (JSON with a weight_map)") from None
        if missing:
            raise ValueError(f"{file}: names {len(shards)} files, but {', '.join(missing[:3])} is missing")
        return [folder / shard for shard in shards]
    raise ValueError(f"{folder}: holds no weights; {' or '.join(WEIGHTS[::2])} is missing")


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is complete: 8 bytes with the length of the header, the header (JSON), the tensors.

    Raises:
        ValueError: if it is not.
    """
    with file.open("rb") as stored:
        length = int.from_bytes(stored.read(8), "little")
        header = stored.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        ends = [index(tensor["data_offsets"][1]) for name, tensor in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        hint = "is a pointer of Git LFS: fetch it with git lfs pull" if is_lfs_pointer(file) else "is damaged: get it again"
        raise ValueError(f"{file}: has no header of safetensors; it {hint}") from None
    found, expected = file.stat().st_size, 8 + length + max(ends, default=0)
    if found != expected:
        raise ValueError(f"{file}: has {found:,} bytes, but its header describes {expected:,}; it is damaged: get it again")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what git writes in the place of a large file if Git LFS is not installed."""
    with file.open("rb") as stored:
        return stored.read(len(LFS_POINTER)) == LFS_POINTER


def largest_text_token(file: Path) -> int:
    """The largest id in a ``tokenizer.json`` that a text can be encoded to. Special tokens do not count, because texts have
    none: some published tokenizers have a token for padding that the model has no embedding for.

    Raises:
        ValueError: if the file is not one of a tokenizer.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]  # ids by token; for Unigram a list
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens") or [] if not token["special"]]
        return max(map(index, [*ids, *added]))
    except (ValueError, KeyError, TypeError, AttributeError):
        hint = "a pointer of Git LFS: fetch it with git lfs pull" if is_lfs_pointer(file) else "damaged: get it again"
        raise ValueError(f"{file}: is not a tokenizer (JSON with a model and its vocab); it is {hint}") from None


def lacks_end_token(folder: Path) -> bool:
    """Whether a tokenizer's settings name no end token, and its class, which any tokenizer can have, knows none either.

    Raises:
        ValueError: if the settings are not a JSON object.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return False
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return settings.get("tokenizer_class") in GENERAL_CLASSES and not settings.get("eos_token")
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: is not a JSON object; it is damaged: get it again") from None


def original_of(folder: Path) -> str | None:
    """The hub id of the model that a model was made from, by the ``README.md`` that its publisher wrote; None without one."""
    card = folder / "README.md"
    found = BASE_MODEL.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return found[1] if found else None


def model_files(folder: str) -> list[Path]:
    """The files that decide a model's output: its configuration and its weights."""
    return [Path(folder) / "config.json", *weight_files(Path(folder))]


def tokenizer_files(folder: str, *, with_chat_template: bool = False) -> list[Path]:
    """The files that decide how a tokenizer encodes texts, and with ``with_chat_template`` conversations too."""
    names = VOCABULARY + TOKENIZER_SETTINGS + (CHAT_TEMPLATES if with_chat_template else ())
    return [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
