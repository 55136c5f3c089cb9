"""Conversation in a terminal, or with a script by standard input and output: only answers go to the standard output."""

import os
import re
import sys
from collections.abc import Generator
from contextlib import closing
from typing import NoReturn, TextIO

from longqlora.chat.conversation import Conversation
from longqlora.chat.documents import Document, count_tokens, decode
from longqlora.chat.generation import Progress, Statistics, TextGenerator

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and newline
ENDS = {
    "end": "",
    "length": "cut off by --max-new-tokens",
    "context": "cut off at the end of the context",
    "stopped": "stopped",
}
QUOTES = '"""'  # begin and end a message of several lines


class Screen:
    """Where a conversation is shown: answers on the standard output, everything else on the standard error.

    Colors and progress are for terminals only; ``NO_COLOR`` switches colors off (https://no-color.org).
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out, self.err = out, err
        self.has_colors = err.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def note(self, text: str) -> None:
        """Show a line that is no answer."""
        print(f"\033[2m{text}\033[0m" if self.has_colors else text, file=self.err, flush=True)

    def show(self, piece: Progress | str) -> None:
        """Show the progress of reading, or a piece of an answer."""
        if isinstance(piece, str):
            self.out.write(CONTROL.sub("", piece) if self.out.isatty() else piece)
            self.out.flush()
        elif self.err.isatty():
            print(f"\r{progress(piece)}", end="", file=self.err, flush=True)

    def clear_progress(self) -> None:
        """Remove the progress of reading."""
        if self.err.isatty():
            print("\r\033[K", end="", file=self.err, flush=True)

    def stream(self, pieces: Generator[Progress | str]) -> None:
        """Show what is generated, and close the generator, also after Ctrl-C."""
        is_reading = False
        try:
            with closing(pieces):
                for piece in pieces:
                    if is_reading and isinstance(piece, str):
                        self.clear_progress()
                    is_reading = isinstance(piece, Progress)
                    self.show(piece)
        finally:
            if is_reading:
                self.clear_progress()
            else:
                print(file=self.out, flush=True)


def talk(generator: TextGenerator, documents: list[Document]) -> None:
    """Talk to a model until the user leaves; without a terminal, the whole standard input is one message.

    Raises:
        ValueError, MemoryError: if the standard input cannot be answered.
    """
    screen, conversation = Screen(sys.stdout, sys.stderr), Conversation(generator, documents)
    if not sys.stdin.isatty():
        question = decode(sys.stdin.buffer.read(), "the standard input")
        show_until_interrupted(screen, generator, conversation.ask(question))
        return
    let_lines_be_edited()
    introduce(screen, conversation)
    try:
        answer_until_left(screen, conversation)
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        leave()


def answer_until_left(screen: Screen, conversation: Conversation) -> None:
    """Read messages and show the answers. Ctrl-C stops an answer, a second one leaves."""
    generator, is_interrupted = conversation.generator, False
    while True:
        try:
            question = read_message(screen)
            is_interrupted = False
            if question == "/clear":
                conversation.messages = []
                screen.note("A new conversation" + (", with the same files." if conversation.documents else "."))
            elif question:
                answer(screen, conversation, question)
        except EOFError:
            screen.note("")
            return
        except KeyboardInterrupt:
            if is_interrupted or generator.is_working():
                leave()
            is_interrupted = True
            screen.note("\nCtrl-C again leaves.")


def answer(screen: Screen, conversation: Conversation, question: str) -> None:
    """Show the answer to a question, or why there is none."""
    try:
        screen.stream(conversation.ask(question))
    except (ValueError, MemoryError) as error:
        screen.note(str(error))
    else:
        screen.note(account(conversation.generator.statistics, conversation.context))


def continue_text(generator: TextGenerator, prompt: list[int]) -> None:
    """Show the continuation of a text, given as token ids."""
    show_until_interrupted(Screen(sys.stdout, sys.stderr), generator, generator.stream(prompt))


def show_until_interrupted(screen: Screen, generator: TextGenerator, pieces: Generator[Progress | str]) -> None:
    """Show what is generated, then its statistics. Ctrl-C ends the process."""
    try:
        screen.stream(pieces)
    except KeyboardInterrupt:
        screen.note(account(generator.statistics, generator.chat_model.context))
        leave()
    screen.note(account(generator.statistics, generator.chat_model.context))


def leave() -> NoReturn:
    """End the process as Ctrl-C does, without waiting for a model that is still reading."""
    sys.stdout.flush()
    print(file=sys.stderr, flush=True)
    os._exit(130)


def let_lines_be_edited() -> None:
    """Let the user edit a message and go back to earlier ones. A text of several lines that is pasted is one message."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off


def introduce(screen: Screen, conversation: Conversation) -> None:
    """Say what the user talks to, and how."""
    chat_model = conversation.generator.chat_model
    files = "".join(
        f"; {document.name}: {count_tokens(chat_model.tokenizer, document.text):,}" for document in conversation.documents
    )
    screen.note(f"{chat_model.source.path}: a context of {conversation.context:,} tokens{files}")
    screen.note(
        "Ctrl-C stops an answer, a second one leaves. /clear begins a new conversation. "
        f"A message of several lines can be pasted, or typed between {QUOTES} and {QUOTES}."
    )


def read_message(screen: Screen) -> str:
    """Read a message from the terminal: a line, lines that were pasted, or lines between quotes."""
    text = ask_line(screen, "> ").strip()
    if text.startswith(QUOTES):
        while len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES):
            text += "\n" + ask_line(screen, ". ")
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip()
    return text


def ask_line(screen: Screen, prompt: str) -> str:
    """Read a line; the prompt does not go into a file that the answers are written to."""
    if screen.out.isatty():
        return input(prompt)
    print(prompt, end="", file=screen.err, flush=True)
    return input()


def progress(piece: Progress) -> str:
    """How much of a prompt is read."""
    return f"reading: {piece.read:,} of {piece.prompt:,} tokens"


def account(statistics: Statistics, context: int) -> str:
    """A line with the tokens of the context that are used and left, and what an answer took."""
    if not statistics.generated:
        return "[stopped while reading]"
    used = statistics.prompt + statistics.generated
    parts = [
        f"{used:,} of {context:,} tokens used, {context - used:,} left",
        f"read {statistics.prompt - statistics.cached:,} in {statistics.reading_seconds:.1f} s"
        + (f" ({statistics.cached:,} were in the cache)" if statistics.cached else ""),
        f"wrote {statistics.generated:,} in {statistics.generating_seconds:.1f} s",
        ENDS[statistics.end],
    ]
    return f"[{'; '.join(filter(None, parts))}]"
