"""Vicuna's prompt format as a chat template, and conversations as token ids with labels for the answers only."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

from tokenizers import AddedToken, Tokenizer

from longqlora.data.token_files import IGNORED, backend_of
from longqlora.data.tokenizers import render_conversation

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{% if bos_token is defined %}{{ bos_token }}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}"
    "{% else %}{{ '" + VICUNA_SYSTEM.replace("'", "\\'") + "' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
"""Vicuna v1.1's prompt format (``SYSTEM USER: … ASSISTANT: …</s>``); the generation block marks what the loss covers."""
GENERATION_TAG = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
TAG_AS_COMMENT = re.compile(r"\{#([-+]?)\s*((?:end)?generation)\s*([-+]?)#\}")


def with_chat_template(tokenizer):
    """Give a tokenizer the chat template for training, in place, and return it.

    A template of its own is kept if it marks the answers with a generation block, also one that :func:`plain_template` has
    turned into comments.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    template = TAG_AS_COMMENT.sub(r"{%\1 \2 \3%}", template or "")
    tokenizer.chat_template = template if GENERATION_TAG.search(template) else CHAT_TEMPLATE
    return tokenizer


def plain_template(template: str) -> str:
    """A chat template in standard Jinja, which writes the same text: only transformers knows the tag ``generation``.

    The tags become comments, which remove the same whitespace around them.
    """
    return GENERATION_TAG.sub(r"{#\1 \2 \3#}", template)


def end_of_answer(tokenizer) -> int | None:
    """The token that the chat template writes after an answer; None if it marks no answers, or writes no such token."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not GENERATION_TAG.search(template):
        return None
    answer = "answer-without-special-tokens"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text, _ = render_conversation(tokenizer, messages)
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    found = any_of(tuple(ids)).search(text.rpartition(answer)[2])
    return ids[found[0]] if found else None


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens of a tokenizer, where those that a chat template writes are tokens and those in a message are text.

    Each special token is replaced by other characters: by ``in_message`` before the template writes the conversation, by
    ``in_template`` afterwards. Replacements are as long as the token, so that positions in the text stay.

    Attributes:
        backend: a copy of the tokenizer's, in which the replacements in the template are tokens, and special tokens are text.
        ids: of the special token by the id of its replacement in the template.
        in_message, in_template: the replacement by special token.
    """

    backend: Tokenizer
    ids: dict[int | None, int]
    in_message: dict[str, str]
    in_template: dict[str, str]

    def hide(self, messages: list[dict]) -> list[dict]:
        """Messages for the template, with the replacements of special tokens that they spell out."""
        return [message | {"content": replace_all(message["content"], self.in_message)} for message in messages]

    def restore(self, text: str) -> str:
        """What the template wrote, for the backend."""
        return replace_all(replace_all(text, self.in_template), {hidden: token for token, hidden in self.in_message.items()})


def replace_all(text: str, replacements: dict[str, str]) -> str:
    """Replace several strings, the longest first."""
    return any_of(tuple(replacements)).sub(lambda found: replacements[found[0]], text)


@lru_cache(maxsize=4)
def any_of(strings: tuple[str, ...]) -> re.Pattern:
    """A pattern that matches any of the strings, the longest first; without strings, it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")


@lru_cache(maxsize=1)
def control_tokens(tokenizer) -> ControlTokens:
    """The special tokens of a tokenizer.

    Raises:
        ValueError: if it is a slow tokenizer, implemented in Python.
    """
    control = ControlTokens(Tokenizer.from_str(backend_of(tokenizer).to_str()), {}, {}, {})
    control.backend.no_truncation()
    control.backend.no_padding()
    control.backend.encode_special_tokens = True
    special = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number, (id_, token) in enumerate(special.items()):
        rest = "\ufdd0" * (len(token.content) - 1)  # no character, and so in no text; the first one is for private use
        control.in_message[token.content] = chr(0xF0000 + number) + rest
        control.in_template[token.content] = known = chr(0x100000 + number) + rest
        control.backend.add_tokens([AddedToken(known, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)])
        control.ids[control.backend.token_to_id(known)] = id_
    return control


