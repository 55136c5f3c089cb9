"""Checks of an experiment against this machine, before any job starts: its files, its models, its token ids.

Imports nothing heavy: the workflow asks on every start.
"""

import difflib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longqlora.config.completed import Experiment, System
from longqlora.config.paths import is_local, is_made_here
from longqlora.config.systems import extension_of
from longqlora.data.file_formats import file_format
from longqlora.data.hub import is_hub_id
from longqlora.data.token_descriptions import largest_token
from longqlora.evaluation.retrieval_tasks import PASSAGE_TOKENS
from longqlora.jobs.digests import FileFacts
from longqlora.modeling.compatibility import ROPE_FAMILIES, extension_problems, quantization_problems
from longqlora.modeling.model_files import (
    TOKENIZER_SETTINGS,
    check_safetensors,
    is_lfs_pointer,
    lacks_end_token,
    largest_text_token,
    original_of,
    tokenizer_files,
    weight_files,
)
from longqlora.modeling.rope import LARGER_THETA, context_in, scaling_problems
from longqlora.modeling.scaling_candidates import candidates, choice_problems
from longqlora.publishing.gguf import DYNAMIC

SIZES = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size",
    "sliding_window", "original_max_position_embeddings",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
ROPE_NUMBERS = ("factor", "rope_theta", "original_max_position_embeddings")


def check_inputs(experiment: Experiment) -> Iterator[str]:
    """Yield a line for each mistake."""
    yield from check_paths(experiment)
    yield from check_own_tasks(experiment)
    yield from check_retrieval_lengths(experiment)
    broken = set()
    for key, path in first_keys(experiment, "model").items():
        for problem in model_problems(experiment, path):
            broken.add(path)
            yield f"{key}: {problem}"
    for key, path in first_keys(experiment, "tokenizer").items():
        if path not in broken:
            yield from (f"{key}: {problem}" for problem in tokenizer_problems(experiment, path))
    for name, system in experiment.systems.items():
        config = model_config(experiment, system.model)
        if config and system.model not in broken:
            for problem in fit_problems(config, system, original_of(Path(system.model))):
                yield f"{experiment.key_of(name)}: {system.model}: {problem}"
            if name in experiment.untrained and system.target_context == context_in(config):
                yield f"untrained_rows: {system.target_context} is the base model's own context, which needs no extension"
    yield from check_evaluator(experiment)
    yield from check_served_models(experiment)
    yield from check_vocabularies(experiment)
    config = model_config(experiment, experiment.base_model)
    if config and config.get("vocab_size"):
        yield from check_token_files(experiment, config["vocab_size"])


# --- files of texts --------------------------------------------------------------------------------------------------------


def paths_of(experiment: Experiment) -> dict[str, list[str]]:
    """Every list of data files, by its key."""
    corpus = experiment.corpus.sources if experiment.corpus else []
    sft = experiment.sft.sources if experiment.sft else []
    pretraining = {"pretraining.paths": experiment.pretraining.paths} if experiment.pretraining else {}
    return pretraining | {
        **{f"corpus.sources[{number}].paths": source.paths for number, source in enumerate(corpus)},
        **{f"sft.sources[{number}].paths": source.paths for number, source in enumerate(sft)},
        **{f"evaluation.datasets.{name}.paths": dataset.paths for name, dataset in experiment.evaluation.datasets.items()},
    }


def check_paths(experiment: Experiment) -> Iterator[str]:
    """Yield which data files are not there, or have a name that Snakemake or fsspec would read as something else."""
    for key, paths in paths_of(experiment).items():
        yield from check_list(key, paths)
        for path in paths:
            if not is_local(path):
                continue
            if "{" in path or "}" in path:
                yield f"{key}: {path}: Snakemake reads braces in a path as a wildcard; rename or link the file"
            elif "::" in path:
                yield f"{key}: {path}: fsspec reads '::' as a chain of addresses; rename or link the file"
            elif path.startswith("~"):
                yield f"{key}: {path}: ~ is not expanded; write the full path"
            elif is_made_here(path):
                yield from (f"{key}: {problem}" for problem in not_made(experiment, path))
            elif Path(path).is_dir():
                yield f"{key}: {path} is a folder, not a file"
            elif not Path(path).is_file():
                yield f"{key}: no file matches {path}" if glob.has_magic(path) else f"{key}: no such file: {path}"


