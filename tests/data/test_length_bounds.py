import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longqlora.data.length_bounds import LengthBounds, length_bounds
from longqlora.data.token_files import encode_batch

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["the ring of power", "hello world, hello 1234", "  indented   and\n\n\tspaced", "été déjà vu", "日本語の文章"] * 20
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(alphabet="ab  \n\t▁<x>é\u0301\u0323ﷺ한\u1100\u1161\u11a8½①ΐ\U0001f600", max_size=60),
    st.lists(st.sampled_from([*WORDS, "<x>", " <x> ", "</s>", "ring"]), max_size=6).map("".join),
)


def train(model, *, pre_tokenizer=None, normalizer=None, alphabet=(), special=("<unk>",), added=(), size=500):
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def llama_bpe(byte_fallback=True):
    return models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)


def byte_level(**options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    prefix = options.pop("prefix", False)
    before = options.pop("before", [])
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return train(
        models.BPE(), pre_tokenizer=pre_tokenizers.Sequence([*before, last]) if before else last, alphabet=alphabet, **options
    )


def legacy_llama(**options):
    return train(
        llama_bpe(**options),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        special=("<unk>", *BYTES),
        alphabet=["▁"],
    )


def metaspace(**options):
    return train(
        llama_bpe(), pre_tokenizer=pre_tokenizers.Metaspace(**options), special=("<unk>", "<s>", *BYTES), alphabet=["▁"]
    )


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(prefix=True),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "byte-level, NFD and NFC": lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.NFC()])),
    "byte-level, split": lambda: byte_level(before=[pre_tokenizers.Digits(True), pre_tokenizers.Punctuation()]),
    "byte-level, split, prefix": lambda: byte_level(before=[pre_tokenizers.Digits(True)], prefix=True),
    "byte-level, added token": lambda: byte_level(added=["<x>", AddedToken("ring", normalized=True)]),
    "byte-level, greedy added token": lambda: byte_level(added=[AddedToken("<x>", lstrip=True, rstrip=True)]),
    "byte-level, prefix, short added token": lambda: byte_level(added=["a"], prefix=True),
    "Metaspace": metaspace,
    "Metaspace, first": lambda: metaspace(prepend_scheme="first"),
    "Metaspace, never, whole": lambda: metaspace(prepend_scheme="never", split=False),
    "LLaMA 2": legacy_llama,
    "LLaMA 2, unknown fused": lambda: legacy_llama(byte_fallback=False),
    "whitespace removed": lambda: train(models.BPE(unk_token="<unk>"), pre_tokenizer=pre_tokenizers.Whitespace()),
    "byte-level, whitespace removed": lambda: byte_level(before=[pre_tokenizers.WhitespaceSplit()]),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "stripped": lambda: byte_level(normalizer=normalizers.Strip()),
}
UNBOUNDED_ABOVE = {  # a token may cover any number of characters
    "byte-level, greedy added token", "LLaMA 2, unknown fused", "whitespace removed", "byte-level, whitespace removed",
}  # fmt: skip
NOTHING = {"lower case", "stripped", "byte-level, split, prefix", "byte-level, prefix, short added token"}


@pytest.fixture(scope="module", params=TOKENIZERS)
def case(request):
    tokenizer = TOKENIZERS[request.param]()
    return request.param, tokenizer, length_bounds(tokenizer)


@settings(max_examples=120, deadline=None)
@given(text=TEXTS)
@example(text="ﷺ" * 20)  # NFKC makes 18 characters of one
@example(text="a\u0345\u0313\u0301" * 20)
@example(text="\u1100\u1161\u11a8" * 20)
@example(text="1234567890" * 5)
@example(text="a" * 50)
@example(text=" " * 50 + "<x>" + " " * 50)
@example(text="語" * 50)
def test_no_text_contradicts_the_bounds(case, text):
    _, tokenizer, bounds = case
    num_tokens = len(encode_batch(tokenizer, [text])[0])
    assert not bounds.is_too_short(text, num_tokens), bounds
    assert not bounds.is_too_long(text, num_tokens), bounds


def test_the_bounds_are_given_where_they_can_be_proved(case):
    name, _, bounds = case
    assert (bounds.tokens_per_byte is None) == (name in NOTHING)
    assert (bounds.characters_per_token is None) == (name in NOTHING | UNBOUNDED_ABOVE)
    if name not in NOTHING:
        assert bounds.is_too_short("ab", 500)
    if name not in NOTHING | UNBOUNDED_ABOVE:
        assert bounds.is_too_long("a b" * 10_000, 2)


def test_the_tests_tokenizer_has_both_bounds(tokenizer):
    bounds = length_bounds(tokenizer)
    assert (bounds.tokens_per_byte, bounds.extra_tokens) == (1, 0)
    assert bounds.characters_per_token == max(map(len, tokenizer.get_vocab()))


def test_bounds_are_exact_at_their_limits():
    bounds = LengthBounds(tokens_per_byte=2, extra_tokens=1, characters_per_token=3)
    assert not bounds.is_too_short("éa", 7)  # 3 bytes: at most 7 tokens
    assert bounds.is_too_short("éa", 8)
    assert not bounds.is_too_long("abcdef", 2)
    assert bounds.is_too_long("abcdefg", 2)
    nothing = LengthBounds(None, 0, None)
    assert not nothing.is_too_short("", 10**9)
    assert not nothing.is_too_long("a" * 1000, 1)


def test_bounds_say_what_was_proved():
    assert "at most 1 tokens per byte of UTF-8, and 0 more; a token covers at most 16 characters" in str(LengthBounds(1, 0, 16))
    assert str(LengthBounds(None, 0, None)).endswith("no upper bound; no lower bound")
