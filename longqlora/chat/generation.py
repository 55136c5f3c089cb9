"""Generating text piece by piece, with a cache of keys and values that is kept from one prompt to the next.

Keys and values of a token depend only on the tokens before it. The cache of the last sequence is therefore right for the tokens
at the beginning of the next prompt that are the same: a long document is read once, and each further turn of a conversation
reads only what is new. A dynamic RoPE scaling is the exception: beyond the original context, the frequencies of all positions
change with the length, so there each prompt is read anew.
"""

import time
from collections.abc import Callable, Generator
from copy import copy
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal, NamedTuple

import torch
from transformers import DynamicCache, TextStreamer

from longqlora.chat.chat_model import ChatModel
from longqlora.jobs.memory import memory_explained

SMALLEST_CHUNK, LARGEST_CHUNK = 128, 4096  # tokens that are read at once
CHUNK_SECONDS = 1.0  # chunks grow while they take less: between two of them, reading can be stopped and its progress is shown

End = Literal["end", "length", "context", "stopped"]


class Progress(NamedTuple):
    """How much of a prompt is read, in tokens."""

    read: int
    prompt: int


@dataclass
class Statistics:
    """What one generation took.

    Attributes:
        prompt: tokens of the prompt.
        cached: tokens of the prompt whose keys and values were in the cache.
        generated: new tokens.
        reading_seconds, generating_seconds: until the first new token, and from then on.
        end: why it ended: at a stop token, after the largest number of tokens, at the end of the context, or stopped.
    """

    prompt: int
    cached: int = 0
    generated: int = 0
    reading_seconds: float = 0.0
    generating_seconds: float = 0.0
    end: End = "stopped"


class Pieces(TextStreamer):
    """Passes on the text of new tokens as soon as it is decoded."""

    def __init__(self, tokenizer, pass_on: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pass_on = pass_on

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pass_on(text)


class TextGenerator:
    """Generates with a model, one prompt after another.

    Args:
        chat_model: the model, with its generation settings.
        max_new_tokens: largest number of tokens of an answer.

    Attributes:
        statistics: of the last generation.
    """

    def __init__(self, chat_model: ChatModel, max_new_tokens: int) -> None:
        self.chat_model, self.max_new_tokens = chat_model, max_new_tokens
        self.statistics = Statistics(0)
        self.cache: Any = None
        self.cached: list[int] = []  # the tokens whose keys and values are in the cache
        self.thread: Thread | None = None

    def stream(self, prompt: list[int]) -> Generator[Progress | str]:
        """Yield the progress of reading a prompt, then the pieces of the text that continues it.

        The model works in a thread of its own. It stops when this iterator is closed; what it has read stays in the cache.

        Args:
            prompt: token ids, fewer than the context has.

        Raises:
            MemoryError: if memory is exhausted.
        """
        self.statistics = Statistics(len(prompt))
        pieces: SimpleQueue[Any] = SimpleQueue()
        stop = Event()
        self.thread = thread = Thread(target=self.work, args=(prompt, pieces.put, stop), daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()
            thread.join()

    def is_working(self) -> bool:
        """Whether the model is still working, because waiting for it to stop was interrupted."""
        return self.thread is not None and self.thread.is_alive()

    def work(self, prompt: list[int], pass_on: Callable[[Any], None], stop: Event) -> None:
        """Read and generate; pass on progress, text, an error if there is one, and None at the end."""
        what = f"reading {len(prompt)} tokens with {self.chat_model.source.path}"
        try:
            with memory_explained(what, "--4bit leaves more memory for them; --truncate, or a shorter text, needs less."):
                self.keep_common_beginning(prompt)
                self.statistics.cached, started = len(self.cached), time.monotonic()
                self.read(prompt, pass_on, stop)
                if not stop.is_set():
                    self.generate(prompt, pass_on, stop, started)
        except BaseException as error:
            self.cache, self.cached = None, []  # some layers may have read more than others
            pass_on(error)
        finally:
            pass_on(None)

    def keep_common_beginning(self, prompt: list[int]) -> None:
        """Shorten the cache to the tokens that the prompt begins with; its last token is always read, to predict the next."""
        pairs = enumerate(zip(self.cached, prompt[:-1], strict=False))
        same = next((index for index, (old, new) in pairs if old != new), min(len(self.cached), len(prompt) - 1))
        if self.is_read_anew(prompt):
            same = 0
            rotary: Any = self.chat_model.model.base_model.rotary_emb
            rotary.max_seq_len_cached = rotary.original_max_seq_len  # else it keeps the frequencies of a longer prompt
        if same and same < len(self.cached):
            if self.cache.is_croppable:
                self.cache.crop(same - len(self.cached))
            else:  # a sliding window, which has forgotten what lies before it
                same = 0
        if not same:
            self.cache = DynamicCache(config=self.chat_model.model.config)
        self.cached = self.cached[:same]

    def is_read_anew(self, prompt: list[int]) -> bool:
        """Whether a prompt must be read as a whole, because the frequencies of its positions depend on its length."""
        exact_up_to = self.chat_model.exact_up_to
        return exact_up_to is not None and len(prompt) > exact_up_to

    @torch.inference_mode()
    def read(self, prompt: list[int], pass_on: Callable[[Any], None], stop: Event) -> None:
        """Read all tokens of a prompt but the last into the cache, in chunks."""
        if self.is_read_anew(prompt):  # at once, when the first token is generated
            return
        model, size = self.chat_model.model, SMALLEST_CHUNK
        while len(self.cached) < len(prompt) - 1 and not stop.is_set():
            pass_on(Progress(len(self.cached), len(prompt)))
            started, chunk = time.monotonic(), prompt[len(self.cached) : len(prompt) - 1][:size]
            model.base_model(input_ids=torch.tensor([chunk], device=model.device), cache=self.cache, use_cache=True)
            self.cached += chunk
            if time.monotonic() - started < CHUNK_SECONDS:
                size = min(2 * size, LARGEST_CHUNK)

    @torch.inference_mode()
    def generate(self, prompt: list[int], pass_on: Callable[[Any], None], stop: Event, started: float) -> None:
        """Continue a prompt, and complete the statistics."""
        model: Any = self.chat_model.model
        statistics, first = self.statistics, None
        settings = copy(self.chat_model.settings)
        settings.max_new_tokens = min(self.max_new_tokens, self.chat_model.context - len(prompt))

        def should_stop(ids: torch.Tensor, *_, **__) -> torch.Tensor:  # [1, n] -> [1], called after each token
            nonlocal first
            now = time.monotonic()
            first = first or now
            statistics.generated = ids.shape[1] - len(prompt)
            statistics.reading_seconds, statistics.generating_seconds = first - started, now - first
            return torch.tensor([stop.is_set()], device=ids.device)

        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            cache=self.cache,
            stopping_criteria=[should_stop],
            streamer=Pieces(self.chat_model.tokenizer, pass_on),
        )[0].tolist()
        self.cached = output[: self.cache.get_seq_length()]
        if output[-1] in settings.eos_token_id:
            statistics.end = "end"
        elif not stop.is_set():
            statistics.end = "context" if len(output) == self.chat_model.context else "length"