def check_list(key: str, paths: list[str]) -> Iterator[str]:
    """Yield what is wrong with a list of data files as a whole."""
    for path in dict.fromkeys(path for number, path in enumerate(paths) if path in paths[:number]):
        yield f"{key}: {path} is listed, or matched by a wildcard, more than once"
    if key.startswith("evaluation."):
        streams = [path for path in paths if path.endswith(".bin")]
        if streams and len(paths) > 1:
            yield f"{key}: {streams[0]} must be the only path of its evaluation set, found {len(paths)} paths"
    if unknown := [problem for path in paths for problem in format_problems(key, path)]:
        more = f" ({len(unknown) - 1} more such files)" if len(unknown) > 1 else ""
        yield f"{key}: {unknown[0]}{more}; a wildcard that ends in the format, such as *.jsonl, leaves other files out"


def format_problems(key: str, path: str) -> Iterator[str]:
    """Yield that the name of a file tells no format that can be read. The job checks the files that a pattern in an address
    matches, unless their ending is part of the pattern."""
    token_ids = key.startswith("evaluation.") and path.endswith(".bin")
    if token_ids or (not Path(path).is_file() if is_local(path) else path.endswith(("*", "?", "]"))):
        return
    try:
        if file_format(path) == ".txt" and key.startswith("sft."):
            yield f"{path}: plain text has no instruction records"
    except ValueError as error:
        yield str(error)


def not_made(experiment: Experiment, path: str) -> Iterator[str]:
    """Yield that no rule makes a path under results/, which is not there from an earlier run either."""
    trained = [name for name, system in experiment.systems.items() if system.training]
    made = [f"{experiment.results}/{folder}/{name}" for folder in ("models", "weights") for name in trained]
    if experiment.pretraining:
        made.append(experiment.pretrained)
    if path not in made and not Path(path).exists():
        guess = difflib.get_close_matches(path, made, n=1)
        yield f"no rule makes {path}" + (f"; did you mean {guess[0]}?" if guess else "")


def check_own_tasks(experiment: Experiment) -> Iterator[str]:
    """Yield that the folder of the user's tasks of lm-evaluation-harness is not one."""
    harness = experiment.evaluation.harness
    if harness and harness.include_path:
        folder = Path(harness.include_path)
        if not folder.is_dir():
            yield f"evaluation.harness.include_path: no such folder: {folder}"
        elif not any(folder.rglob("*.yaml")):
            yield f"evaluation.harness.include_path: {folder} holds no task (*.yaml)"


def check_retrieval_lengths(experiment: Experiment) -> Iterator[str]:
    """Yield which context lengths are too short for a passage and its repetition."""
    needed = 2 * PASSAGE_TOKENS
    for length in experiment.retrieval_lengths:
        if "induction" in experiment.retrieval.tasks and length < needed:
            yield f"retrieval.lengths: {length} is too short for the task induction, which needs at least {needed}"


def check_evaluator(experiment: Experiment) -> Iterator[str]:
    """Yield that the system that chooses the key tokens cannot read the longest evaluated length."""
    key_tokens, longest = experiment.evaluation.key_tokens, max(experiment.evaluation.lengths)
    system = experiment.systems.get(key_tokens.system) if key_tokens else None
    config = model_config(experiment, system.model) if system else None
    if key_tokens is None or system is None or not config:
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = system.rope_scaling if system.target_context else rope.get("rope_type", rope.get("type"))
    context = system.target_context or context_in(config)
    if context and context < longest and scaling != "dynamic":  # a dynamic scaling adapts to any length
        yield (
            f"evaluation.key_tokens.system: {key_tokens.system!r} has a context of {context} tokens, less than the longest of "
            f"evaluation.lengths, {longest}"
        )


def check_served_models(experiment: Experiment) -> Iterator[str]:
    """Yield which models cannot be written as GGUF files, and that there is no converter."""
    serving = experiment.serving
    if serving and serving.converter and not Path(serving.converter).is_file():
        yield f"serving.converter: no such file: {serving.converter}"
    for name in experiment.served:
        system = experiment.systems.get(name)
        if system is None or system.training is None:  # check_served reports it
            continue
        config = after_training(model_config(experiment, system.model) or {"model_type": ROPE_FAMILIES[0]}, system)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type")) == "dynamic":
            yield f"serving.systems: {name!r} cannot be converted: {DYNAMIC}, or list only other systems in serving.systems"


# --- models ----------------------------------------------------------------------------------------------------------------


