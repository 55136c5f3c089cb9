"""Vicuna's prompt as a chat template, and conversations as tokens of which only the answers are learned."""

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
"""Vicuna v1.1's prompt (``SYSTEM USER: … ASSISTANT: …</s>``); the generation block marks what the loss covers."""


def with_chat_template(tokenizer):
    """Give a tokenizer the template that its conversations are trained with, in place; one of its own stays if it marks the
    answers with a generation block."""
    if "{% generation" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenize_conversation(tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels: the id where an answer (its end-of-text token included) is learned, -100
    elsewhere.

    Args:
        tokenizer: of transformers, see :func:`with_chat_template`.
        messages: role (system, user, assistant) and content of each.
    """
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
