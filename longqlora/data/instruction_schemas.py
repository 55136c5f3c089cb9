"""Schemas of published instruction records, each converted to conversations.

A schema is one function from a record to a :class:`Conversation`, or to None if the record has no answer. To add a schema,
write the function with the decorator :func:`schema`, and add its name to ``InstructionSchema`` in
:mod:`longqlora.config.settings`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from longqlora.data.readers import Malformed, OnMalformed, normalized_record, raise_malformed, read_records

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
SPEAKERS = {  # what a tool returns is read like a question; a call of a tool is an answer
    "user": ("user", "human", "prompter", "tool", "observation", "function", "tool_response", "function_response", "ipython"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call", "tool_call"),
    "system": ("system", "developer"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
EMPTY: tuple = (None, "", [], {}, "[]", "{}")  # values of a field that says nothing


def text_of(messages: list[dict[str, str]]) -> str:
    """The text of all messages, which training data is checked by."""
    return "\n".join(message["content"] for message in messages)


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, and the documents that they are about, which may be shortened.

    Attributes:
        turns: (question, answer) pairs.
        documents: (begin, end) of each document inside the first question, in characters and in order.
        evidence: passage of a document that the answer is based on; it is kept when the document is shortened.
        system: system message; empty: the chat template's default.
        not_learned: numbers of the turns whose answer is only context for later ones: the loss does not cover it.
    """

    turns: Turns
    documents: tuple[tuple[int, int], ...] = ()
    evidence: str = ""
    system: str = ""
    not_learned: frozenset[int] = frozenset()

    def text(self) -> str:
        """The system message, and all questions and answers."""
        return text_of(self.messages())

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it: role and content of each message, and ``learned: False`` in an answer
        that the loss does not cover."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for number, (question, answer) in enumerate(self.turns):
            mark = {"learned": False} if number in self.not_learned else {}
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **mark}]
        return messages


class Record(dict):
    """A record that notes which of its fields are read, so that the others can be counted; so do the objects in it."""

    def __init__(self, fields: dict):
        super().__init__(fields)
        self.read: set[str] = set()

    def __getitem__(self, name):
        return self.get(name) if name in self else super().__getitem__(name)

    def get(self, name, default=None):
        value = super().get(name, default)
        if name not in self.read and name in self:
            self.read.add(name)
            if isinstance(value, dict):
                self[name] = value = Record(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                self[name] = value = [Record(item) if isinstance(item, dict) else item for item in value]
        return value

    def unread(self) -> set[str]:
        """Names of the fields that say something and were not read, also of those in objects (``messages.name``)."""
        names = set()
        for name, value in self.items():
            if name not in self.read:
                names |= {name} if value not in EMPTY else set()
            else:
                items = value if isinstance(value, list) else [value]
                names |= {f"{name}.{inner}" for item in items if isinstance(item, Record) for inner in item.unread()}
        return names


class Message(NamedTuple):
    """A message of a chat: its role (user, assistant, system), its text, and whether an answer is learned."""

    role: str
    text: str
    learned: bool


def read_message(message: dict) -> Message:
    """Message of an object with ``from`` and ``value``, or ``role`` and ``content``, which may be a list of parts with a text
    each; an answer with ``weight: 0`` (OpenAI) or ``train: false`` (axolotl) is not learned.

    Raises:
        ValueError: if the speaker is unknown, a weight is not 0 or 1, or the content is not a text.
    """
    speaker, content = ("from", "value") if message.get("from") is not None else ("role", "content")
    role, text = ROLES.get(str(message[speaker]).lower()), message[content]
    if role is None:
        raise ValueError(f"the speaker {message[speaker]!r} is none of {', '.join(ROLES)}")
    marks = [message.get("weight"), message.get("train")]
    if odd := [mark for mark in marks if mark not in (None, 0, 1)]:
        raise ValueError(f"the weight of a message is {odd[0]!r}; it can be 0 (not learned) or 1")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str | None):
        raise ValueError(f"what {message[speaker]!r} says is not a text")
    return Message(role, text or "", learned=0 not in marks)


def system_message(record: dict) -> str:
    """Text of the field ``system`` or ``system_prompt``; empty if there is none, or nothing but whitespace.

    Raises:
        ValueError: if it is not a text.
    """
    system = record.get("system") or record.get("system_prompt") or ""
    if not isinstance(system, str):
        raise ValueError("the system message is not a text")
    return system if system.strip() else ""


def read_chat(messages: list[dict], record: dict) -> Conversation | None:
    """Conversation of a list of messages, after a first system message or that of the record; None if no answer is learned.

    Questions in a row, such as the results of several tools, become one. Answers before the first question, and what follows
    the last answer that is learned, are left out.

    Raises:
        ValueError: if a system message is not the first message, or an answer follows another.
    """
    chat = [read_message(message) for message in messages]
    system = chat.pop(0).text if chat and chat[0].role == "system" else ""
    system = system if system.strip() else system_message(record)
    while chat and chat[0].role == "assistant":
        chat.pop(0)
    runs = [(role, list(run)) for role, run in groupby(chat, key=attrgetter("role"))]
    if any(role == "system" for role, _ in runs):
        raise ValueError("a system message is not the first message")
    if any(role == "assistant" and len(run) > 1 for role, run in runs):
        raise ValueError("two answers in a row")
    turns = [
        ("\n\n".join(question.text for question in questions), answer)
        for (_, questions), (_, (answer,)) in zip(runs[::2], runs[1::2], strict=False)
    ]
    learned = [number for number, (_, answer) in enumerate(turns) if answer.learned]
    if turns and not learned:
        return None
    turns = turns[: learned[-1] + 1] if learned else []
    not_learned = frozenset(range(len(turns))).difference(learned)
    return Conversation([(question, answer.text) for question, answer in turns], system=system, not_learned=not_learned)


