"""Merging an adapter into its base, so that the result loads with stock transformers and no code of this project."""

import logging

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from longqlora.chat_template import with_chat_template
from longqlora.models import load_config

log = logging.getLogger(__name__)


def merge_adapter(*, base_model: str, adapter: str, output: str, context_length: int, is_chat_model: bool) -> None:
    """Add the adapter's low-rank products to the base's weights, in the precision that the base is stored in.

    The folder gets the model with its rope scaling and generation configuration, and the tokenizer with its new length.

    Args:
        base_model: directory or hub id that the adapter was trained on.
        adapter: folder of the adapter, in peft's format.
        output: folder of the merged model.
        context_length: target context in tokens, as trained.
        is_chat_model: whether it was trained on conversations; their chat template then goes with the tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(base_model, config=load_config(base_model, context_length), dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.model_max_length = context_length
    if is_chat_model:
        with_chat_template(tokenizer)
    tokenizer.save_pretrained(output)
    log.info("merged %s into %s: context %d tokens, %s", adapter, base_model, context_length, merged.dtype)
