import json
import shutil

import pytest
import torch

from longqlora.config.settings import RopeExtension
from longqlora.data.token_files import tokenize_documents
from longqlora.data.tokenizers import load_tokenizer
from longqlora.modeling.loading import load_config
from longqlora.publishing.gguf_packages import package_problems
from longqlora.publishing.served_config import served_config

if problems := list(package_problems(None)):
    pytest.skip("; ".join(problems), allow_module_level=True)

from longqlora.publishing import gguf
from longqlora.publishing.llama_cpp import open_gguf
from longqlora.publishing.serving_check import ServedDifferently, check_serving, compare, differences

LENGTHS = [64, 128, 256]
GOOD = {
    "format": "f16",
    "frequencies": {"file": {"rope_type": "linear"}, "largest_ratio": 1.0, "attention_ratio": 1.0},
    "text": {"characters": 9, "differs_at": None},
    "windows": [{"window": 64, "perplexity": 8.0, "gguf_perplexity": 8.0, "kl_divergence": 1e-6, "top_1_agreement": 1.0}],
}


@pytest.fixture(scope="module")
def base(root) -> str:
    return str(root / "demo/model")


@pytest.fixture(scope="module")
def tokens(root, base, texts):
    return torch.tensor(load_tokenizer(base)("\n".join(texts)[:40_000])["input_ids"])


@pytest.fixture
def published(base, tmp_path):
    """The demo's base model with another ``config.json``, as a published model has it."""

    def write(scaling: str, target_context: int = 256, name: str = "model", without: str = "") -> str:
        theta = 8000.0 if scaling == "theta" else None
        extension = RopeExtension(scaling=scaling, target_context=target_context, theta=theta)
        config = served_config(load_config(base, extension).to_dict())
        for section in (config, config["rope_parameters"], config.get("rope_scaling") or {}):
            section.pop(without, None)
        folder = shutil.copytree(base, tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def record_of(tokens, model: str, tmp_path, source: str | None = None, gguf_format="f16") -> dict:
    """Compare a model with the GGUF file of ``source``, by default itself."""
    file = str(tmp_path / "x.gguf")
    gguf.convert(model=source or model, output=file, gguf_format=gguf_format, name="x", converter=None)
    return {"format": gguf_format} | compare(file, model, tokens, LENGTHS)


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3", "ntk", "theta"])
def test_llama_cpp_reads_the_positions_of_a_published_model(scaling, tokens, published, tmp_path):
    record = record_of(tokens, published(scaling), tmp_path)
    assert list(differences(record)) == []
    assert [window["window"] for window in record["windows"]] == LENGTHS
    for window in record["windows"]:
        assert window["kl_divergence"] < 1e-5
        assert window["top_1_agreement"] > 0.99
        assert window["gguf_perplexity"] == pytest.approx(window["perplexity"], rel=1e-3)


def test_the_error_of_8_bits_is_none_of_positions(tokens, published, tmp_path):
    record = record_of(tokens, published("yarn"), tmp_path, gguf_format="q8_0")
    assert list(differences(record)) == []
    assert all(window["kl_divergence"] > 1e-4 for window in record["windows"])


@pytest.mark.parametrize("gguf_format", ["f16", "q8_0"])
@pytest.mark.parametrize(
    ("scaling", "wrong"),
    [
        ("linear", {"scaling": "linear", "target_context": 512}),  # another factor
        ("llama3", {"scaling": "llama3", "without": "original_max_position_embeddings"}),  # taken to be 8192
        ("yarn", {"scaling": "linear"}),
        ("ntk", {"scaling": "ntk", "without": "rope_theta"}),  # taken to be 10000
    ],
)
def test_wrong_positions_are_an_error(gguf_format, scaling, wrong, tokens, published, tmp_path):
    record = record_of(tokens, published(scaling), tmp_path, published(**wrong, name="wrong"), gguf_format)
    positions, *windows = differences(record)
    assert "its positions are not those of the model: rotary frequencies differ by a factor of up to" in positions
    assert windows
    assert all("next-token distributions differ from those of transformers by a KL divergence of" in line for line in windows)


def test_the_file_says_which_scaling_it_has(tokens, published, tmp_path):
    (line, *_) = differences(record_of(tokens, published("linear"), tmp_path, published("linear", 512, name="wrong")))
    assert "differ by a factor of up to 2" in line
    assert "(in the file: rope_theta 500.0, rope_type linear, factor 4.0)" in line


def test_other_tokens_are_an_error(tokens, published, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "splits_like_gpt2", lambda _: False)
    monkeypatch.setattr("conversion.base.TextModel.get_vocab_base_pre", lambda *_: "smollm")  # splits digits
    record = record_of(torch.cat([tokens[:50], torch.tensor(load_tokenizer(published("yarn"))(" 1234 5678")["input_ids"])]),
                       str(tmp_path / "model"), tmp_path)  # fmt: skip
    (line,) = differences(record)
    assert "llama.cpp reads other tokens than transformers, first in" in line


@pytest.fixture
def stream(base, texts, tmp_path) -> str:
    tokenize_documents(texts * 4, load_tokenizer(base), str(tmp_path / "data.bin"))
    return str(tmp_path / "data.bin")


def test_the_check_reads_held_out_text_at_lengths_from_the_bases_context(base, stream, published, tmp_path):
    model, file = published("linear", 192), str(tmp_path / "x.gguf")
    gguf.convert(model=model, output=file, gguf_format="f16", name="x", converter=None)
    card = {"base_model": base, "rope_scaling": "linear", "rope_factor": None, "rope_theta": None, "target_context": 192}
    places = {"gguf": file, "gguf_format": "f16", "data": stream, "cards": [card]}
    record = check_serving(model=model, **places)
    assert [window["window"] for window in record["windows"]] == [64, 128, 192]
    assert (record["base_context"], record["rope_scaling"], record["held_out"]) == (128, "linear", True)
    with pytest.raises(ServedDifferently, match=r"x\.gguf: its positions are not those of the model"):
        check_serving(model=published("yarn", 192, name="other"), **places)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"windows": [GOOD["windows"][0] | {"kl_divergence": 0.01}]}, r"0\.01 nats, more than the 0\.001 .* f16 may cause"),
        ({"windows": [GOOD["windows"][0] | {"kl_divergence": float("nan")}]}, "KL divergence of nan nats"),
        ({"frequencies": GOOD["frequencies"] | {"attention_ratio": 0.88}}, "the scale of queries and keys by 0.88"),
    ],
)
def test_each_difference_is_named(change, expected):
    lines = list(differences(GOOD | change))
    assert len(lines) == (expected is not None)
    if expected:
        with pytest.raises(ValueError, match=expected):
            raise ValueError(lines[0])


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"x\.gguf: llama\.cpp cannot load it"), open_gguf(str(tmp_path / "x.gguf")):
        pass