def fit_problems(config: dict, system: System, original: str | None = None) -> Iterator[str]:
    """Yield why a model cannot be extended, trained or evaluated as a system asks.

    Args:
        config: its ``config.json``.
        system: as configured.
        original: hub id of the model that it was made from, if known.
    """
    extension = extension_of(system)
    if extension:
        yield from extension_problems(config, extension.target_context, system.training)
        if extension.scaling == "best" and system.base is None:  # with a base, it has been chosen for that one
            yield from choice_problems(config, extension.target_context)
        else:
            yield from scaling_problems(config, extension)
    trained = system.training is not None
    yield from quantization_problems(config, trained=trained, precision=system.precision, original=original)


def first_keys(experiment: Experiment, what: str) -> dict[str, str]:
    """Every model or tokenizer that is loaded, by the first key that names it.

    Args:
        what: ``model`` or ``tokenizer``.
    """
    keys = {"base_model.path": experiment.base_model} if what == "model" else {"base_model.tokenizer": experiment.tokenizer}
    for name in experiment.listed:
        path = getattr(experiment.systems[name], what)
        if path not in keys.values():
            keys[f"systems.{name}.{what}"] = path
    return keys


def model_problems(experiment: Experiment, path: str) -> Iterator[str]:
    """Yield why a model cannot be loaded; one on the hub is checked when it is loaded."""
    folder = Path(path)
    if not is_users_folder(path):
        yield from reference_problems(experiment, path)
    elif not (folder / "config.json").is_file():
        yield f"{path} is neither a folder with a config.json nor a hub id (owner/name)"
    else:
        try:
            read_config(folder)
            for file in weight_files(folder):
                if file.suffix == ".safetensors":
                    check_safetensors(file)
        except ValueError as error:
            yield str(error)


def tokenizer_problems(experiment: Experiment, path: str) -> Iterator[str]:
    """Yield why a tokenizer cannot be loaded; one on the hub is checked when it is loaded."""
    if not is_users_folder(path):
        yield from reference_problems(experiment, path)
    elif not tokenizer_files(path):
        yield f"{path} is neither a folder with a tokenizer (tokenizer.json) nor a hub id (owner/name)"
    elif {file.name for file in tokenizer_files(path)} <= set(TOKENIZER_SETTINGS):
        yield f"{path} has settings of a tokenizer, but no vocabulary: tokenizer.json or tokenizer.model is missing"
    elif pointers := [file for file in tokenizer_files(path) if is_lfs_pointer(file)]:
        yield f"{pointers[0]}: is a pointer of Git LFS: fetch it with git lfs pull"
    else:
        try:
            if lacks_end_token(Path(path)):
                yield f"{path}: the tokenizer has no end token; name one as eos_token in its tokenizer_config.json"
        except ValueError as error:
            yield str(error)


def is_users_folder(path: str) -> bool:
    """Whether a model or tokenizer is a folder of the user's: not one that the workflow makes, nor a hub id."""
    return not is_made_here(path) and not is_hub_id(path) and not set("{}") & set(path)


def reference_problems(experiment: Experiment, path: str) -> Iterator[str]:
    """Yield what is wrong with the path of a model or tokenizer that is not a folder of the user's."""
    if set("{}") & set(path):
        yield f"{path}: Snakemake reads braces in a path as a wildcard; rename or link the folder"
    elif is_made_here(path):
        yield from not_made(experiment, path)
    else:
        yield from misspelled_folder(path)


def misspelled_folder(path: str) -> Iterator[str]:
    """Yield a message if ``owner/name`` looks like a misspelled local folder, because ``owner`` is a folder of this machine."""
    parent, name = Path(path).parent, Path(path).name
    if parent.is_dir():
        guess = difflib.get_close_matches(name, [entry.name for entry in parent.iterdir() if entry.is_dir()], n=1)
        hint = f"; did you mean {parent / guess[0]}?" if guess else ""
        yield f"{path} would be a hub id, but {parent} is a folder of this machine and holds no {name}{hint}"


def model_config(experiment: Experiment, path: str) -> dict | None:
    """The ``config.json`` of a model of this machine, or what the pre-training is going to write; None for one on the hub,
    which its job checks before it loads weights."""
    if is_made_here(path):
        if trained_on := [name for name, system in experiment.systems.items() if system.base and system.model == path]:
            base = experiment.systems[str(experiment.systems[trained_on[0]].base)]
            unknown = {"model_type": ROPE_FAMILIES[0]}  # its job checks a model on the hub
            return after_training(model_config(experiment, base.model) or unknown, base)
        made = experiment.pretraining
        if made is None or path != experiment.pretrained:
            return None
        written = {"model_type": "llama", "max_position_embeddings": made.context, "vocab_size": made.vocab_size}
        return written | {"tie_word_embeddings": True} | made.architecture.model_dump()
    try:
        return read_config(Path(path))
    except (OSError, ValueError):  # told by model_problems
        return None


