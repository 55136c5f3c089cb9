"""Vicuna's prompt format as a chat template, and conversations as token ids with labels for the answers only."""

from itertools import groupby

from longqlora.data.token_files import IGNORED

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


def with_chat_template(tokenizer):
    """Give a tokenizer the chat template for training, in place, and return it.

    A template of its own is kept if it marks the answers with a generation block.
    """
    if "{% generation" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def mask_of_learned(mask: list[int], answers: list[bool]) -> list[int]:
    """The mask of the answers that are learned.

    Args:
        mask: 1 for each token in an answer, 0 for each token between answers.
        answers: whether each answer is learned.

    Raises:
        ValueError: if the mask has another number of answers.
    """
    runs = [(in_answer, len(list(tokens))) for in_answer, tokens in groupby(mask)]
    marked = sum(in_answer for in_answer, _ in runs)
    if marked != len(answers):
        raise ValueError(
            f"the chat template marks {marked} answers of {len(answers)}, so that none can be left out of the loss"
        )
    result, learned = [], iter(answers)
    for in_answer, size in runs:
        result += [int(in_answer and next(learned))] * size
    return result


def tokenize_conversation(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Encode a conversation with the chat template.

    Args:
        tokenizer: of transformers, see :func:`with_chat_template`.
        messages: role (system, user, assistant) and content of each; ``learned: False`` in an answer that is only context.

    Returns:
        Token ids and labels, of equal length. The labels are the ids in the answers that are learned, with the end-of-text
        token of each, and -100 elsewhere.
    """
    answers = [message.get("learned") is not False for message in messages if message["role"] == "assistant"]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    if not all(answers):
        mask = mask_of_learned(mask, answers)
    return ids, [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
