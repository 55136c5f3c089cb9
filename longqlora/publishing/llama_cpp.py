"""Reading a GGUF file with llama.cpp: its losses, next-token distributions and tokens.

The package llama-cpp-py-sync (extra ``gguf``) has llama.cpp as a library for CPUs and its C API; the functions that are called
here are described in llama.cpp's ``include/llama.h``.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 512  # of one forward pass, whose float32 logits are in memory
WARNING, CONTINUED = 3, 5  # levels of llama.cpp's log: errors are 4, and 5 goes on with the line before
FFI, LIB = get_ffi(), get_lib()
MESSAGES: list[str] = []  # warnings and errors of llama.cpp since a model was opened


@FFI.callback("void(enum ggml_log_level, const char *, void *)")
def keep_message(level: int, text, _) -> None:
    """Keep the warnings and errors that llama.cpp would write to the terminal."""
    if WARNING <= level < CONTINUED:
        MESSAGES.append(FFI.string(text).decode(errors="replace").strip())


class GgufModel:
    """A GGUF file that llama.cpp has loaded; see :func:`open_gguf`.

    Args:
        model: llama.cpp's handle of it.
    """

    def __init__(self, model):
        self.model = model
        self.vocabulary = LIB.llama_model_get_vocab(model)
        self.vocab_size = LIB.llama_vocab_n_tokens(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the file adds to a prompt, such as a begin token."""
        data = text.encode()
        room = len(data) + 2  # a token has at least one byte
        tokens = FFI.new("llama_token[]", room)
        count = LIB.llama_tokenize(self.vocabulary, data, len(data), tokens, room, True, False)
        return list(tokens[0:count])

    def log_probabilities(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the next-token distributions after the tokens of a text, :data:`TOKENS_PER_BATCH` positions at a time.

        Everything that a server could set is as llama.cpp has it by default: also the cache of keys and values, in float16.

        Args:
            tokens: ``[n]``.

        Yields:
            Log-probabilities, ``[positions, vocabulary]``, float32.

        Raises:
            MemoryError: if there is not enough memory for the cache.
            RuntimeError: if llama.cpp cannot read the tokens.
        """
        params = LIB.llama_context_default_params()
        params.n_ctx = len(tokens)
        params.n_batch = params.n_ubatch = TOKENS_PER_BATCH
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = LIB.llama_init_from_model(self.model, params)
        if context == FFI.NULL:
            raise MemoryError(f"llama.cpp has no memory for {len(tokens)} tokens: {last_message()}")
        try:
            for begin in range(0, len(tokens), TOKENS_PER_BATCH):
                logits = self.logits_of_batch(context, tokens[begin : begin + TOKENS_PER_BATCH].tolist(), begin)
                yield torch.from_numpy(logits).log_softmax(-1)
        finally:
            LIB.llama_free(context)

    def logits_of_batch(self, context, tokens: list[int], begin: int) -> numpy.ndarray:
        """The logits after each token of a batch.

        Args:
            context: of llama.cpp, which has read the tokens before these.
            tokens: to read.
            begin: position of the first one.

        Returns:
            ``[positions, vocabulary]``, float32.
        """
        batch = LIB.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, begin + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if code := LIB.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp cannot read positions {begin} and further (error {code}): {last_message()}")
            size = len(tokens) * self.vocab_size
            logits = FFI.buffer(LIB.llama_get_logits(context), 4 * size)
            return numpy.frombuffer(logits, dtype=numpy.float32).reshape(len(tokens), -1).copy()
        finally:
            LIB.llama_batch_free(batch)


@contextmanager
def open_gguf(path: str) -> Iterator[GgufModel]:
    """Load a GGUF file into the memory of the CPU.

    Raises:
        ValueError: if llama.cpp cannot load it.
    """
    LIB.llama_log_set(keep_message, FFI.NULL)
    MESSAGES.clear()
    params = LIB.llama_model_default_params()
    params.n_gpu_layers = 0
    model = LIB.llama_model_load_from_file(path.encode(), params)
    if model == FFI.NULL:
        raise ValueError(f"{path}: llama.cpp cannot load it: {last_message()}")
    try:
        yield GgufModel(model)
    finally:
        LIB.llama_model_free(model)
        for message in dict.fromkeys(MESSAGES):
            log.info("llama.cpp: %s", message)


def last_message() -> str:
    """What llama.cpp said last."""
    return MESSAGES[-1] if MESSAGES else "no message"