def after_history(record: dict, question: str, answer: str) -> Conversation:
    """A question and its answer, after the turns in ``history`` (question, answer) and the system message, if there are any.

    Raises:
        ValueError: if ``history`` is something else.
    """
    history = record.get("history") or []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError("history is not a list of questions with their answers")
    return Conversation([*map(tuple, history), (question, answer)], system=system_message(record))


Schema = Callable[[dict], Conversation | None]
AnySchema = TypeVar("AnySchema", bound=Schema)
SCHEMAS: dict[str, Schema] = {}
"""Schemas by name."""


def schema(convert: AnySchema) -> AnySchema:
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
    """instruction, output, and optionally input, which is put after the instruction, history and system: Alpaca and
    Evol-Instruct."""
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return after_history(record, question, record["output"])


@schema
def sharegpt(record: dict) -> Conversation | None:
    """conversations: messages (from, value), and optionally system (ShareGPT); see :func:`read_chat`."""
    return read_chat(record["conversations"], record)


@schema
def messages(record: dict) -> Conversation | None:
    """messages or conversation: messages (role, content), and optionally system; see :func:`read_chat`."""
    return read_chat(record["messages" if "messages" in record else "conversation"], record)


@schema
def human_assistant(record: dict) -> Conversation:
    """conversation: turns (human, assistant), and optionally system: Firefly and MOSS."""
    return Conversation([(turn["human"], turn["assistant"]) for turn in record["conversation"]], system=system_message(record))


@schema
def query_response(record: dict) -> Conversation:
    """query, response, and optionally history and system: ms-swift."""
    return after_history(record, record["query"], record["response"])


@schema
def booksum(record: dict) -> Conversation:
    """chapter, summary_text: BookSum."""
    question = "Summarise the text above."  # part of the training data: another spelling would give other tokens
    return about_document(record["chapter"], [(question, record["summary_text"])])


@schema
def long_alpaca(record: dict) -> Conversation:
    """The fields of alpaca: LongAlpaca. The document is the part of the instruction between "The … begins." and "Now the …
    ends."; there may be two: "The first … begins.", "Now the second … ends."."""
    conversation = alpaca(record)
    question = conversation.turns[0][0]
    found = LONG_ALPACA_PAIR.match(question) or LONG_ALPACA.match(question)
    return replace(conversation, documents=found.regs[1:] if found else ())


@schema
def qmsum(record: dict) -> Conversation:
    """meeting_transcripts (speaker, content), general_query_list, specific_query_list: a turn for each query (QMSum)."""
    transcript = "\n".join(f"{part['speaker']}: {part['content']}" for part in record["meeting_transcripts"])
    queries = record["general_query_list"] + record["specific_query_list"]
    return about_document(transcript, [(query["query"], query["answer"]) for query in queries])


@schema
def input_output(record: dict) -> Conversation:
    """input, output, and optionally history and system: the instruction set that was published with LongQLoRA."""
    return after_history(record, record["input"], record["output"])


def describes(name: str, record: dict) -> bool:
    """Whether a schema converts a record to a conversation."""
    try:
        conversation = SCHEMAS[name](record)
    except SCHEMA_ERRORS:
        return False
    texts = [text for turn in conversation.turns for text in turn] if conversation else []
    return bool(texts) and all(isinstance(text, str) for text in texts)


def schema_error_message(name: str, record: dict, error: Exception, others: list[str]) -> str:
    """Message that says why a record is not of its schema, what it has, and which schemas describe it.

    Args:
        name: of the schema.
        record: as it was read.
        error: of the schema. With a ValueError, a schema says itself what is wrong.
        others: the schemas that describe the record.
    """
    shown = repr(record)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + " …"
    if isinstance(error, ValueError) and not others:
        return f"schema {name!r}: {error}\n  {shown}"
    hint = f"it fits {', '.join(others)}" if others else f"it fits no schema ({', '.join(SCHEMAS)})"
    return (
        f"not a record of schema {name!r} ({type(error).__name__}: {error}); its fields are {', '.join(record)}; {hint}"
        f"\n  {shown}"
    )


def read_conversations(
    path: str,
    schema_name: str,
    on_malformed: OnMalformed = raise_malformed,
    digest=None,
    unused_fields: Counter[str] | None = None,
) -> Iterator[Conversation | None]:
    """Yield the conversation of every record of a file; None for a record without an answer.

    Args:
        path, on_malformed, digest: see :func:`longqlora.data.readers.read_records`; a record that is not of the schema, has an
            empty question or answer, or has a NUL character, is malformed.
        schema_name: a key of ``SCHEMAS``.
        unused_fields: counts the records that have a field which the schema does not read, by name.

    Raises:
        ValueError: if the file begins with a record of another schema; the message shows it.
    """
    of_schema = False
    for line, fields in read_records(path, on_malformed, digest):
        try:
            record = Record(normalized_record(fields))
            conversation = SCHEMAS[schema_name](record)
        except SCHEMA_ERRORS as error:
            others = [other for other in SCHEMAS if describes(other, fields)]
            malformed = Malformed(path, line, schema_error_message(schema_name, fields, error, others))
            if others and not of_schema:
                raise ValueError(str(malformed)) from None
            on_malformed(malformed)
            continue
        of_schema = True
        texts = [text for turn in conversation.turns for text in turn] if conversation else ["no answer"]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            on_malformed(Malformed(path, line, f"schema {schema_name!r} found an empty question or answer"))
        elif conversation and "\0" in conversation.text():
            on_malformed(Malformed(path, line, "NUL character"))
        else:
            if unused_fields is not None:
                unused_fields.update(record.unread())
            yield conversation
