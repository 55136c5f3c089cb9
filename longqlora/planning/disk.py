"""Disk space that an experiment takes, from the model's ``config.json`` and the settings alone."""

from longqlora.config.completed import Experiment
from longqlora.config.settings import TrainingSettings
from longqlora.planning.work import shape_of, stored_bytes, trained_weights

KEPT_CHECKPOINTS = 2  # longqlora.training.trainer, which imports torch; a test compares them

# Bytes for a token, beside the two or four of the id of a text's token. An instruction's token has its id and its label. The
# texts of the demo, SmolLM2's corpus and the paper's two sets at their real size (benchmarks/RESULTS.md) take 1.2 to 1.7 times
# as much as ids of two bytes.
TEXT_BYTES, INSTRUCTION_BYTES, INSTRUCTION_TEXT_BYTES = 3, 8, 1.7


def system_bytes(model: dict, settings: TrainingSettings) -> dict[str, int]:
    """Disk space of a trained system.

    Args:
        model: the base model's ``config.json``.
        settings: of the training.

    Returns:
        Bytes by kind: ``model`` (weights and published model, which share the files) and ``adapter`` remain after the run;
        ``checkpoints`` (as many as are kept) and ``merging`` (the merge that is not chosen) only exist during it.

    Raises:
        ValueError: if the file lacks a size of the model.
    """
    shape = shape_of(model)
    trained, weights = trained_weights(shape, settings), stored_bytes(shape)
    state = 2 if settings.optimizer == "paged_adamw_8bit" else 8  # Adam's two averages, by weight
    return {
        "model": weights,
        "adapter": 0 if settings.method == "full" else 4 * trained,
        "checkpoints": KEPT_CHECKPOINTS * (4 + state) * trained,
        "merging": weights if settings.method == "qlora" else 0,
    }


def most_data_bytes(experiment: Experiment, vocab_size: int) -> int:
    """Disk space of the texts and tokens that an experiment is trained on, if each text has as many tokens as it may have.

    Args:
        experiment: with everything filled in.
        vocab_size: of the tokenizer.
    """
    corpus, sft = experiment.corpus, experiment.sft
    return data_bytes(
        corpus.num_texts * corpus.max_tokens if corpus else 0, sft.num_records * sft.max_tokens if sft else 0, vocab_size
    )


def data_bytes(corpus_tokens: int, sft_tokens: int, vocab_size: int) -> int:
    """Disk space of texts and their tokens.

    Args:
        corpus_tokens: of the sampled texts.
        sft_tokens: of the instruction set.
        vocab_size: of the tokenizer.
    """
    token = 2 if vocab_size <= 2**16 else 4
    return round((token + TEXT_BYTES) * corpus_tokens + (INSTRUCTION_BYTES + INSTRUCTION_TEXT_BYTES) * sft_tokens)
