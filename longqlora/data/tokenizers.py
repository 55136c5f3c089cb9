"""Loading tokenizers, without torch if a folder names the general class; writing conversations with their chat templates."""

import json
from pathlib import Path
from typing import Any

import transformers  # imports what is used of it, when it is used: AutoTokenizer imports torch
from transformers.utils.chat_template_utils import render_jinja_template

from longqlora.data.hub import split_revision


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer exactly as ``AutoTokenizer`` does.

    ``AutoTokenizer`` imports torch to find the class of a tokenizer. This takes 1.6 s, most of the time of a small job, and is
    not needed if the class is known.

    Args:
        path: directory or hub id, see :mod:`longqlora.data.hub`.

    Raises:
        ValueError: if the tokenizer has no end token, which ends every document and answer.
    """
    loader = transformers.TokenizersBackend if names_general_class(Path(path)) else transformers.AutoTokenizer
    name, revision = split_revision(path)
    tokenizer = loader.from_pretrained(name, revision=revision)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end token; name one as eos_token in its tokenizer_config.json")
    return tokenizer


def names_general_class(folder: Path) -> bool:
    """Whether the files in a folder say that ``AutoTokenizer`` would choose the class that reads all of tokenizer.json.

    Transformers writes this class when it saves a tokenizer trained from scratch. For some types of models, ``AutoTokenizer``
    uses another class than the files name; LLaMA is not one of them.
    """
    tokenizer, model = folder / "tokenizer_config.json", folder / "config.json"
    if not tokenizer.is_file():
        return False
    settings = json.loads(tokenizer.read_text(encoding="utf-8"))
    model_type = json.loads(model.read_text(encoding="utf-8")).get("model_type") if model.is_file() else "llama"
    return settings.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in settings and model_type == "llama"


def render_conversation(
    tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Write a conversation out with a tokenizer's chat template.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: role and content of each.
        add_generation_prompt: add what the template writes before an answer.

    Returns:
        The text, and the begin and end of each generation block in it, in characters.
    """
    rendered: Any = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    (text,), (blocks,) = rendered
    return text, blocks
