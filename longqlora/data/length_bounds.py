"""Bounds on a text's number of tokens from its number of characters, so that most texts of the wrong length are not tokenized.

Upper bound: every token covers at least one byte of the normalized text, so a text has at most as many tokens as bytes. Lower
bound: if the tokenizer keeps all of a text, a token covers at most as many characters as the longest token of the vocabulary.
How much normalization can change the length of a text is bounded by Unicode (see the table in its FAQ on normalization).
"""

import json
from dataclasses import dataclass

from tokenizers.pre_tokenizers import ByteLevel

from longqlora.data.token_files import backend_of

MAX_EXPANSION = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}  # bytes of UTF-8 after normalization per byte before, at most
MAX_COMPOSED = 4  # code points that NFC replaces by one, at most
KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts", "FixedLength"}


@dataclass(frozen=True)
class LengthBounds:
    """Bounds on the number of tokens of a text.

    Attributes:
        tokens_per_byte: upper bound, per byte of UTF-8; None: there is no bound.
        extra_tokens: upper bound on further tokens, which the tokenizer adds, such as a space before the text.
        characters_per_token: upper bound; None: there is no bound.
    """

    tokens_per_byte: int | None
    extra_tokens: int
    characters_per_token: int | None

    def is_too_short(self, text: str, min_tokens: int) -> bool:
        """Whether a text certainly has fewer than ``min_tokens`` tokens."""
        if self.tokens_per_byte is None or len(text) * self.tokens_per_byte + self.extra_tokens >= min_tokens:
            return False  # a text has at least as many bytes as characters, so the bytes are seldom counted
        num_bytes = len(text) if text.isascii() else len(text.encode())
        return num_bytes * self.tokens_per_byte + self.extra_tokens < min_tokens

    def is_too_long(self, text: str, max_tokens: int) -> bool:
        """Whether a text certainly has more than ``max_tokens`` tokens."""
        return self.characters_per_token is not None and len(text) > max_tokens * self.characters_per_token

    def __str__(self) -> str:
        upper, lower = "no upper bound", "no lower bound"
        if self.tokens_per_byte is not None:
            upper = f"a text has at most {self.tokens_per_byte} tokens per byte of UTF-8, and {self.extra_tokens} more"
        if self.characters_per_token is not None:
            lower = f"a token covers at most {self.characters_per_token} characters"
        return f"bounds on the number of tokens: {upper}; {lower}"


def steps_of(component: dict | None, key: str) -> list[dict]:
    """Steps of a normalizer or pre-tokenizer of a ``tokenizer.json``: the component itself, or the members of a sequence."""
    if component is None:
        return []
    return [step for part in component[key] for step in steps_of(part, key)] if component["type"] == "Sequence" else [component]


def keeps_all_text(description: dict, vocabulary: set[str], pre_tokenizers: list[dict]) -> bool:
    """Whether every character of a normalized text is part of some token.

    It is if there is a token for each of the 256 bytes, no pre-tokenizer removes text, and no added token includes the blanks
    around it. Without byte tokens, a run of unknown characters of any length would become one token.
    """
    byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
    byte_tokens = ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    model = description["model"]
    has_fallback = model["type"] == "BPE" if byte_level else model.get("byte_fallback", False)
    removes_text = any(
        step["type"] not in KEEPING_PRE_TOKENIZERS or step.get("behavior") == "Removed" for step in pre_tokenizers
    )
    strips_blanks = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"])
    return has_fallback and vocabulary.issuperset(byte_tokens) and not removes_text and not strips_blanks


def length_bounds(tokenizer) -> LengthBounds:
    """Bounds that follow from a tokenizer's components; special tokens of a template are not counted.

    Args:
        tokenizer: of transformers. If it has a component that is not covered here, there are no bounds, and every text is
            tokenized.
    """
    no_bounds = LengthBounds(None, 0, None)
    description = json.loads(backend_of(tokenizer).to_str())
    entries, added = description["model"]["vocab"], [token["content"] for token in description["added_tokens"]]
    vocabulary = {entry[0] if isinstance(entry, list) else entry for entry in entries}  # a list holds (token, score)
    pre_tokenizers = steps_of(description["pre_tokenizer"], "pretokenizers")
    expansion, composed, extra = 1, 1, 0
    for number, step in enumerate(pre_tokenizers):
        adds_one = step["type"] == "Metaspace" or bool(step.get("add_prefix_space"))
        if adds_one and (number > 0 or step.get("replacement", "Ġ") not in vocabulary):
            return no_bounds  # after another step, it would add a token to every part of the text
        extra += adds_one
    for step in steps_of(description["normalizer"], "normalizers"):
        if step["type"] in MAX_EXPANSION:
            expansion *= MAX_EXPANSION[step["type"]]
            composed *= MAX_COMPOSED if step["type"] in ("NFC", "NFKC") else 1
        elif step["type"] == "Prepend" and vocabulary.issuperset(step["prepend"]):
            extra += len(step["prepend"])
        elif not (step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] in vocabulary):
            return no_bounds
    if any(len(token.encode()) <= extra for token in added):  # added tokens divide a text, and each part gets extra tokens
        return no_bounds
    longest = max(map(len, [*vocabulary, *added])) * composed
    return LengthBounds(expansion, extra, longest if keeps_all_text(description, vocabulary, pre_tokenizers) else None)
