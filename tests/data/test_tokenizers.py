"""Tokenizers are those that ``AutoTokenizer`` loads, and are loaded without torch where their folder allows it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from conftest import ROOT
from transformers import AutoTokenizer

from longqlora.data.token_files import encode
from longqlora.data.tokenizers import load_tokenizer

TEXT = "Where is it?  In the third line,\nbelow 2²."


def edit(file: Path, **settings) -> None:
    """Change settings in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_the_one_that_transformers_loads(model_folder, model_type, tokenizer_class):
    edit(Path(model_folder, "config.json"), model_type=model_type)
    edit(Path(model_folder, "tokenizer_config.json"), tokenizer_class=tokenizer_class)
    loaded, expected = load_tokenizer(model_folder), AutoTokenizer.from_pretrained(model_folder)
    assert type(loaded) is type(expected)
    assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == expected.special_tokens_map
    assert loaded(TEXT) == expected(TEXT)


def test_a_folder_without_a_model_is_enough(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(TEXT) == tokenizer(TEXT)


def test_a_tokenizer_without_an_end_token_is_refused(model_folder):
    edit(Path(model_folder, "tokenizer_config.json"), eos_token=None)
    with pytest.raises(ValueError, match=r"base: the tokenizer has no end token; name one as eos_token in"):
        load_tokenizer(model_folder)


@pytest.mark.parametrize("settings", [{"tokenizer_class": "LlamaTokenizer"}, None], ids=["as Vicuna's", "no settings"])
def test_a_folder_with_tokenizer_model_alone_has_the_ids_of_sentencepiece(tmp_path, texts, settings):
    """LLaMA 1 and 2, Vicuna and OpenLLaMA are published like this; trained with LLaMA's options."""
    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()), model_writer=stored, model_type="bpe", vocab_size=400, minloglevel=2,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(stored.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    expected = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue()).encode(texts[1])
    assert next(encode(tokenizer, [texts[1]])) == expected
    assert tokenizer.decode(expected) == texts[1]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", 400)


@pytest.mark.process
def test_a_tokenizer_that_was_trained_from_scratch_is_used_without_torch(model_folder):
    code = (
        "import sys\n"
        "from longqlora.data.chat_template import tokenize_conversation, with_chat_template\n"
        "from longqlora.data.tokenizers import load_tokenizer\n"
        "tokenizer = with_chat_template(load_tokenizer(sys.argv[1]))\n"
        "tokenize_conversation(tokenizer, [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}])\n"
        "tokenizer.save_pretrained(sys.argv[1])\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, model_folder], cwd=ROOT, check=True)
