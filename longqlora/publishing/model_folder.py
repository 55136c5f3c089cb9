"""The model folder that anybody can load: weights with their tokenizer, generation settings and model card.

Apart from training and merging, so that another model card or chat template costs neither.
"""

import json
import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from longqlora.data.chat_template import with_chat_template
from longqlora.modeling.model_files import weight_files
from longqlora.publishing.model_card import model_card


def publish_model(
    *, weights: str, output: str, base_model: str, tokenizer: str, label: str, card: dict, report: dict | None
) -> None:
    """Write the folder of a trained model.

    Args:
        weights: folder of its weights and configuration.
        output: folder to write.
        base_model: directory or hub id that it was trained from, whose generation settings it gets.
        tokenizer: directory or hub id of the tokenizer that its data were prepared with.
        label: of the system.
        card: the training card, see :func:`longqlora.training.train.train`.
        report: of the merge, see :func:`longqlora.publishing.merge_report.merge_adapter`; None where all weights were trained.
    """
    folder, target_context = Path(output), card["target_context"]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(weights) / "config.json", folder)
    files = weight_files(Path(weights))
    for file in [*files, *Path(weights).glob("*.safetensors.index.json")]:
        link_or_copy(file, folder / file.name)
    generation_config(base_model, target_context).save_pretrained(folder)
    save_tokenizer(tokenizer, output, target_context=target_context, is_chat_model=card["settings"]["data"] == "sft")
    if report:
        (folder / "merge_report.json").write_text(json.dumps(report, indent=2))
    (folder / "README.md").write_text(model_card(label, card, report), encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a large file a second name, so that it takes no further space; copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def generation_config(base_model: str, target_context: int) -> GenerationConfig:
    """The base's generation settings at the new context length; empty where it has none."""
    try:
        config = GenerationConfig.from_pretrained(base_model)
    except OSError:
        return GenerationConfig()
    if config.max_length and config.max_length > 20:  # a limit to the old context; 20 is the library's default
        config.max_length = target_context
    if {config.temperature, config.top_p} - {None, 1.0}:
        config.do_sample = True  # some published models leave it out, and transformers refuses to save that
    return config


def save_tokenizer(path: str, output: str, *, target_context: int, is_chat_model: bool) -> None:
    """Write a tokenizer beside a model of a longer context, with the chat template that the model was trained on, if any."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = target_context
    if is_chat_model:
        with_chat_template(tokenizer)
    tokenizer.save_pretrained(output)
