"""The instruction set of supervised fine-tuning: records in their published schemas become conversations, and conversations
become tokens of which only the answers are learned.

A schema is one small adapter: a function from a record to a list of (question, answer) turns. To add one, write the
function and name it in ``ADAPTERS``.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator

import orjson
import pyarrow
import pyarrow.parquet

from longqlora.documents import read_records
from longqlora.sampling import bottom_k, priority

log = logging.getLogger(__name__)

Turns = list[tuple[str, str]]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}"
    "{% else %}{{ '" + VICUNA_SYSTEM.replace("'", "\\'") + "' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
"""Vicuna v1.1's prompt (``SYSTEM USER: … ASSISTANT: …</s>``); the generation block marks what the loss covers."""


def natural_questions(record: dict) -> Turns:
    """document, question, and the answers (the first short one, else the long one)."""
    short = record["short_answers"]
    answer = short[0] if short else record["long_answer"]
    return [(f"{record['document']}\n\nQuestion: {record['question']}", answer)]


def evol_instruct(record: dict) -> Turns:
    """instruction, output; an ``input`` as in Alpaca is put below the instruction."""
    return [("\n\n".join(part for part in (record["instruction"], record.get("input")) if part), record["output"])]


def booksum(record: dict) -> Turns:
    """chapter, summary_text."""
    return [(f"{record['chapter']}\n\nSummarise the text above.", record["summary_text"])]


def long_alpaca(record: dict) -> Turns:
    """instruction (with the text that it is about), output."""
    return [(record["instruction"], record["output"])]


def input_output(record: dict) -> Turns:
    """input, output: the schema of the set published with LongQLoRA."""
    return [(record["input"], record["output"])]


ADAPTERS: dict[str, Callable[[dict], Turns]] = {
    "natural_questions": natural_questions,
    "evol_instruct": evol_instruct,
    "booksum": booksum,
    "long_alpaca": long_alpaca,
    "input_output": input_output,
}


def read_conversations(path: str, schema: str) -> Iterator[Turns]:
    """Yield the turns of every record of a file.

    Raises:
        ValueError: on a record that the schema's adapter does not understand; the message shows file, number and fields.
    """
    for number, record in enumerate(read_records(path), start=1):
        try:
            turns = ADAPTERS[schema](record)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, record {number}: not a record of schema {schema!r} ({error!r}); its fields are {', '.join(record)}"
            ) from None
        if not all(isinstance(text, str) and text.strip() for turn in turns for text in turn):
            raise ValueError(f"{path}, record {number}: schema {schema!r} found an empty question or answer")
        yield turns


def as_messages(turns: Turns) -> list[dict[str, str]]:
    """Turns in the form that chat templates take."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def tokenize_conversation(tokenizer, turns: Turns) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels: the id where an answer (its end-of-text token included) is learned, -100
    elsewhere.

    Args:
        tokenizer: of transformers; its own chat template is used only if it marks the answers with a generation block.
        turns: (question, answer) pairs.
    """
    own = tokenizer.chat_template or ""
    encoded = tokenizer.apply_chat_template(
        as_messages(turns),
        chat_template=own if "{% generation" in own else CHAT_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, learned = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if is_learned else -100 for token, is_learned in zip(ids, learned, strict=True)]


def build_sft_set(*, sources: list[dict], tokenizer, num_records: int, max_tokens: int, seed: int, output: str) -> dict:
    """Sample records of every source to its share and write them as Parquet (source, messages as JSON, num_tokens).

    Args:
        sources: name, schema, paths and share (of ``num_records``) of each.
        tokenizer: counts the tokens of a conversation in the chat template.
        num_records: size of the set.
        max_tokens: records of more tokens are left out, and counted.
        seed: of the sample (bottom-k by hash, see :mod:`longqlora.sampling`).
        output: path of the Parquet file.

    Returns:
        The data card: counts per source.

    Raises:
        ValueError: if a source has too few records for its share; the message says which has how many of how many.
    """
    rows, card, short = [], {}, []
    for source in sources:
        conversations = {}
        for path in source["paths"]:
            for turns in read_conversations(path, source["schema"]):
                conversations[hashlib.blake2b(orjson.dumps(turns), digest_size=16).hexdigest()] = turns
        wanted, too_long, taken = round(num_records * source["share"]), 0, []
        order = bottom_k(((priority(key, seed), key, turns) for key, turns in conversations.items()), len(conversations))
        for _, _, turns in order:
            if len(taken) == wanted:
                break
            num_tokens = len(tokenize_conversation(tokenizer, turns)[0])
            if num_tokens > max_tokens:
                too_long += 1
            else:
                messages = orjson.dumps(as_messages(turns)).decode()
                taken.append({"source": source["name"], "messages": messages, "num_tokens": num_tokens})
        rows.extend(taken)
        card[source["name"]] = {
            "read": len(conversations), "wanted": wanted, "taken": len(taken), "too long before the quota was met": too_long
        }  # fmt: skip
        if len(taken) < wanted:
            short.append(f"{source['name']} has {len(taken)} of {wanted}")
    if short:
        raise ValueError(f"sft.num_records {num_records} of at most {max_tokens} tokens cannot be met: {'; '.join(short)}")
    schema = pyarrow.schema([("source", "string"), ("messages", "string"), ("num_tokens", "int64")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), output)
    return {"records": len(rows), "max_tokens": max_tokens, "seed": seed, "sources": card}


def tokenize_sft(*, records: str, tokenizer, output: str) -> int:
    """Tokenise an instruction set and save it as a dataset on disk (``input_ids``, ``labels``); return how many rows."""
    import datasets

    rows = pyarrow.parquet.read_table(records, columns=["messages"]).column("messages").to_pylist()
    encoded = []
    for row in rows:
        messages = orjson.loads(row)
        turns = [(messages[i]["content"], messages[i + 1]["content"]) for i in range(0, len(messages), 2)]
        ids, labels = tokenize_conversation(tokenizer, turns)
        encoded.append({"input_ids": ids, "labels": labels})
    datasets.Dataset.from_list(encoded).save_to_disk(output)
    return len(encoded)
