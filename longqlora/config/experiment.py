"""The configuration of an experiment: checked when it is read, before any job starts, and made complete.

Imports nothing heavy: the workflow reads it on every start.
"""

import difflib
import glob
import json
import re
from pathlib import Path

import jsonschema

from longqlora.config.ablations import add_ablations
from longqlora.data.token_descriptions import largest_token
from longqlora.evaluation.protocols import stride_of
from longqlora.evaluation.retrieval_tasks import PASSAGE_TOKENS
from longqlora.jobs.digests import FileFacts, digest_of_values
from longqlora.modeling.compatibility import extension_problems
from longqlora.modeling.model_files import weight_files

PROGRESS = ("logging_steps", "checkpoint_steps", "checkpoints_kept")
"""Settings of a training that change nothing in what is trained."""
MAX_SHARDS = 256  # that a source is cut into by itself: the join holds a file of each open
REMOTE = re.compile(r"^\w[\w+.-]*://")
HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


class ConfigError(ValueError):
    """A configuration that cannot run; each line names a key and says what would be right."""


def load_experiment(config: dict, schema: dict) -> dict:
    """Check a configuration and return it complete: globs expanded, defaults filled in, each system with its own training.

    Args:
        config: as parsed from YAML.
        schema: JSON schema of it.

    Raises:
        ConfigError: with all that is wrong, a line each.
    """
    validator = jsonschema.Draft202012Validator(schema)
    problems = [describe(error, schema) for error in validator.iter_errors(config)]
    if problems:
        raise ConfigError("\n".join(problems[:8]))
    experiment = complete(config, schema)
    problems = list(cross_checks(experiment)) or list(check_models(experiment))
    if problems:
        raise ConfigError("\n".join(problems))
    return experiment


def describe(error: jsonschema.ValidationError, schema: dict) -> str:
    """One line for a violation: the key, what is wrong, what would be legal."""
    where = ".".join(str(part) for part in error.absolute_path) or "the configuration"
    if error.validator == "additionalProperties":
        legal = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(legal))
        guess = [match for key in unknown for match in difflib.get_close_matches(key, legal, n=1)]
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        return f"{where}: unknown key {', '.join(map(repr, unknown))}{hint} (legal: {', '.join(legal)})"
    if error.validator in ("oneOf", "anyOf"):
        return f"{where}: {error.schema.get('description', error.message)}"
    expected = error.schema.get("description")
    return f"{where}: {error.message}" + (f" ({expected})" if expected else "")


def defaults_of(schema: dict, root: dict) -> dict:
    """The ``default`` values of an object's properties."""
    schema = resolve(schema, root)
    return {key: part["default"] for key, part in schema.get("properties", {}).items() if "default" in part}


