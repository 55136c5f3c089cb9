"""How many windows the jobs of an experiment read, as far as it is known before the jobs that prepare the data have run."""

from pathlib import Path

from longqlora.config.completed import Experiment, System
from longqlora.config.paths import is_local
from longqlora.config.systems import protocol_at
from longqlora.data.token_descriptions import read_description
from longqlora.evaluation.protocols import make_windows


def evaluation_windows(experiment: Experiment, system: str, eval_length: int) -> float | None:
    """Number of full windows that a cell of perplexity reads of all evaluation sets; None if one has no tokens yet."""
    found = 0.0
    for name, dataset in experiment.evaluation.datasets.items():
        has_own_tokenizer = experiment.systems[system].tokenizer != experiment.tokenizer
        folder = f"{experiment.results}/tokens/evaluation" + (f"/{system}" if has_own_tokenizer else "")
        streams = [
            Path(folder, f"{name}.bin"),
            *(Path(path) for path in dataset.paths if path.endswith(".bin") and is_local(path)),
        ]
        stream = next((path for path in streams if path.is_file()), None)
        if stream is None:
            return None
        windows = make_windows(read_description(stream)["document_ends"], protocol_at(experiment.evaluation, eval_length))
        found += sum(window.num_read for window in windows) / eval_length
    return found


def training_windows(experiment: Experiment, system: System) -> int | None:
    """Number of windows that a training has in an epoch; None if its tokens are not there. For instructions at most as many as
    there are records, of which several may share a window."""
    settings = system.training
    assert settings is not None
    if settings.data == "sft":
        return experiment.sft.num_records - experiment.sft.held_out if experiment.sft else None
    stream = Path(experiment.results, "tokens/corpus.bin")
    if not stream.is_file():
        return None
    return read_description(stream)["document_ends"][-1] // (settings.pose_window or system.target_context or 1)
