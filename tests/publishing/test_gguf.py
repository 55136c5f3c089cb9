import json
import shutil

import pytest

from longqlora.publishing.gguf import convert, splits_like_gpt2

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture
def model(root, tmp_path):
    """The demo's base model, with one value of a JSON file replaced."""

    def changed(file: str = "config.json", **values):
        folder = shutil.copytree(root / "demo/model", tmp_path / "model")
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")
        return folder

    return changed


def write(folder, tmp_path, converter: str | None = None) -> str:
    output = str(tmp_path / "x.gguf")
    convert(model=str(folder), output=output, gguf_format="q8_0", name="My model", converter=converter)
    return output


def test_dynamic_scaling_is_refused_with_what_to_take_instead(model, tmp_path):
    folder = model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0})
    with pytest.raises(ValueError, match=r"dynamic scaling depends on the length .* rope_scaling: yarn, linear or ntk"):
        write(folder, tmp_path)
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_is_written_for_a_tokenizer_that_the_converter_does_not_know(model, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    pytest.importorskip("conversion", reason="needs the extra gguf")
    fields = gguf.GGUFReader(write(model(), tmp_path)).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["general.name"].contents() == "My model"
    assert fields["llama.context_length"].contents() == 128


def test_a_tokenizer_that_splits_texts_in_another_way_is_refused(model, tmp_path):
    pytest.importorskip("conversion", reason="needs the extra gguf")
    digits = {"type": "Digits", "individual_digits": True}
    folder = model("tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, digits, GPT2]})
    with pytest.raises(ValueError, match=r"does not know how its tokenizer splits texts .*serving\.converter"):
        write(folder, tmp_path)


def test_a_checkout_of_llama_cpp_can_convert(model, tmp_path):
    pytest.importorskip("conversion", reason="needs the extra gguf")
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "beside.py").write_text("NAME = 'beside'")
    converter = checkout / "convert_hf_to_gguf.py"
    converter.write_text(
        "import sys, beside\nif __name__ == '__main__': open(sys.argv[3], 'w').write(' '.join([beside.NAME, *sys.argv[4:]]))"
    )
    written = write(model(), tmp_path, str(converter))
    with open(written) as file:
        assert file.read() == "beside --outtype q8_0 --model-name My model"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pre_tokenizer": GPT2}, True),
        ({"pre_tokenizer": GPT2 | {"add_prefix_space": True}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"pre_tokenizer": None}, False),
        ({"pre_tokenizer": GPT2, "normalizer": {"type": "NFC"}}, False),
    ],
)
def test_a_tokenizer_like_gpt2_is_recognized_by_how_it_splits_texts(model, values, expected):
    assert splits_like_gpt2(model("tokenizer.json", **values)) is expected


def test_a_model_without_tokenizer_json_is_left_to_the_converter(tmp_path):
    assert not splits_like_gpt2(tmp_path)
