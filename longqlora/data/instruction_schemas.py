"""Instruction records in the schemas that they are published in, as conversations.

A schema is one small adapter: a function from a record to a :class:`Conversation`, or to None where the record holds no
answer. To add one, write the function and name it in ``ADAPTERS``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longqlora.data.readers import Malformed, read_records, refuse

Turns = list[tuple[str, str]]
NOT_UNDERSTOOD = (
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    ValueError,
)  # what an adapter raises on a record of another schema
SHOWN_CHARACTERS = 400  # of a record in an error

HTML_TAG = re.compile(r"\s*(?:<[^<>\s]+>\s*)+")  # one word each in Natural Questions; "1 < 2 and 3 > 2" holds none
LONG_ALPACA = re.compile(r"([^\n]*?\s*The \w+ begins\.\s*|[^\n]*\n)(.*?)(\s*Now the \w+ ends\..*)", re.DOTALL)
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, and the part of them that may be shortened.

    Attributes:
        turns: (question, answer) pairs.
        document: (begin, end) of the document inside the first question, in characters; None if there is none.
        evidence: words of the document that the answer rests on; they stay when the document is cut.
        system: message before the first question; empty for the chat template's own.
    """

    turns: Turns
    document: tuple[int, int] | None = None
    evidence: str = ""
    system: str = ""

    def text(self) -> str:
        """All that is said in it."""
        return "\n".join(text for turn in self.turns for text in turn)

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the form that chat templates take."""
        roles = ("user", "assistant")
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": r, "content": text} for turn in self.turns for r, text in zip(roles, turn, strict=True)]


def about(document: str, turns: Turns, evidence: str = "") -> Conversation:
    """A conversation about a document that stands above the first question."""
    (question, answer), *others = turns
    return Conversation([(f"{document}\n\n{question}", answer), *others], (0, len(document)), evidence)


def natural_questions(record: dict) -> Conversation | None:
    """document, question, short_answers, long_answer; the first short answer, else the long one."""
    short, long = record["short_answers"], record["long_answer"]
    answer = short[0] if short else long
    return about(record["document"], [(f"Question: {record['question']}", answer)], evidence=long or answer) if answer else None


def natural_questions_simplified(record: dict) -> Conversation | None:
    """document_text, question_text, annotations: Google's simplified release, with answers as spans of the document's words."""
    words, annotation = record["document_text"].split(" "), record["annotations"][0]

    def text_of(span: dict) -> str:
        return HTML_TAG.sub(" ", " ".join(words[span["start_token"] : span["end_token"]])).strip()

    long = text_of(annotation["long_answer"]) if annotation["long_answer"]["start_token"] >= 0 else ""
    yes_no = {"YES": "Yes", "NO": "No"}.get(annotation["yes_no_answer"], "")
    answer = ", ".join(map(text_of, annotation["short_answers"])) or yes_no or long
    document = HTML_TAG.sub(" ", record["document_text"]).strip()
    return about(document, [(f"Question: {record['question_text']}", answer)], evidence=long) if answer else None


def natural_questions_hub(record: dict) -> Conversation | None:
    """document.tokens, question.text, annotations: the release on the hub, a struct of lists for each list of structs."""
    tokens, annotations = record["document"]["tokens"], record["annotations"]
    words = [("" if is_html else word) for word, is_html in zip(tokens["token"], tokens["is_html"], strict=True)]

    def text_of(begin: int, end: int) -> str:
        return " ".join(filter(None, words[begin:end]))

    span = annotations["long_answer"][0]
    long = text_of(span["start_token"], span["end_token"]) if span["start_token"] >= 0 else ""
    yes_no = {1: "Yes", 0: "No"}.get(annotations["yes_no_answer"][0], "")
    answer = ", ".join(annotations["short_answers"][0]["text"]) or yes_no or long
    question = f"Question: {record['question']['text']}"
    return about(text_of(0, len(words)), [(question, answer)], evidence=long) if answer else None


def l_eval(record: dict) -> Conversation:
    """input (a long document), instructions and outputs: one turn each."""
    return about(record["input"], list(zip(record["instructions"], record["outputs"], strict=True)))


def lost_in_the_middle(record: dict) -> Conversation:
    """question, answers, ctxs (title and text of each passage)."""
    passages = [f"Document [{i}](Title: {part['title']}) {part['text']}" for i, part in enumerate(record["ctxs"], start=1)]
    answer = record["answers"][0]
    return about("\n\n".join(passages), [(f"Question: {record['question']}", answer)], evidence=answer)


def alpaca(record: dict) -> Conversation:
    """instruction, output, and an ``input`` that is put below the instruction: Alpaca and Evol-Instruct."""
    return Conversation(
        [("\n\n".join(part for part in (record["instruction"], record.get("input")) if part), record["output"])]
    )


def sharegpt(record: dict) -> Conversation:
    """conversations: messages (from, value) that alternate, after a system message or none. Answers before the first question
    and a last question without an answer are left out."""
    messages = [(SPEAKERS[message["from"]], message["value"]) for message in record["conversations"]]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    while messages and messages[0][0] == "assistant":
        messages.pop(0)
    if [role for role, _ in messages] != (["user", "assistant"] * len(messages))[: len(messages)]:
        raise TypeError("the speakers do not alternate")
    questions, answers = messages[::2], messages[1::2]
    turns = [(question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=False)]
    return Conversation(turns, system=system)


def booksum(record: dict) -> Conversation:
    """chapter, summary_text."""
    return about(record["chapter"], [("Summarise the text above.", record["summary_text"])])


def long_alpaca(record: dict) -> Conversation:
    """instruction, with the text that it is about between "The … begins." and "Now the … ends.", and output."""
    instruction, parts = record["instruction"], LONG_ALPACA.fullmatch(record["instruction"])
    return Conversation([(instruction, record["output"])], parts.span(2) if parts else None)


def qmsum(record: dict) -> Conversation:
    """meeting_transcripts (speaker and content of each), general_query_list and specific_query_list: one turn a query."""
    transcript = "\n".join(f"{part['speaker']}: {part['content']}" for part in record["meeting_transcripts"])
    queries = record["general_query_list"] + record["specific_query_list"]
    return about(transcript, [(query["query"], query["answer"]) for query in queries])


def input_output(record: dict) -> Conversation:
    """input, output: the schema of the set published with LongQLoRA."""
    return Conversation([(record["input"], record["output"])])


ADAPTERS: dict[str, Callable[[dict], Conversation | None]] = {
    "natural_questions": natural_questions,
    "natural_questions_hub": natural_questions_hub,
    "natural_questions_simplified": natural_questions_simplified,
    "l_eval": l_eval,
    "lost_in_the_middle": lost_in_the_middle,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "booksum": booksum,
    "long_alpaca": long_alpaca,
    "qmsum": qmsum,
    "input_output": input_output,
}


def understands(schema: str, record: dict) -> bool:
    """Whether a schema's adapter makes a conversation of a record."""
    try:
        return ADAPTERS[schema](record) is not None
    except NOT_UNDERSTOOD:
        return False


