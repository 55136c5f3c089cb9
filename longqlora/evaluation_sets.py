"""Evaluation sets from wherever they are published into the project's format."""

import json
import shutil

import fsspec

from longqlora.documents import read_documents
from longqlora.tokens import check_vocabulary, description_path, read_tokens, tokenize_documents


def fetch_tokens(source: str, tokenizer, output: str) -> dict:
    """Copy a ``.bin`` file from wherever ``fsspec`` finds it, with a description, and check it against the tokenizer.

    Raises:
        ValueError: if it is no stream of uint16 ids, or holds an id that the tokenizer does not have.
    """
    with fsspec.open(source, "rb") as remote, open(output, "wb") as local:
        shutil.copyfileobj(remote, local)
    num_tokens = len(read_tokens(output))
    description = {"dtype": "uint16", "vocab_size": len(tokenizer), "num_tokens": num_tokens, "document_ends": [num_tokens]}
    check_vocabulary(output, len(tokenizer))
    description_path(output).write_text(json.dumps(description))
    return description


def prepare_evaluation_set(sources: list[str], tokenizer, output: str) -> dict:
    """Bring an evaluation set into the project's format: one ``.bin`` of token ids, or texts to tokenise.

    Args:
        sources: a single ``.bin`` file, or files of :func:`longqlora.documents.read_documents`.
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
    ends = json.loads(description_path(tokens).read_text())["document_ends"]
    documents = (stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    texts = (tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in documents)
    return tokenize_documents(texts, new_tokenizer, output)
