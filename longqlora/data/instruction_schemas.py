"""Schemas of published instruction records, each converted to conversations.

A schema is one function from a record to a :class:`Conversation`, or to None if the record has no answer. To add a schema,
write the function with the decorator :func:`schema`, and add its name to ``InstructionSchema`` in
:mod:`longqlora.config.settings`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longqlora.data.readers import Malformed, OnMalformed, raise_malformed, read_records

Turns = list[tuple[str, str]]  # (question, answer)
SCHEMA_ERRORS = (KeyError, TypeError, IndexError, AttributeError, ValueError)  # of a schema, on a record of another one
SHOWN_CHARACTERS = 400  # of a record in an error message

HTML_TAG = re.compile(r"\s*(?:<[^<>\s]+>\s*)+")  # a tag of Natural Questions has no blanks, so "1 < 2 and 3 > 2" has none
LONG_ALPACA = re.compile(r"(?:[^\n]*?\s*The \w+ begins\.\s*|[^\n]*\n)(.*?)\s*Now the \w+ ends\.", re.DOTALL)
LONG_ALPACA_PAIR = re.compile(
    r"[^\n]*?\s*The first \w+ begins\.\s*(.*?)\s*(?:Now the first \w+ ends\.(?:\s*The second \w+ begins\.)?|"
    r"The second \w+ begins\.)\s*(.*?)\s*Now the second \w+ ends\.",
    re.DOTALL,
)
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, and the documents that they are about, which may be shortened.

    Attributes:
        turns: (question, answer) pairs.
        documents: (begin, end) of each document inside the first question, in characters and in order.
        evidence: passage of a document that the answer is based on; it is kept when the document is shortened.
        system: system message; empty: the chat template's default.
    """

    turns: Turns
    documents: tuple[tuple[int, int], ...] = ()
    evidence: str = ""
    system: str = ""

    def text(self) -> str:
        """All questions and answers."""
        return "\n".join(text for turn in self.turns for text in turn)

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it: role and content of each message."""
        roles = ("user", "assistant")
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": r, "content": text} for turn in self.turns for r, text in zip(roles, turn, strict=True)]


Schema = Callable[[dict], Conversation | None]
SCHEMAS: dict[str, Schema] = {}
"""Schemas by name."""


def schema(convert: Schema) -> Schema:
    """Decorator that makes a function a schema, under the function's name."""
    SCHEMAS[convert.__name__] = convert
    return convert


def about_document(document: str, turns: Turns, evidence: str = "") -> Conversation:
    """Conversation about a document, which is put before the first question."""
    (question, answer), *others = turns
    return Conversation([(f"{document}\n\n{question}", answer), *others], ((0, len(document)),), evidence)


@schema
def natural_questions(record: dict) -> Conversation | None:
    """document, question, short_answers, long_answer. The answer is the first short answer, or else the long one."""
    short, long = record["short_answers"], record["long_answer"]
    answer = short[0] if short else long
    if not answer:
        return None
    return about_document(record["document"], [(f"Question: {record['question']}", answer)], evidence=long or answer)


@schema
def natural_questions_simplified(record: dict) -> Conversation | None:
    """document_text, question_text, annotations: Google's simplified release, where answers are spans of words."""
    words, annotation = record["document_text"].split(" "), record["annotations"][0]

    def text_of(span: dict) -> str:
        return HTML_TAG.sub(" ", " ".join(words[span["start_token"] : span["end_token"]])).strip()

    long = text_of(annotation["long_answer"]) if annotation["long_answer"]["start_token"] >= 0 else ""
    yes_no = {"YES": "Yes", "NO": "No"}.get(annotation["yes_no_answer"], "")
    answer = ", ".join(map(text_of, annotation["short_answers"])) or yes_no or long
    document = HTML_TAG.sub(" ", record["document_text"]).strip()
    return about_document(document, [(f"Question: {record['question_text']}", answer)], evidence=long) if answer else None


@schema
def natural_questions_hub(record: dict) -> Conversation | None:
    """document.tokens, question.text, annotations: the release on the Hugging Face hub, where lists of objects are objects of
    lists."""
    tokens, annotations = record["document"]["tokens"], record["annotations"]
    words = [("" if is_html else word) for word, is_html in zip(tokens["token"], tokens["is_html"], strict=True)]

    def text_of(begin: int, end: int) -> str:
        return " ".join(filter(None, words[begin:end]))

    span = annotations["long_answer"][0]
    long = text_of(span["start_token"], span["end_token"]) if span["start_token"] >= 0 else ""
    yes_no = {1: "Yes", 0: "No"}.get(annotations["yes_no_answer"][0], "")
    answer = ", ".join(annotations["short_answers"][0]["text"]) or yes_no or long
    question = f"Question: {record['question']['text']}"
    return about_document(text_of(0, len(words)), [(question, answer)], evidence=long) if answer else None


