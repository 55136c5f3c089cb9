"""The generation settings of a model, and the tokens at which it stops after training."""

from transformers import GenerationConfig

from longqlora.data.chat_template import end_of_answer
from longqlora.data.hub import split_revision


def generation_settings(path: str) -> GenerationConfig:
    """The generation settings of a model, as transformers loads them: from generation_config.json, else from config.json.

    Args:
        path: directory or hub id, see :mod:`longqlora.data.hub`.
    """
    name, revision = split_revision(path)
    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        return settings_of_config(path)


def settings_of_config(path: str) -> GenerationConfig:
    """The generation settings in the config.json of a model."""
    name, revision = split_revision(path)
    return GenerationConfig.from_pretrained(name, revision=revision, config_file_name="config.json", _from_model_config=True)


def stop_tokens(base_model: str, tokenizer) -> list[int]:
    """The tokens at which a trained model stops: those that training put after answers and texts, and those of its base.

    Args:
        base_model: directory or hub id, see :mod:`longqlora.data.hub`.
        tokenizer: of the training data; for a chat model with the chat template for training.
    """
    of_base = generation_settings(base_model).eos_token_id
    if of_base is None:
        of_base = settings_of_config(base_model).eos_token_id
    if not isinstance(of_base, list):
        of_base = [of_base]
    # another tokenizer than the base's may have an ordinary token under that id
    known = [token for token in of_base if token in tokenizer.added_tokens_decoder]
    found = dict.fromkeys([end_of_answer(tokenizer), tokenizer.eos_token_id, *known])
    return [token for token in found if token is not None]
