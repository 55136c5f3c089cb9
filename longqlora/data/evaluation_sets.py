"""Evaluation sets from wherever they are published into the project's format."""

import json
import logging
import shutil
from collections import Counter

import fsspec
import numpy

from longqlora.data.readers import read_documents
from longqlora.data.token_descriptions import description_path, read_description
from longqlora.data.token_files import check_vocabulary, read_tokens, tokenize_documents

log = logging.getLogger(__name__)

HEAD_TOKENS = 2000  # of a stream, that are decoded and encoded again
SAME_TOKENIZER = 0.95  # of them that come back at least; those of another tokenizer came back by 54 to 89 % in trials


def foreign_tokens_warning(tokens: numpy.ndarray, tokenizer) -> str | None:
    """Whether a stream looks as if another tokenizer had made it, which the format cannot tell: text that is decoded with the
    wrong pieces is encoded to other ids than it was decoded from.

    Args:
        tokens: ``[num_tokens]``
        tokenizer: that ought to have made them.

    Returns:
        A sentence with the share of ids that come back, that of unknown ones, and the text's beginning; None if all is well.
    """
    ids = [int(index) for index in tokens[:HEAD_TOKENS]]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    came_back = sum((Counter(ids) & Counter(again)).values()) / max(len(ids), len(again))
    unknown = sum(index == tokenizer.unk_token_id for index in ids) / len(ids)
    log.info("it begins with %r; %.1f %% of the ids come back, %.1f %% are unknown", text[:200], 100 * came_back, 100 * unknown)
    if came_back >= SAME_TOKENIZER and unknown < 1 - SAME_TOKENIZER:
        return None
    return (
        f"the ids seem to be those of another tokenizer: decoded and encoded again, {came_back:.0%} of the first {len(ids)} "
        f"come back, {unknown:.0%} are unknown, and the text begins with {text[:60]!r}"
    )


def fetch_tokens(source: str, tokenizer, output: str) -> dict:
    """Copy a ``.bin`` file from wherever ``fsspec`` finds it, with a description, and check it against the tokenizer; what
    looks wrong but may be right is a ``warning`` in the description.

    Raises:
        ValueError: if it is no stream of uint16 ids, or holds an id that the tokenizer does not have.
    """
    with fsspec.open(source, "rb") as remote, open(output, "wb") as local:
        shutil.copyfileobj(remote, local)
    tokens = read_tokens(output)
    num_tokens = len(tokens)
    description = {"dtype": "uint16", "vocab_size": len(tokenizer), "num_tokens": num_tokens, "document_ends": [num_tokens]}
    check_vocabulary(output, len(tokenizer))
    if warning := foreign_tokens_warning(tokens, tokenizer):
        description["warning"] = f"{source}: {warning}"
        log.warning("%s", description["warning"])
    description_path(output).write_text(json.dumps(description))
    return description


def prepare_evaluation_set(sources: list[str], tokenizer, output: str) -> dict:
    """Bring an evaluation set into the project's format: one ``.bin`` of token ids, or texts to tokenise.

    Args:
        sources: a single ``.bin`` file, or files of :func:`longqlora.data.readers.read_documents`.
        tokenizer: of the base model.
        output: path of the ``.bin`` to write, its description beside it.

    Raises:
        ValueError: if a ``.bin`` stands beside other files, was made with another tokenizer, or there is no text.
    """
    streams = [path for path in sources if path.endswith(".bin")]
    if streams and len(sources) > 1:
        raise ValueError(f"{streams[0]}: a .bin file must be the only path of its evaluation set, found {len(sources)} paths")
    if streams:
        return fetch_tokens(streams[0], tokenizer, output)
    return tokenize_documents((document.text for path in sources for document in read_documents(path)), tokenizer, output)


def retokenize(*, tokens: str, tokenizer, new_tokenizer, output: str) -> dict:
    """Encode an evaluation set anew with the tokenizer of another model, document for document.

    Args:
        tokens: ``.bin`` file of the set, its description beside it.
        tokenizer: that it was encoded with.
        new_tokenizer: of the other model.
        output: path of the ``.bin`` to write, its description beside it.
    """
    stream = read_tokens(tokens)
    ends = read_description(tokens)["document_ends"]
    documents = (stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    texts = (tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in documents)
    return tokenize_documents(texts, new_tokenizer, output)