@schema
def l_eval(record: dict) -> Conversation:
    """input (a long document), instructions, outputs: a turn for each instruction (L-Eval)."""
    return about_document(record["input"], list(zip(record["instructions"], record["outputs"], strict=True)))


@schema
def lost_in_the_middle(record: dict) -> Conversation:
    """question, answers, ctxs (title and text of each passage): Lost in the Middle."""
    passages = [f"Document [{i}](Title: {part['title']}) {part['text']}" for i, part in enumerate(record["ctxs"], start=1)]
    answer = record["answers"][0]
    return about_document("\n\n".join(passages), [(f"Question: {record['question']}", answer)], evidence=answer)


@schema
def alpaca(record: dict) -> Conversation:
    """instruction, output, and optionally input, which is put after the instruction: Alpaca and Evol-Instruct."""
    return Conversation(
        [("\n\n".join(part for part in (record["instruction"], record.get("input")) if part), record["output"])]
    )


@schema
def sharegpt(record: dict) -> Conversation:
    """conversations: alternating messages (from, value), optionally after a system message (ShareGPT).

    Answers before the first question, and a last question without an answer, are left out.
    """
    messages = [(SPEAKERS[message["from"]], message["value"]) for message in record["conversations"]]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    while messages and messages[0][0] == "assistant":
        messages.pop(0)
    if [role for role, _ in messages] != (["user", "assistant"] * len(messages))[: len(messages)]:
        raise TypeError("the speakers do not alternate")
    questions, answers = messages[::2], messages[1::2]
    turns = [(question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=False)]
    return Conversation(turns, system=system)


@schema
def booksum(record: dict) -> Conversation:
    """chapter, summary_text: BookSum."""
    question = "Summarise the text above."  # part of the training data: another spelling would give other tokens
    return about_document(record["chapter"], [(question, record["summary_text"])])


@schema
def long_alpaca(record: dict) -> Conversation:
    """instruction, output: LongAlpaca. The document is the part of the instruction between "The … begins." and "Now the …
    ends."; there may be two: "The first … begins.", "Now the second … ends."."""
    question = record["instruction"]
    found = LONG_ALPACA_PAIR.match(question) or LONG_ALPACA.match(question)
    return Conversation([(question, record["output"])], found.regs[1:] if found else ())


@schema
def qmsum(record: dict) -> Conversation:
    """meeting_transcripts (speaker, content), general_query_list, specific_query_list: a turn for each query (QMSum)."""
    transcript = "\n".join(f"{part['speaker']}: {part['content']}" for part in record["meeting_transcripts"])
    queries = record["general_query_list"] + record["specific_query_list"]
    return about_document(transcript, [(query["query"], query["answer"]) for query in queries])


@schema
def input_output(record: dict) -> Conversation:
    """input, output: the instruction set that was published with LongQLoRA."""
    return Conversation([(record["input"], record["output"])])


def describes(name: str, record: dict) -> bool:
    """Whether a schema converts a record to a conversation."""
    try:
        return SCHEMAS[name](record) is not None
    except SCHEMA_ERRORS:
        return False


def schema_error_message(place: str, name: str, record: dict, error: Exception) -> str:
    """Message that says which record is not of its schema, what it has, and which schemas describe it."""
    others = [other for other in SCHEMAS if describes(other, record)]
    hint = f"it fits {', '.join(others)}" if others else f"it fits no schema ({', '.join(SCHEMAS)})"
    shown = repr(record)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + " …"
    return (
        f"{place}: not a record of schema {name!r} ({type(error).__name__}: {error}); its fields are {', '.join(record)}; "
        f"{hint}\n  {shown}"
    )


def read_conversations(
    path: str, schema_name: str, on_malformed: OnMalformed = raise_malformed, digest=None
) -> Iterator[Conversation | None]:
    """Yield the conversation of every record of a file; None for a record without an answer.

    Args:
        path, on_malformed, digest: see :func:`longqlora.data.readers.read_records`; a record with an empty question or answer,
            or with a NUL character, is malformed.
        schema_name: a key of ``SCHEMAS``.

    Raises:
        ValueError: on a record of another schema; the message shows it.
    """
    for line, record in read_records(path, on_malformed, digest):
        try:
            conversation = SCHEMAS[schema_name](record)
        except SCHEMA_ERRORS as error:
            raise ValueError(schema_error_message(f"{path}, record {line}", schema_name, record, error)) from None
        texts = [text for turn in conversation.turns for text in turn] if conversation else ["no answer"]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            on_malformed(Malformed(path, line, f"schema {schema_name!r} found an empty question or answer"))
        elif any("\0" in text for text in texts):
            on_malformed(Malformed(path, line, "NUL character"))
        else:
            yield conversation
