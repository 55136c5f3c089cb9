# The experiment, checked and completed, and what the rules ask of it.

import os

import yaml
from snakemake.exceptions import WorkflowError

from longqlora.experiment import (
    ConfigError,
    corpus_shards,
    evaluated_model,
    is_hub_model,
    is_local,
    load_experiment,
    sample_shares,
)
from longqlora.protocols import stride_of
from longqlora.provenance import code_of as files_behind

ROOT = Path(workflow.basedir)

try:
    experiment = load_experiment(config, yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text()))
except ConfigError as error:
    raise WorkflowError(f"the configuration cannot run:\n{error}")

RESULTS = f"results/{experiment['experiment']}"
BASE_MODEL = experiment["base_model"]["path"]
TOKENIZER = experiment["base_model"]["tokenizer"]
SYSTEMS = experiment["systems"]  # the rows of the table, and the cells of the ablations
ROWS = experiment["rows"]
TRAINED = [name for name, system in SYSTEMS.items() if "training" in system]
TRAINED_ROWS = [name for name in ROWS if name in TRAINED]
WHOLE = [name for name in TRAINED if SYSTEMS[name]["training"]["method"] == "full"]  # nothing to merge
ADAPTED = [name for name in TRAINED if name not in WHOLE]
CHAT = [name for name in ROWS if name in TRAINED and SYSTEMS[name]["training"]["data"] == "sft"]
EVALUATION = experiment["evaluation"]
DATASETS = EVALUATION["datasets"]
LENGTHS = EVALUATION["lengths"]
RETRIEVAL = experiment["retrieval"]
ABLATIONS = experiment["ablations"]
CORPUS = experiment.get("corpus", {"sources": []})
SHARDS = corpus_shards(CORPUS["sources"])
SFT = experiment.get("sft", {"sources": []})
GATE = experiment["decontamination"]
GPUS = int(experiment["device"] == "cuda")  # of a job that runs a model; a profile says how many the machine has


def one_of(names):
    """A pattern that matches these names alone."""
    return "|".join(map(re.escape, names)) or "none"


wildcard_constraints:
    system=one_of(SYSTEMS),
    dataset=one_of(DATASETS),
    ablation=one_of(ABLATIONS),
    shard=one_of(SHARDS),
    length=r"\d+",


def code_of(script):
    """A script of workflow/scripts and the package's files behind it: an input of its rule, so that an edit reruns it."""
    files = files_behind(ROOT / "workflow" / "scripts" / f"{script}.py", ROOT)
    return [os.path.relpath(ROOT / file) for file in files]


def local_files(paths):
    """The paths that are files of this machine; the others are fetched by the job itself."""
    return [path for path in paths if is_local(path)]


def local_model(path):
    """A model on this machine as an input; one on the hub is fetched by the job itself."""
    return [] if is_hub_model(path) else path


def tokenizer(wildcards, input):
    """Where a job loads the tokenizer from: its input, or the hub."""
    return str(input.tokenizer or TOKENIZER)


def base_model(wildcards, input):
    """Where a job loads the base model from: its input, or the hub."""
    return str(input.base_model or BASE_MODEL)


def model_of(wildcards):
    """What a system is evaluated as: the model that training made of it, its adapter on the base, its published model, the base."""
    return evaluated_model(experiment, wildcards.system)


def local_parts(wildcards):
    """The folders of this machine that a system is evaluated from."""
    model = model_of(wildcards)
    return [path for path in (model["path"], model.get("adapter")) if path and not is_hub_model(path)]


def has_own_tokenizer(wildcards):
    """Whether a system is a published model whose tokens are not the base's."""
    return SYSTEMS[wildcards.system]["tokenizer"] != TOKENIZER


def evaluation_tokens(wildcards):
    """The evaluation set as the system's tokenizer encodes it; for retrieval, the set that the filler is taken from."""
    made = rules.retokenize_evaluation_set if has_own_tokenizer(wildcards) else rules.prepare_evaluation_set
    dataset = getattr(wildcards, "dataset", RETRIEVAL["filler"])
    return {
        name: str(getattr(made.output, name)).format(system=wildcards.system, dataset=dataset)
        for name in ("tokens", "description")
    }


def windows_beside(records):
    """What each window lost, beside the records of perplexity."""
    return [f"{str(record).removesuffix('.json')}.parquet" for record in records]


def ablation_records(wildcards):
    """The cells of a grid."""
    cells = ABLATIONS[wildcards.ablation]["rows"]
    return expand(rules.evaluate_perplexity.output.record, system=cells, dataset=DATASETS, length=LENGTHS)


def ablation_reports(wildcards):
    """What the target ablations makes."""
    if not ABLATIONS:
        raise WorkflowError("no ablations are configured; name config/ablations.yaml behind the experiment's --configfile")
    return expand(rules.report_ablation.output, ablation=ABLATIONS)
