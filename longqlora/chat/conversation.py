"""A conversation with a model about documents."""

from collections.abc import Generator
from contextlib import closing

from longqlora.chat.documents import Document, Message, chat_prompt, excess
from longqlora.chat.generation import Progress, TextGenerator


class Conversation:
    """Questions and answers about some documents.

    Args:
        generator: generates the answers.
        documents: precede the first question.

    Attributes:
        messages: role and content of each, in order.
    """

    def __init__(self, generator: TextGenerator, documents: list[Document]) -> None:
        self.generator, self.documents = generator, documents
        self.messages: list[Message] = []

    @property
    def context(self) -> int:
        """Tokens that the model can read and generate in all."""
        return self.generator.chat_model.context

    def ask(self, question: str) -> Generator[Progress | str]:
        """Yield the progress of reading, then the pieces of the answer.

        Question and answer are added to the conversation. If this iterator is closed early, the answer is what was generated
        until then. A question without any answer is not added.

        Raises:
            ValueError: if the conversation with the question does not fit into the context.
            MemoryError: if memory is exhausted.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = chat_prompt(self.generator.chat_model.tokenizer, self.documents, messages)
        if too_many := excess(len(prompt), self.context):
            raise ValueError(self.too_long(len(prompt), too_many))
        answer = ""
        try:
            with closing(self.generator.stream(prompt)) as pieces:
                for piece in pieces:
                    if isinstance(piece, str):
                        piece = piece if answer else piece.lstrip()  # some templates have a space before an answer
                        answer += piece
                    yield piece
        finally:
            if answer or self.generator.statistics.end == "end":
                self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def too_long(self, num_tokens: int, too_many: int) -> str:
        """The message that a prompt does not fit, with what can be done."""
        advice = "shorten the message"
        if self.messages:
            advice += ", or begin a new conversation, which keeps the files"
        elif self.documents:
            advice += " or the files (--truncate cuts them at the end of a sentence)"
        return (
            f"{num_tokens:,} tokens and one for the answer are {too_many:,} more than the model's context of {self.context:,}; "
            f"{advice}"
        )
