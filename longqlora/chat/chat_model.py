"""The model of a conversation, with its tokenizer, its generation settings and its context length."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from longqlora.chat.checks import extension_in, training_card
from longqlora.config.settings import Device, EvaluatedModel, Precision
from longqlora.data.chat_template import with_chat_template
from longqlora.data.tokenizers import load_tokenizer
from longqlora.evaluation.evaluated_model import at_commit, load_evaluated_model
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.compatibility import quantization_problems
from longqlora.modeling.generation_settings import generation_settings, stop_tokens
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import rope_of

LENGTH_DEPENDENT = ("dynamic", "longrope")  # RoPE scalings whose frequencies depend on the length of the sequence


@dataclass
class ChatModel:
    """A model that generates.

    Attributes:
        source: what is loaded, and how.
        tokenizer: of transformers.
        settings: how it generates: stop tokens and sampling.
        context: largest number of tokens of a prompt and its continuation together.
        exact_up_to: largest length of a sequence, in tokens, at which cached keys and values are still right; beyond it, a
            scaling of :data:`LENGTH_DEPENDENT` changes them. None: they are always right.
        model: in evaluation mode, once it is loaded.
    """

    source: EvaluatedModel
    tokenizer: Any
    settings: GenerationConfig
    context: int
    exact_up_to: int | None
    model: Any = None

    def load(self) -> None:
        """Load the weights onto the GPU, or onto the CPU of a machine without one.

        Raises:
            ValueError: if the adapter does not fit the model.
            MemoryError: if the weights do not fit into memory.
        """
        device: Device = "cuda" if torch.cuda.is_available() else "cpu"
        four_bit = self.source.precision == "nf4"
        advice = "A smaller model, or a larger GPU, is needed." if four_bit else "--4bit needs a quarter of the memory."
        try:
            with memory_explained(f"loading {self.source.path}", advice):
                self.model = load_evaluated_model(self.source, device, self.context)
        except RuntimeError as error:
            if self.source.adapter and "size mismatch" in str(error):
                raise ValueError(
                    f"{self.source.adapter} does not fit {self.source.path}: its layers have other sizes"
                ) from None
            raise


def find_chat_model(
    path: str, *, adapter: str | None = None, four_bit: bool = False, is_chat: bool = True, temperature: float | None = None
) -> ChatModel:
    """Load everything of a model but its weights: configuration, tokenizer and generation settings.

    Args:
        path: directory or hub id, see :func:`longqlora.chat.checks.model_problems`.
        adapter: folder of an adapter, put on the model without merging. The context is extended as it was in training.
        four_bit: whether to quantize the weights to NF4.
        is_chat: whether a chat template is needed.
        temperature: of sampling; 0 always takes the most likely token; None: as the model's generation settings say.

    Raises:
        ValueError: if the context cannot be extended, the weights are stored quantized and ``four_bit`` is set, or there is no
            chat template.
    """
    card = training_card(adapter, path) if adapter else None
    precision: Precision = "nf4" if four_bit else "auto"
    extension = extension_in(card) if card else None
    given = EvaluatedModel(path=path, adapter=adapter, extension=extension, precision=precision, group_ratio=1.0)
    source = at_commit(given)
    config = load_config(source.path, source.extension)
    if any(quantization_problems(config.to_dict(), trained=False, precision=precision)):
        raise ValueError(f"{path}: its weights are stored quantized already; leave out --4bit")
    tokenizer, rope = chat_tokenizer(source.path, card, is_chat), rope_of(config)
    depends = rope["rope_scaling"] in LENGTH_DEPENDENT
    return ChatModel(
        source=source,
        tokenizer=tokenizer,
        settings=settings_for(source.path, tokenizer, temperature),
        context=rope["target_context"],
        exact_up_to=round(rope["target_context"] / rope["rope_factor"]) if depends else None,
    )


def settings_for(path: str, tokenizer, temperature: float | None) -> GenerationConfig:
    """The model's generation settings, without a length, with its stop tokens."""
    settings = generation_settings(path)
    settings.max_length = None
    settings.eos_token_id = stop_tokens(path, tokenizer)
    if settings.pad_token_id is None:
        settings.pad_token_id = settings.eos_token_id[0]
    if temperature is not None:
        settings.do_sample, settings.temperature = temperature > 0, temperature or None
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
    return settings


def chat_tokenizer(path: str, card: dict | None, is_chat: bool):
    """The tokenizer of a model; after a training on conversations, with the chat template of that training.

    Raises:
        ValueError: if a chat template is needed, and there is none.
    """
    tokenizer = load_tokenizer(path)
    if card and card["settings"]["data"] == "sft":
        return with_chat_template(tokenizer)
    if is_chat and not tokenizer.chat_template:
        raise ValueError(
            f"{path} has no chat template, so it is a base model, which continues texts: "
            f"longqlora generate {path} --prompt-file FILE"
        )
    return tokenizer
