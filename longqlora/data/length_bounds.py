"""How few and how many tokens a text can have, proved from its characters, so that most texts of the wrong length need no
tokenising.

At most: every token stands for at least one byte of the normalised text, so a text has no more tokens than that has bytes. At
least: where no part of a text is lost, a token stands for no more characters than the longest piece of the vocabulary has.
What a normaliser can do to the length of a text is bounded by Unicode (the table in its FAQ on normalisation).
"""

import json
from dataclasses import dataclass

from tokenizers.pre_tokenizers import ByteLevel

from longqlora.data.token_files import backend_of

EXPANSION = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}  # bytes out per byte in, in UTF-8, at most
COMPOSED = 4  # code points that one precomposed character stands for, at most: what NFC can shrink a text by
KEEPS_ALL = {
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Split",
    "Punctuation",
    "UnicodeScripts",
    "FixedLength",
}  # of the pre-tokenisers


@dataclass(frozen=True)
class LengthBounds:
    """Bounds of the number of tokens of a text.

    Attributes:
        tokens_per_byte: at most, in UTF-8; None if nothing can be proved.
        extra_tokens: that a tokenizer may add by itself, such as the mark of the text's beginning.
        characters_per_token: at most; None if nothing can be proved.
    """

    tokens_per_byte: int | None
    extra_tokens: int
    characters_per_token: int | None

    def is_too_short(self, text: str, min_tokens: int) -> bool:
        """Whether a text certainly has fewer than ``min_tokens`` tokens."""
        if self.tokens_per_byte is None or len(text) * self.tokens_per_byte + self.extra_tokens >= min_tokens:
            return False  # it has at least as many bytes as characters, so most texts are decided here
        num_bytes = len(text) if text.isascii() else len(text.encode())
        return num_bytes * self.tokens_per_byte + self.extra_tokens < min_tokens

    def is_too_long(self, text: str, max_tokens: int) -> bool:
        """Whether a text certainly has more than ``max_tokens`` tokens."""
        return self.characters_per_token is not None and len(text) > max_tokens * self.characters_per_token

    def __str__(self) -> str:
        at_most = "nothing could be proved about texts that are too short"
        at_least = "nothing could be proved about texts that are too long"
        if self.tokens_per_byte is not None:
            at_most = f"a text has at most {self.tokens_per_byte} tokens per byte of UTF-8, and {self.extra_tokens} more"
        if self.characters_per_token is not None:
            at_least = f"a token stands for at most {self.characters_per_token} characters"
        return f"proved from the tokenizer: {at_most}; {at_least}"


def parts(component: dict | None, key: str) -> list[dict]:
    """The steps of a component of a ``tokenizer.json``: itself, or those of a sequence."""
    if component is None:
        return []
    return [step for part in component[key] for step in parts(part, key)] if component["type"] == "Sequence" else [component]


def loses_nothing(description: dict, pieces: set[str], splitting: list[dict]) -> bool:
    """Whether every character of a normalised text ends up in some token: there is a piece for each of the 256 bytes, no step
    removes text, and no added token swallows the blanks around it."""
    byte_level = any(step["type"] == "ByteLevel" for step in splitting)
    needed = ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    model = description["model"]
    falling_back = model["type"] == "BPE" if byte_level else model.get("byte_fallback", False)
    removing = any(step["type"] not in KEEPS_ALL or step.get("behavior") == "Removed" for step in splitting)
    swallowing = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"])
    # without the bytes to fall back on, a run of unknown characters is one token, however long
    return falling_back and pieces.issuperset(needed) and not removing and not swallowing


def length_bounds(tokenizer) -> LengthBounds:
    """What can be proved of a tokenizer about the number of a text's tokens, special tokens of a template not counted.

    Args:
        tokenizer: of transformers. One that normalises in a way unknown here gives no bounds: every text is then tokenised.
    """
    nothing = LengthBounds(None, 0, None)
    description = json.loads(backend_of(tokenizer).to_str())
    vocabulary, added = description["model"]["vocab"], [token["content"] for token in description["added_tokens"]]
    pieces = {piece[0] if isinstance(piece, list) else piece for piece in vocabulary}  # a list has scores beside the pieces
    splitting = parts(description["pre_tokenizer"], "pretokenizers")
    expansion, shrinkage, extra = 1, 1, 0
    for number, step in enumerate(splitting):
        adds_one = step["type"] == "Metaspace" or bool(step.get("add_prefix_space"))
        if adds_one and (number > 0 or step.get("replacement", "Ġ") not in pieces):
            return nothing  # after another step, it adds one to every part of the text
        extra += adds_one
    for step in parts(description["normalizer"], "normalizers"):
        if step["type"] in EXPANSION:
            expansion *= EXPANSION[step["type"]]
            shrinkage *= COMPOSED if step["type"] in ("NFC", "NFKC") else 1
        elif step["type"] == "Prepend" and pieces.issuperset(step["prepend"]):
            extra += len(step["prepend"])
        elif not (step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] in pieces):
            return nothing
    if any(len(token.encode()) <= extra for token in added):  # they part a text, and each part gets the extra tokens
        return nothing
    longest = max(map(len, [*pieces, *added])) * shrinkage if loses_nothing(description, pieces, splitting) else None
    return LengthBounds(expansion, extra, longest)