def resolve(schema: dict, root: dict) -> dict:
    """Follow a ``$ref`` into ``$defs``."""
    return root["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def complete(config: dict, schema: dict) -> dict:
    """Fill in defaults, merge each system's training settings over the experiment's, and expand the globs of local files."""
    parts = schema["properties"]
    experiment = {**defaults_of(schema, schema), **config}
    experiment["base_model"] = {"tokenizer": config["base_model"]["path"], **config["base_model"]}
    for section in ("evaluation", "retrieval", "corpus", "sft", "demo", "decontamination", "merge"):
        if section in experiment:
            experiment[section] = {**defaults_of(parts[section], schema), **experiment[section]}
    if "corpus" in experiment:
        usual = defaults_of({"$ref": "#/$defs/corpus_source"}, schema)
        sources = experiment["corpus"]["sources"]
        experiment["corpus"]["sources"] = [{"name": source["paths"][0], **usual, **source} for source in sources]
    common = {**defaults_of(parts["training"], schema), **config.get("training", {})}
    experiment["systems"] = {name: complete_system(name, experiment, common) for name in config["systems"]}
    experiment["rows"] = list(config["systems"])
    experiment["ablations"] = add_ablations(experiment["systems"], experiment.get("ablations", {}))
    for _, source in source_lists(experiment):
        source["paths"] = [path for pattern in source["paths"] for path in expand(pattern)]
    evaluation, retrieval = experiment["evaluation"], experiment["retrieval"]
    evaluation["stride"] = evaluation.get("stride")
    experiment["retrieval"] = {"lengths": evaluation["lengths"], "filler": next(iter(evaluation["datasets"])), **retrieval}
    return experiment


def complete_system(name: str, experiment: dict, common: dict) -> dict:
    """A row of the table with all that it leaves to the experiment, or to the system whose weights it has."""
    system = experiment["systems"][name]
    owner = experiment["systems"].get(system.get("weights_of"), {})
    inherited = {key: owner[key] for key in ("target_context", "rope_scaling", "model", "tokenizer") if key in owner}
    whole = {
        "label": name,
        "model": experiment["base_model"]["path"],
        "rope_scaling": "linear",
        "merged": True,
        "precision": experiment["evaluation"]["precision"],
        "evaluation_attention": "full",
        **inherited,
        **system,
    }
    whole["tokenizer"] = whole.get("tokenizer", system.get("model", experiment["base_model"]["tokenizer"]))
    if "training" in system:
        own = system["training"] or {}
        whole["training"] = {**common, **own}
        if "epochs" in own and "steps" not in own:
            whole["training"].pop("steps", None)
        whole["progress"] = {key: whole["training"].pop(key) for key in PROGRESS}
    return whole


def evaluated_model(experiment: dict, name: str) -> dict:
    """What a system is evaluated as: the fields of :class:`longqlora.evaluation.evaluated_model.EvaluatedModel`."""
    system = experiment["systems"][name]
    owner = system.get("weights_of", name)
    training, results = experiment["systems"][owner].get("training"), f"results/{experiment['experiment']}"
    how = {"precision": system["precision"], "attention": system["evaluation_attention"]}
    if training:
        how["group_ratio"] = training["group_ratio"]
    if training and (system["merged"] or training["method"] == "full"):
        return how | {"path": f"{results}/weights/{owner}"}  # with its scaling inside
    how |= {"path": system["model"], "target_context": system.get("target_context"), "rope_scaling": system["rope_scaling"]}
    return how | ({"adapter": f"{results}/adapters/{owner}"} if training else {})


def source_lists(experiment: dict) -> list[tuple[str, dict]]:
    """Every part of the configuration that has a list of ``paths``, with its key."""
    sections = [name for name in ("corpus", "sft") if name in experiment]
    sources = [(f"{name}.sources", source) for name in sections for source in experiment[name]["sources"]]
    return sources + [(f"evaluation.datasets.{name}", part) for name, part in experiment["evaluation"]["datasets"].items()]


def is_local(path: str) -> bool:
    """Whether a data path is a file of this machine, not one that ``fsspec`` fetches."""
    return not REMOTE.match(path)


def is_made_here(path: str) -> bool:
    """Whether a rule of the workflow makes this path, so that it need not exist yet."""
    return path.startswith("results/")


def is_hub_model(path: str) -> bool:
    """Whether a model is a hub id (``owner/name``) and no folder of this machine."""
    return bool(HUB_ID.match(path)) and not is_made_here(path) and not Path(path).exists()


def expand(pattern: str) -> list[str]:
    """The local files that a pattern matches, sorted; remote paths and outputs of the workflow stay as they are."""
    if is_local(pattern) and not is_made_here(pattern):
        return sorted(glob.glob(pattern)) or [pattern]
    return [pattern]


def corpus_shards(sources: list[dict]) -> dict[str, dict]:
    """The jobs that read a corpus, by name: what each knows of its source, its files, and its part of what a remote pattern
    matches.

    A job that has one file is named after it and knows of no other, so that further files bring further jobs and change none.
    """
    shards = {}
    for source in sources:
        patterns = [path for path in source["paths"] if not is_local(path) and glob.has_magic(path)]
        files = [path for path in source["paths"] if path not in patterns]
        usual = 1 if all(path.endswith(".txt") for path in files) else min(len(source["paths"]), MAX_SHARDS)
        jobs = source.get("jobs", usual)
        for number in range(jobs):
            paths, part = files[number::jobs] + patterns, (number, jobs) if patterns else (0, 1)
            name = Path(paths[0]).name if len(files) == jobs and not patterns else f"part-{number}-of-{jobs}"
            shard = f"{name}-{digest_of_values([source['name'], paths, part])[:8]}"
            known = {key: value for key, value in source.items() if key not in ("paths", "jobs")}
            shards[shard] = {"source": known, "paths": paths, "part": part}
    return shards


def sample_shares(corpus: dict) -> dict[str, float] | None:
    """Share of the sample by source, as the sources say or the section as a whole; None where no share is given."""
    by_source = {source["name"]: source["share"] for source in corpus["sources"] if "share" in source}
    return corpus.get("shares") or by_source or None


def cross_checks(experiment: dict):
    """Yield what the schema cannot say: how values fit together, and files that are not there."""
    systems, evaluation = experiment["systems"], experiment["evaluation"]
    yield from check_evaluation(evaluation, experiment["retrieval"])
    yield from check_ablations(experiment)
    labels = [systems[name]["label"] for name in experiment["rows"]]
    if len(set(labels)) < len(labels):
        yield f"systems: every label must be different, found {', '.join(labels)}"
    for name, system in systems.items():
        yield from check_weights(systems, name)
        if "training" in system:
            yield from check_training(experiment, name, system)
        if "training" in system and system["model"] != experiment["base_model"]["path"]:
            yield f"systems.{name}.model: {system['model']} is evaluated as it is; only the base_model is trained"
    sft = experiment.get("sft")
    if sft and sft["held_out"] >= sft["num_records"]:
        yield f"sft.held_out: {sft['held_out']} of sft.num_records {sft['num_records']} leaves nothing to train on"
    for section in ("corpus", "sft"):
        limits = experiment.get(section, {})
        if limits.get("min_tokens", 0) > limits.get("max_tokens", 0):
            yield f"{section}.min_tokens: {limits['min_tokens']} exceeds {section}.max_tokens, {limits['max_tokens']}"
    if "corpus" in experiment:
        yield from check_corpus(experiment["corpus"])
    if "sft" in experiment:
        names = [source["name"] for source in experiment["sft"]["sources"]]
        if len(set(names)) < len(names):
            yield f"sft.sources: every name must be different, found {', '.join(names)}"
        yield from check_shares("sft.sources", [source["share"] for source in experiment["sft"]["sources"]])
    known = {row["label"] for row in evaluation["datasets"].values()}
    for row in experiment.get("published", []):
        if row["dataset"] not in known:
            legal = ", ".join(sorted(known))
            yield f"published: dataset {row['dataset']!r} is no label of evaluation.datasets (legal: {legal})"
    for key, source in source_lists(experiment):
        for path in source["paths"]:
            if is_local(path) and not is_made_here(path) and not Path(path).is_file():
                yield f"{key}: no such file: {path}"


def check_evaluation(evaluation: dict, retrieval: dict):
    """Yield what is wrong with how perplexity and retrieval are measured."""
    protocol, shortest = evaluation["protocol"], min(evaluation["lengths"])
    stride = stride_of(protocol, shortest, evaluation["stride"])
    if protocol == "longqlora" and evaluation["stride"]:
        yield "evaluation.stride: in the protocol longqlora the stride is the window; leave it out, or use exact"
    elif stride > shortest:
        yield f"evaluation.stride: {stride} exceeds the shortest of evaluation.lengths, {shortest}"
    if retrieval["filler"] not in evaluation["datasets"]:
        legal = ", ".join(evaluation["datasets"])
        yield f"retrieval.filler: {retrieval['filler']!r} is no name of evaluation.datasets (legal: {legal})"
    for length in retrieval["lengths"]:
        if "induction" in retrieval["tasks"] and length < 2 * PASSAGE_TOKENS:
            yield f"retrieval.lengths: {length} is too short for the task induction, which needs at least {2 * PASSAGE_TOKENS}"
        if length not in evaluation["lengths"]:
            yield f"retrieval.lengths: {length} is none of evaluation.lengths, beside whose perplexity it would stand"


def check_ablations(experiment: dict):
    """Yield which ablations vary no trained system."""
    trained = [name for name in experiment["rows"] if "training" in experiment["systems"][name]]
    for name, ablation in experiment["ablations"].items():
        if ablation["system"] not in trained:
            legal = ", ".join(trained)
            yield f"ablations.{name}.system: {ablation['system']!r} is no trained system (legal: {legal or 'none'})"
        elif "rank" in ablation["grid"] and experiment["systems"][ablation["system"]]["training"]["method"] == "full":
            yield f"ablations.{name}.grid.rank: {ablation['system']!r} trains all weights and has no rank"


def check_weights(systems: dict, name: str):
    """Yield what is wrong with a system that has the weights of another."""
    owner, system = systems[name].get("weights_of"), systems[name]
    trained = ", ".join(other for other in systems if "training" in systems[other])
    if owner is not None and "training" not in systems.get(owner, {}):
        yield f"systems.{name}.weights_of: {owner!r} is no system with a training of its own (legal: {trained or 'none'})"
    for key in ("training", "target_context", "rope_scaling", "model", "tokenizer"):
        if owner is not None and system.get(key, systems.get(owner, {}).get(key)) != systems.get(owner, {}).get(key):
            yield f"systems.{name}.weights_of: it has the weights of {owner!r} as they were made; leave {key} out"


def check_shares(key: str, shares: list[float]):
    """Yield what is wrong with shares of a whole."""
    if abs(sum(shares) - 1) > 1e-6:
        yield f"{key}: the shares add up to {sum(shares):g}, they must add up to 1"


def check_corpus(corpus: dict):
    """Yield what is wrong with the shares of the corpus."""
    with_share = [source["name"] for source in corpus["sources"] if "share" in source]
    without = [source["name"] for source in corpus["sources"] if "share" not in source]
    if with_share and "shares" in corpus:
        yield "corpus.shares: give shares either here or to the sources (corpus.sources), not both"
    elif with_share and without:
        yield f"corpus.sources: {', '.join(without)} has no share but {', '.join(with_share)} has; give one to all or to none"
    elif len(set(with_share)) < len(with_share):
        yield f"corpus.sources: every source with a share needs a name of its own, found {', '.join(with_share)}"
    elif shares := sample_shares(corpus):
        yield from check_shares("corpus.shares" if "shares" in corpus else "corpus.sources", list(shares.values()))


def check_training(experiment: dict, name: str, system: dict):
    """Yield what is wrong with a trained system."""
    training, where = system["training"], f"systems.{name}"
    if "target_context" not in system:
        yield f"{where}.target_context: missing; a trained system needs its target context in tokens"
    if ("steps" in training) == ("epochs" in training):
        yield f"{where}.training: give either steps or epochs"
    if training["data"] not in experiment:
        yield f"{where}.training.data: {training['data']!r} is not configured; add the section {training['data']}:"
    for option, data in (("isolate_documents", "corpus"), ("pack_records", "sft")):
        if training[option] and training["data"] != data:
            yield f"{where}.training.{option}: is for data: {data}, found data: {training['data']}"
    if training["offload_activations"] and not training["activation_checkpointing"]:
        yield f"{where}.training.offload_activations: moves what checkpointing keeps; give activation_checkpointing: true too"
    if training["offload"] and not training["zero_stage"]:
        yield f"{where}.training.offload: is for DeepSpeed; give zero_stage: 2 or 3 too"
    longest = experiment.get("sft", {}).get("max_tokens", 0)
    if training["pack_records"] and longest > system.get("target_context", longest):
        yield f"{where}.training.pack_records: sft.max_tokens is {longest}, more than the window of {system['target_context']}"


def model_config(experiment: dict, path: str) -> dict | None:
    """The ``config.json`` of a model of this machine, or what the demo is going to make; None for one on the hub, which its
    training checks before weights are loaded."""
    if is_made_here(path):
        demo, name = experiment.get("demo", {}), Path(path).name
        if name not in demo.get("pretrained", {}):
            return None
        made = {"model_type": "llama", "max_position_embeddings": demo["pretrained"][name], "vocab_size": demo["vocab_size"]}
        return made | demo["architecture"]
    config_file = Path(path) / "config.json"
    return json.loads(config_file.read_text()) if config_file.is_file() else None


def check_models(experiment: dict):
    """Yield what the configurations of the models say against the systems, and token ids in a local evaluation file that the
    base's vocabulary does not have."""
    paths = {f"systems.{name}.model": system["model"] for name, system in experiment["systems"].items()}
    for key, path in {"base_model.path": experiment["base_model"]["path"], **paths}.items():
        if not is_made_here(path) and not is_hub_model(path) and not (Path(path) / "config.json").is_file():
            yield f"{key}: {path} is neither a folder with a config.json nor a hub id (owner/name)"
            return
        if (Path(path) / "config.json").is_file() and not is_made_here(path):
            try:
                weight_files(Path(path))
            except ValueError as error:
                yield f"{key}: {error}"
                return
    for name, system in experiment["systems"].items():
        config = model_config(experiment, system["model"])
        if config and "target_context" in system:
            for problem in extension_problems(config, system["target_context"], system.get("training")):
                yield f"systems.{name}: {system['model']}: {problem}"
    config = model_config(experiment, experiment["base_model"]["path"])
    if config and "vocab_size" in config:
        yield from check_token_files(experiment, config["vocab_size"])


def check_token_files(experiment: dict, vocab_size: int):
    """Yield which local files of token ids are none, or hold an id that is beyond the vocabulary."""
    facts = FileFacts()
    for name, dataset in experiment["evaluation"]["datasets"].items():
        for file in dataset["paths"]:
            if file.endswith(".bin") and is_local(file) and not is_made_here(file):
                try:
                    (largest,) = facts.find("largest token", [file], largest_token)
                except ValueError as error:
                    yield f"evaluation.datasets.{name}: {error}"
                    continue
                if largest >= vocab_size:
                    yield (
                        f"evaluation.datasets.{name}: {file} holds token id {largest}, but "
                        f"{experiment['base_model']['path']} has a vocabulary of {vocab_size} (legal: 0 to {vocab_size - 1})"
                    )
