"""The folder of a published model: weights, tokenizer, generation settings and model card.

A step of its own after training and merging, so that a change of the model card or the chat template repeats neither.
"""

import json
import os
import shutil
from pathlib import Path

from transformers import GenerationConfig

from longqlora.data.chat_template import plain_template, with_chat_template
from longqlora.data.tokenizers import load_tokenizer
from longqlora.modeling.generation_settings import generation_settings, stop_tokens
from longqlora.modeling.model_files import weight_files
from longqlora.publishing.model_card import Stage, model_card
from longqlora.publishing.served_config import served_config


def publish_model(*, weights: str, output: str, base_model: str, tokenizer: str, stages: list[Stage]) -> None:
    """Write the folder of a published model.

    Args:
        weights: folder of the trained or merged weights and their configuration.
        output: folder to write to.
        base_model: directory or hub id of the base that was trained first, which gives the generation settings.
        tokenizer: directory or hub id of the tokenizer of the training data.
        stages: the trainings that made the model, in their order.
    """
    folder, last = Path(output), stages[-1]
    target_context = last.card["target_context"]
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(weights) / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(served_config(config), indent=2) + "\n", encoding="utf-8")
    files = weight_files(Path(weights))
    for file in [*files, *Path(weights).glob("*.safetensors.index.json")]:
        link_or_copy(file, folder / file.name)
    trained_tokenizer = load_tokenizer(tokenizer)
    if any(stage.card["settings"]["data"] == "sft" for stage in stages):
        with_chat_template(trained_tokenizer)
    settings = generation_config(base_model, target_context, stop_tokens(base_model, trained_tokenizer))
    settings.to_json_file(folder / "generation_config.json")  # save_pretrained refuses some settings of published models
    save_tokenizer(trained_tokenizer, output, target_context)
    if last.report:
        (folder / "merge_report.json").write_text(json.dumps(last.report, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(model_card(stages), encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, which takes no disk space; copy the file if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def generation_config(base_model: str, target_context: int, stop: list[int]) -> GenerationConfig:
    """The base's generation settings at the new context length, stopping at the tokens ``stop``."""
    config = generation_settings(base_model)
    config.eos_token_id = stop if len(stop) > 1 else stop[0]
    config._from_model_config = None  # transformers 4 would replace settings that come from config.json by those in it
    if config.max_length and config.max_length > 20:  # the old context length; 20 is the default of transformers
        config.max_length = target_context
    if {config.temperature, config.top_p} - {None, 1.0}:
        config.do_sample = True  # some published models leave it out, but without it these values have no effect
    return config


def save_tokenizer(tokenizer, output: str, target_context: int) -> None:
    """Write the tokenizer of a model with a longer context, with its chat template in standard Jinja."""
    tokenizer.model_max_length = target_context
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        tokenizer.chat_template = {name: plain_template(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = plain_template(template)
    tokenizer.save_pretrained(output)
