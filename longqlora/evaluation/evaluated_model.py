"""A model as a system is evaluated: which weights, how precise, how its context is extended and how it attends."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.loading import load_config, load_model
from longqlora.modeling.rope import context_of


@dataclass(frozen=True)
class EvaluatedModel:
    """What is loaded, and how.

    Attributes:
        path: directory or hub id.
        adapter: folder of an adapter in peft's format, put on the model and not merged; None: there is none.
        target_context: extend the context to so many tokens; None: it is as it is.
        rope_scaling: how, see :func:`longqlora.modeling.rope.extend_context`.
        precision: see :func:`longqlora.modeling.loading.load_model`.
        attention: ``full``, or ``shifted_sparse`` at inference as well.
        group_ratio: of the shifted sparse attention.
    """

    path: str
    adapter: str | None = None
    target_context: int | None = None
    rope_scaling: str = "linear"
    precision: str = "auto"
    attention: str = "full"
    group_ratio: float = 0.25

    def config(self):
        """Its configuration, the context extended."""
        return load_config(self.path, self.target_context, self.rope_scaling)

    def check_window(self, window: int) -> bool:
        """Whether ``window`` tokens are within its context, or its positions adapt to any length.

        Raises:
            ValueError: if it cannot read so many tokens at all.
        """
        config = self.config()
        if window > getattr(config, "max_seq_len", window):  # ALiBi models make a bias of so many tokens
            raise ValueError(
                f"{self.path}: a window of {window} tokens is beyond the {config.max_seq_len} that the model takes"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        return window <= context_of(config) or rope.get("rope_type") == "dynamic"

    def memory_advice(self, window: int) -> tuple[str, str]:
        """What its evaluation was doing when memory was exhausted, and which settings to change, as
        :func:`longqlora.jobs.memory.memory_explained` takes them."""
        return (
            f"reading {window} tokens at once with {self.path} in precision {self.precision}",
            "A smaller evaluation.precision (nf4 takes least), or shorter evaluation.lengths.",
        )

    def load(self, device: torch.device, window: int) -> PreTrainedModel:
        """Load it in evaluation mode, to read ``window`` tokens at once; an adapter's layers stand in the model's places."""
        attention = None  # what transformers chooses: sdpa, where the model has it, which MPT has not
        if self.attention == "shifted_sparse":
            attention = register_shifted_sparse_attention(self.group_ratio, window, in_evaluation=True)
        model = load_model(
            self.path,
            device=device,
            precision=self.precision,
            target_context=self.target_context,
            rope_scaling=self.rope_scaling,
            attn_implementation=attention,
        )
        if self.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter).base_model.model
        return model.eval()
