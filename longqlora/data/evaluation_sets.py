"""Evaluation sets: from the files in which they are published to token files."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator

import fsspec
import numpy

from longqlora.data.readers import find_files, read_documents
from longqlora.data.token_descriptions import description_path, document_spans, read_description
from longqlora.data.token_files import check_vocabulary, read_tokens, tokenize_documents

log = logging.getLogger(__name__)

CHECKED_TOKENS = 2000  # at the beginning of a stream, decoded and encoded again
MIN_SHARE_RECOVERED = 0.95  # of them, if the tokenizer is the right one; with other tokenizers 54 to 89 % came back in trials
TOKENS_PER_PIECE = 2**18  # decoded at once
TOKENS_OF_OVERLAP = 2**10  # shared by two neighboring pieces: more tokens than n words have


def wrong_tokenizer_warning(tokens: numpy.ndarray, tokenizer) -> str | None:
    """Warning if a token stream was probably made with another tokenizer, which the file format does not record.

    Text that is decoded with the wrong tokenizer and encoded again gives other ids.

    Args:
        tokens: ``[num_tokens]``
        tokenizer: with which the stream should have been made.

    Returns:
        A sentence with the share of ids that come back, the share of unknown tokens, and the beginning of the text; None if
        the tokenizer seems to be right.
    """
    ids = [int(index) for index in tokens[:CHECKED_TOKENS]]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    recovered = sum((Counter(ids) & Counter(again)).values()) / max(len(ids), len(again))
    unknown = sum(index == tokenizer.unk_token_id for index in ids) / len(ids)
    log.info("the text begins with %r", text[:200])
    log.info("encoded again, %.1f %% of the ids come back; %.1f %% are unknown tokens", 100 * recovered, 100 * unknown)
    if recovered >= MIN_SHARE_RECOVERED and unknown < 1 - MIN_SHARE_RECOVERED:
        return None
    return (
        f"the token ids seem to be those of another tokenizer: decoded and encoded again, {recovered:.0%} of the first "
        f"{len(ids)} ids come back, {unknown:.0%} are unknown tokens, and the text begins with {text[:60]!r}"
    )


def fetch_tokens(source: str, tokenizer, output: str) -> dict:
    """Copy a ``.bin`` file from wherever ``fsspec`` finds it, check it, and write its description.

    A local file may have a description, with the type of its ids and the ends of its documents. Without one, the file is read
    like LongLoRA's: one document of uint16 ids.

    Returns:
        The description. It has a ``warning`` if the file was probably made with another tokenizer.

    Raises:
        ValueError: if the file is not a stream of token ids, or holds an id that is not in the tokenizer's vocabulary.
    """
    with fsspec.open(source, "rb", expand=False) as remote, open(output, "wb") as local:
        shutil.copyfileobj(remote, local)
    if description_path(source).is_file():
        shutil.copyfile(description_path(source), description_path(output))
    max_token_id, tokens = check_vocabulary(output, len(tokenizer)), read_tokens(output)
    description = read_description(output) | {
        "vocab_size": len(tokenizer),
        "num_tokens": len(tokens),
        "max_token_id": max_token_id,
    }
    if warning := wrong_tokenizer_warning(tokens, tokenizer):
        description["warning"] = f"{source}: {warning}"
        log.warning("%s", description["warning"])
    description_path(output).write_text(json.dumps(description), encoding="utf-8")
    return description


def read_texts(files: list[str]) -> Iterator[str]:
    """Yield the text of every document in files that :func:`longqlora.data.readers.read_documents` reads."""
    return (document.text for path in files for document in read_documents(path))


def files_of(sources: list[str]) -> list[str]:
    """The files that the paths of an evaluation set name."""
    return [file for path in sources for file in find_files(path)]


def prepare_evaluation_set(sources: list[str], tokenizer, output: str) -> dict:
    """Write an evaluation set as a token file, from one ``.bin`` file of token ids or from texts.

    Args:
        sources: a single ``.bin`` file, or files that :func:`longqlora.data.readers.read_documents` reads; addresses may have
            wildcards.
        tokenizer: of the base model.
        output: path of the ``.bin`` file to write; its description is written next to it.

    Returns:
        The description; it names the ``sources`` on the hub, with the commit that was read.

    Raises:
        ValueError: if a ``.bin`` file is not the only source or was made with another tokenizer, or there is no text.
    """
    files = files_of(sources)
    streams = [path for path in files if path.endswith(".bin")]
    if streams and len(files) > 1:
        raise ValueError(f"{streams[0]}: a .bin file must be the only path of its evaluation set, found {len(files)} paths")
    if streams:
        description = fetch_tokens(streams[0], tokenizer, output)
    else:
        description = tokenize_documents(read_texts(files), tokenizer, output)
    if files != sources:  # on the hub, or matched by wildcards in an address
        description["sources"] = files
        description_path(output).write_text(json.dumps(description), encoding="utf-8")
    return description


def decoded_pieces(path: str, tokenizer) -> Iterator[str]:
    """Yield the text of a token file, document by document; long documents come in pieces that overlap."""
    tokens = read_tokens(path)
    for begin, end in document_spans(read_description(path)["document_ends"]):
        for first in range(begin, end, TOKENS_PER_PIECE):
            piece = tokens[first : min(end, first + TOKENS_PER_PIECE + TOKENS_OF_OVERLAP)]
            yield tokenizer.decode(piece, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def texts_of_evaluation_set(sources: list[str], tokens: str, tokenizer) -> Iterator[str]:
    """The texts of an evaluation set, as training texts are compared with them. Texts are read from the files in which the set
    is published, because a tokenizer may change or lose characters; only a set of token ids is decoded.

    Args:
        sources: see :func:`prepare_evaluation_set`.
        tokens: the ``.bin`` file that :func:`prepare_evaluation_set` made of them; its description is next to it.
        tokenizer: of the base model.
    """
    files = read_description(tokens).get("sources", sources)
    return decoded_pieces(tokens, tokenizer) if files[0].endswith(".bin") else read_texts(files)


def retokenize_evaluation_set(*, tokens: str, tokenizer, new_tokenizer, output: str) -> dict:
    """Decode an evaluation set and encode it with another model's tokenizer, document by document.

    Args:
        tokens: ``.bin`` file of the set; its description is next to it.
        tokenizer: that made the file.
        new_tokenizer: of the other model.
        output: path of the ``.bin`` file to write; its description is written next to it.

    Returns:
        The description.
    """
    stream = read_tokens(tokens)
    documents = (stream[begin:end] for begin, end in document_spans(read_description(tokens)["document_ends"]))
    texts = (tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in documents)
    return tokenize_documents(texts, new_tokenizer, output)
