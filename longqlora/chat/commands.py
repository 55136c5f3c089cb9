"""The commands ``chat`` and ``generate``: what the user gives is checked first, and torch is imported after that."""

import logging
import signal
import sys
import warnings
from argparse import Namespace
from typing import TYPE_CHECKING

from longqlora.jobs.log import INTERRUPT, start_garbage_collection

from longqlora.chat.checks import adapter_problems, model_problems
from longqlora.chat.documents import (
    Document,
    chat_prompt,
    count_tokens,
    decode,
    excess,
    read_document,
    truncate,
    truncate_documents,
)

if TYPE_CHECKING:
    from longqlora.chat.chat_model import ChatModel

log = logging.getLogger(__name__)


def chat(options: Namespace) -> None:
    """Talk to a model in the terminal or on a page; see :mod:`longqlora.cli` for the options.

    Raises:
        ValueError, OSError, MemoryError, ImportError: if something that is given cannot be used.
    """
    check_given(options)
    documents = [read_document(path) for path in options.file]
    if options.web:
        from longqlora.chat.web import check_page

        check_page(options.port)
    chat_model = find_model(options, is_chat=True)
    documents = fitting(documents, chat_model, options.truncate)
    load(chat_model, options.seed)
    from longqlora.chat.generation import TextGenerator

    generator = TextGenerator(chat_model, options.max_new_tokens)
    if options.web:
        from longqlora.chat.web import serve

        serve(generator, documents, options.port, is_truncated=options.truncate)
    else:
        from longqlora.chat.terminal import talk

        talk(generator, documents)


def generate(options: Namespace) -> None:
    """Continue a text on the standard output.

    Raises:
        ValueError, OSError, MemoryError: if something that is given cannot be used.
    """
    check_given(options)
    name = options.prompt_file
    prompt = decode(sys.stdin.buffer.read(), "the standard input") if name == "-" else read_document(name).text
    chat_model = find_model(options, is_chat=False)
    context = chat_model.context
    if options.truncate:
        prompt = truncate(prompt, chat_model.tokenizer, max(1, context - options.max_new_tokens - 1))
    ids = chat_model.tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    if too_many := excess(len(ids), context):
        raise ValueError(
            f"{name} has {len(ids):,} tokens: with one that is generated, {too_many:,} more than the model's context of "
            f"{context:,}; --truncate cuts it at the end of a sentence"
        )
    load(chat_model, options.seed)
    from longqlora.chat.generation import TextGenerator
    from longqlora.chat.terminal import continue_text

    continue_text(TextGenerator(chat_model, options.max_new_tokens), ids)


def check_given(options: Namespace) -> None:
    """Check the paths of model and adapter.

    Raises:
        ValueError: if one of them cannot be used.
    """
    for problem in [*model_problems(options.model), *(adapter_problems(options.adapter) if options.adapter else ())]:
        raise ValueError(problem)


def find_model(options: Namespace, *, is_chat: bool) -> "ChatModel":
    """The model without its weights."""
    import transformers

    from longqlora.chat.chat_model import find_chat_model

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # they are for those who write code
    return find_chat_model(
        options.model,
        adapter=options.adapter,
        four_bit=options.four_bit,
        is_chat=is_chat,
        temperature=options.temperature,
    )


def load(chat_model: "ChatModel", seed: int) -> None:
    """Load the weights, and seed the sampling."""
    import torch

    chat_model.load()
    torch.manual_seed(seed)
    start_garbage_collection()
    signal.signal(signal.SIGINT, INTERRUPT)  # until here, Ctrl-C ended the process at once


def fitting(documents: list[Document], chat_model: "ChatModel", is_truncated: bool) -> list[Document]:
    """The documents, cut if that is wanted.

    Raises:
        ValueError: if they do not fit into the context.
    """
    tokenizer, context = chat_model.tokenizer, chat_model.context
    if is_truncated:
        shortened = truncate_documents(documents, tokenizer, context)
        for before, after in zip(documents, shortened, strict=True):
            if before != after:
                kept, all_tokens = count_tokens(tokenizer, after.text), count_tokens(tokenizer, before.text)
                log.warning("%s: the first %s of %s tokens are kept", before.name, f"{kept:,}", f"{all_tokens:,}")
        documents = shortened
    prompt = chat_prompt(tokenizer, documents, [{"role": "user", "content": ""}])
    if documents and (too_many := excess(len(prompt), context)):
        names = " and ".join(document.name for document in documents)
        advice = "" if is_truncated else "; --truncate cuts at the end of a sentence"
        raise ValueError(
            f"{names}: {len(prompt):,} tokens in the chat template, and one for the answer, are {too_many:,} more than the "
            f"model's context of {context:,}{advice}"
        )
    return documents