def learned_blocks(blocks: list[tuple[int, int]], answers: list[bool]) -> list[tuple[int, int]]:
    """The generation blocks of the answers that are learned.

    Args:
        blocks: begin and end of each, in characters.
        answers: whether each answer is learned.

    Raises:
        ValueError: if an answer is not learned, and the template has not one block for each answer.
    """
    if all(answers):
        return blocks
    if len(blocks) != len(answers):
        raise ValueError(
            f"the chat template marks {len(blocks)} answers of {len(answers)}, so that none can be left out of the loss"
        )
    return [block for block, is_learned in zip(blocks, answers, strict=True) if is_learned]


def tokenize_conversations(
    tokenizer, conversations: Iterable[list[dict]], *, add_generation_prompt: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Encode conversations with the chat template, together on all cores. Special tokens that a message spells out are encoded
    as text.

    Args:
        tokenizer: of transformers, see :func:`with_chat_template`.
        conversations: of each, its messages: role (system, user, assistant) and content; ``learned: False`` in an answer that
            is only context.
        add_generation_prompt: add what the template writes before an answer.

    Returns:
        Token ids and labels of each, of equal length. The labels are the ids in the answers that are learned, with the
        end-of-text token of each, and -100 elsewhere.
    """
    control, texts, learned = control_tokens(tokenizer), [], []
    for messages in conversations:
        hidden = control.hide(messages)
        text, blocks = render_conversation(tokenizer, hidden, add_generation_prompt=add_generation_prompt)
        answers = [message.get("learned") is not False for message in messages if message["role"] == "assistant"]
        texts.append(control.restore(text))
        learned.append(learned_blocks(blocks, answers))
    encoded = []
    for encoding, blocks in zip(control.backend.encode_batch(texts, add_special_tokens=False), learned, strict=True):
        ids, offsets = [control.ids.get(token, token) for token in encoding.ids], encoding.offsets
        labels = [IGNORED] * len(ids)
        for begin, end in blocks:  # a token is learned if any of its characters is in the block
            first = bisect_right(offsets, begin, key=itemgetter(1))
            last = bisect_left(offsets, end, key=itemgetter(0))
            labels[first:last] = ids[first:last]
        encoded.append((ids, labels))
    return encoded


def tokenize_conversation(
    tokenizer, messages: list[dict], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation, see :func:`tokenize_conversations`."""
    (encoded,) = tokenize_conversations(tokenizer, [messages], add_generation_prompt=add_generation_prompt)
    return encoded


def count_conversation_tokens(tokenizer, conversations: Iterable[list[dict]]) -> list[int]:
    """Number of tokens of each conversation in the chat template; takes less time than :func:`tokenize_conversations`."""
    control = control_tokens(tokenizer)
    texts = [control.restore(render_conversation(tokenizer, control.hide(messages))[0]) for messages in conversations]
    return [len(encoding) for encoding in control.backend.encode_batch_fast(texts, add_special_tokens=False)]


def tokenize_question(tokenizer, before: str, after: str, answer_prefix: str) -> tuple[list[int], list[int]]:
    """Encode a question with the chat template, and the begin of its answer, which a model continues. Special tokens that are
    spelled out in either are encoded as text.

    Args:
        tokenizer: of transformers, with a chat template.
        before, after: parts of the question; between them lies a text whose token ids are known.
        answer_prefix: how the answer begins.

    Returns:
        The token ids before that text, and those after it.

    Raises:
        ValueError: if the template does not write all parts.
    """
    control, between = control_tokens(tokenizer), "\ufdd1"  # no character, and so in no text
    messages = [{"role": "user", "content": before + between + after}, {"role": "assistant", "content": answer_prefix}]
    messages = control.hide(messages)
    head, found, rest = tokenizer.apply_chat_template(messages, tokenize=False).partition(between)
    tail, begun, _ = rest.rpartition(messages[1]["content"])
    if not (found and begun):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} does not write a question and the begin of its answer; "
            "retrieval.chat_template: false asks in plain text"
        )
    encoded = control.backend.encode_batch([control.restore(text) for text in (head, tail + begun)], add_special_tokens=False)
    begin, end = ([control.ids.get(token, token) for token in encoding.ids] for encoding in encoded)
    return begin, end