def not_understood(place: str, schema: str, record: dict, error: Exception) -> str:
    """Which record a schema does not describe, what it holds, and which schemas would do."""
    others = [name for name in ADAPTERS if understands(name, record)]
    hint = f"it reads as {', '.join(others)}" if others else f"no schema describes it ({', '.join(ADAPTERS)})"
    shown = repr(record)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + " …"
    return (
        f"{place}: not a record of schema {schema!r} ({type(error).__name__}: {error}); its fields are {', '.join(record)}; "
        f"{hint}\n  {shown}"
    )


def read_conversations(
    path: str, schema: str, reject: Callable[[Malformed], None] = refuse, digest=None
) -> Iterator[Conversation | None]:
    """Yield what the adapter of a schema makes of every record of a file.

    Args:
        path, reject, digest: see :func:`longqlora.data.readers.read_records`; a record with an empty question or answer is
            malformed.
        schema: key of ``ADAPTERS``.

    Raises:
        ValueError: on a record that the adapter does not understand; the message shows it.
    """
    for line, record in read_records(path, reject, digest):
        try:
            conversation = ADAPTERS[schema](record)
        except NOT_UNDERSTOOD as error:
            raise ValueError(not_understood(f"{path}, record {line}", schema, record, error)) from None
        texts = [text for turn in conversation.turns for text in turn] if conversation else ["no answer"]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            reject(Malformed(path, line, f"schema {schema!r} found an empty question or answer"))
        elif any("\0" in text for text in texts):
            reject(Malformed(path, line, "NUL character"))
        else:
            yield conversation
