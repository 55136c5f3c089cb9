"""A tiny chat model."""

from conftest import CHATML, save_base
from transformers import AutoTokenizer


def save_chat_model(folder, tokenizer, **fields) -> str:
    """A model with a chat template and 512 tokens of context, unless the fields say otherwise."""
    save_base(folder, tokenizer, **{"max_position_embeddings": 512, "initializer_range": 0.2} | fields)
    chat = AutoTokenizer.from_pretrained(folder)
    chat.chat_template = CHATML
    chat.save_pretrained(folder)
    return str(folder)
