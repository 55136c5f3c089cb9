"""Reads and writes checkpoints of transformers tensor by tensor, so that a model need not fit into memory."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from longqlora.data.hub import is_hub_id, split_revision
from longqlora.modeling.model_files import WEIGHTS, weight_files

MAX_SHARD_BYTES = 5 * 10**9


def checkpoint_folder(path: str) -> Path:
    """The folder of a model: ``path`` itself, or for a hub id the folder in the hub's cache, with the weights downloaded.

    Raises:
        ValueError: if the repository on the hub holds no weights.
    """
    if not is_hub_id(path):
        return Path(path)
    name, revision = split_revision(path)
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        names = [f"{stem}{suffix}", f"{stem}{suffix}.index.json"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*names, f"{stem}-*{suffix}"]))
        if any((folder / name).exists() for name in names):
            return folder
    raise ValueError(f"{path}: the repository holds neither {' nor '.join(WEIGHTS[::2])}")


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a checkpoint, with one tensor in memory at a time."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    yield name, file.get_tensor(name)
        else:  # weights_only unpickles tensors and runs no code; mmap reads them when they are used
            can_map = is_zipfile(path)  # not the format of torch before 1.6, which is read as a whole
            yield from torch.load(path, map_location="cpu", mmap=can_map, weights_only=True).items()


def write_weights(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a checkpoint that ``from_pretrained`` reads, with one shard of at most ``max_bytes`` in memory.

    Args:
        folder: to write to.
        weights: names and tensors.
        max_bytes: size of a file, unless a single tensor is larger.
    """
    shards: list[tuple[Path, list[str], int]] = []
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard), size))

    for name, weight in weights:
        num_bytes = weight.numel() * weight.element_size()
        if shard and size + num_bytes > max_bytes:
            flush()
            shard, size = {}, 0
        shard[name] = weight.contiguous()
        size += num_bytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names, _) in enumerate(shards, start=1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