def after_training(config: dict, system: System) -> dict:
    """The ``config.json`` of the weights that a training makes, as far as it is checked.

    Args:
        config: that of the model that is trained.
        system: that is trained.
    """
    extension, context = extension_of(system), context_in(config)
    if extension is None or extension.target_context == context:
        return config
    target = extension.target_context
    if extension.scaling == "best":
        compared = candidates(config, target)
        if len(compared) != 1:  # which one it is going to be is not known; nothing extends it further
            return config | {"max_position_embeddings": target}
        extension = compared[0]  # a model that is scaled already keeps its scaling
    if extension.scaling in LARGER_THETA:
        return config | {"max_position_embeddings": target} | ({"rope_theta": extension.theta} if extension.theta else {})
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    own = rope.get("factor") or 1.0
    factor = extension.factor or (own * target / context if context else 1.0)
    original = context / own if context else target / factor
    return config | {
        "max_position_embeddings": original if extension.scaling == "dynamic" else target,
        "rope_parameters": {"rope_type": extension.scaling, "factor": factor, "original_max_position_embeddings": original},
    }


def read_config(folder: Path) -> dict:
    """The ``config.json`` of a model.

    Raises:
        ValueError: if it is not a JSON object, a size or a value of RoPE in it is not a number, or its dtype is unknown.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(config).__name__}")
    for key in SIZES:
        if not isinstance(config.get(key) or 0, int):
            raise ValueError(f"{file}: {key} is {config[key]!r}, expected a whole number")
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{file}: {key} is {value!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    for key, value in rope_numbers(config):
        if not isinstance(value or 0, int | float):
            raise ValueError(f"{file}: {key} is {value!r}, expected a number")
    return config


def rope_numbers(config: dict) -> Iterator[tuple[str, Any]]:
    """Yield key and value of what should be a number in the rotary position embeddings of a ``config.json``."""
    yield "rope_theta", config.get("rope_theta")
    for section in ("rope_parameters", "rope_scaling"):
        rope = config.get(section)
        if isinstance(rope, dict):
            yield from ((f"{section}.{key}", rope.get(key)) for key in ROPE_NUMBERS)


def check_vocabularies(experiment: Experiment) -> Iterator[str]:
    """Yield which local tokenizers are damaged, or have more tokens than the model that reads them has embeddings."""
    facts, pairs = FileFacts(), {(experiment.tokenizer, experiment.base_model): "base_model"}
    for name, system in experiment.systems.items():
        if system.base:  # has the embeddings of the model that was trained first
            continue
        pairs.setdefault((system.tokenizer, system.model), experiment.key_of(name))
    for (tokenizer, model), key in pairs.items():
        config, file = model_config(experiment, model), Path(tokenizer) / "tokenizer.json"
        if not (is_users_folder(tokenizer) and file.is_file()):
            continue
        try:
            (largest,) = facts.find("largest text token", [file], largest_text_token)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        vocab_size = (config or {}).get("vocab_size") or largest + 1
        if largest >= vocab_size:
            yield (
                f"{key}: the tokenizer {tokenizer} has tokens up to id {largest}, but {model} has embeddings for {vocab_size} "
                f"(legal: 0 to {vocab_size - 1}); it needs its own tokenizer"
            )


def check_token_files(experiment: Experiment, vocab_size: int) -> Iterator[str]:
    """Yield which local files of token ids are damaged, or hold an id beyond the base model's vocabulary."""
    facts = FileFacts()
    for name, dataset in experiment.evaluation.datasets.items():
        for file in dataset.paths:
            if not (file.endswith(".bin") and is_local(file) and not is_made_here(file) and Path(file).is_file()):
                continue
            try:
                (largest,) = facts.find("largest token", [file], largest_token)
            except ValueError as error:
                yield f"evaluation.datasets.{name}: {error}"
                continue
            if largest >= vocab_size:
                yield (
                    f"evaluation.datasets.{name}: {file} holds token id {largest}, but {experiment.base_model} has a "
                    f"vocabulary of {vocab_size} (legal: 0 to {vocab_size - 1})"
                )
