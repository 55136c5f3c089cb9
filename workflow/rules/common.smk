# The experiment, checked and completed, and what the rules ask of it.

import yaml
from snakemake.exceptions import WorkflowError

from longqlora.config.experiment import (
    ConfigError,
    corpus_shards,
    evaluated_model,
    is_hub_model,
    is_local,
    is_made_here,
    load_experiment,
    sample_shares,
)
from longqlora.jobs.code import Code
from longqlora.jobs.digests import FileFacts
from longqlora.modeling.model_files import model_files, tokenizer_files
from longqlora.evaluation.protocols import stride_of

ROOT = Path(workflow.basedir)

try:
    experiment = load_experiment(config, yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text()))
except ConfigError as error:
    raise WorkflowError(f"the configuration cannot run:\n{error}")

FACTS = FileFacts()
CODE = Code(ROOT, FACTS)
RESULTS = f"results/{experiment['experiment']}"
BASE_MODEL = experiment["base_model"]["path"]
TOKENIZER = experiment["base_model"]["tokenizer"]
SYSTEMS = experiment["systems"]  # the rows of the table, and the cells of the ablations
TABLE_SYSTEMS = experiment["rows"]
TRAINED = [name for name, system in SYSTEMS.items() if "training" in system]
TRAINED_TABLE_SYSTEMS = [name for name in TABLE_SYSTEMS if name in TRAINED]
FULL_FINETUNED = [name for name in TRAINED if SYSTEMS[name]["training"]["method"] == "full"]  # nothing to merge
ADAPTED = [name for name in TRAINED if name not in FULL_FINETUNED]
CHAT = [name for name in TABLE_SYSTEMS if name in TRAINED and SYSTEMS[name]["training"]["data"] == "sft"]
EVALUATION = experiment["evaluation"]
DATASETS = EVALUATION["datasets"]
LENGTHS = EVALUATION["lengths"]
RETRIEVAL = experiment["retrieval"]
ABLATIONS = experiment["ablations"]
CORPUS = experiment.get("corpus", {"sources": []})
SHARDS = corpus_shards(CORPUS["sources"])
SFT = experiment.get("sft", {"sources": []})
DECONTAMINATION = experiment["decontamination"]
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
    """What stands in the params of a script of workflow/scripts, each file that its result depends on with a digest of what the
    file says, so that an edit runs it again and a comment does not."""
    return CODE.params(f"workflow/scripts/{script}.py")


# Files that the user keeps count by their contents. A digest of them is a param, and Snakemake ignores their dates. What the
# workflow makes is an input as usual.


def sources_of(paths):
    """Data files of this machine as inputs; other addresses are read by the job itself."""
    return [path if is_made_here(path) else ancient(path) for path in paths if is_local(path)]


def contents_of(paths):
    """A digest of the data files that the user keeps."""
    return FACTS.fingerprint(path for path in paths if is_local(path) and not is_made_here(path))


def made_model(path):
    """A model that the workflow makes, as an input."""
    return path if is_made_here(path) else []


def contents_of_model(path):
    """A digest of the configuration and the weights of a model in a folder that the user keeps."""
    return FACTS.fingerprint(model_files(path)) if is_kept_by_user(path) else None


def contents_of_tokenizer(path, with_chat_template=False):
    """A digest of a tokenizer in a folder that the user keeps."""
    files = tokenizer_files(path, with_chat_template=with_chat_template) if is_kept_by_user(path) else []
    return FACTS.fingerprint(files) if files else None


def contents_of_generation_settings(path):
    """A digest of the generation settings of a model in a folder that the user keeps."""
    file = Path(path) / "generation_config.json"
    return FACTS.fingerprint([file]) if is_kept_by_user(path) and file.is_file() else None


def is_kept_by_user(path):
    """Whether a model is a folder of this machine that the workflow does not make."""
    return not is_made_here(path) and not is_hub_model(path)


# Functions, because Snakemake's linter takes a path that is also an input for a prefix that is written out.


def base_model(wildcards):
    """Where a job loads the base model from."""
    return BASE_MODEL


def base_tokenizer(wildcards):
    """Where a job loads the base model's tokenizer from."""
    return TOKENIZER


def own_tokenizer(wildcards):
    """Where a job loads a system's tokenizer from."""
    return SYSTEMS[wildcards.system]["tokenizer"]


def training_data(wildcards):
    """What a system is trained on."""
    made = {"corpus": rules.tokenize_corpus, "sft": rules.tokenize_sft}
    return made[SYSTEMS[wildcards.system]["training"]["data"]].output.tokens


def model_of(wildcards):
    """What a system is evaluated as: the model that training made of it, its adapter on the base, its published model, the base."""
    return evaluated_model(experiment, wildcards.system)


def made_parts(wildcards):
    """The folders that a system is evaluated from, as far as the workflow makes them."""
    model = model_of(wildcards)
    return [path for path in (model["path"], model.get("adapter")) if path and is_made_here(path)]


def contents_of_evaluated(wildcards):
    """A digest of the configuration and the weights that a system is evaluated from, as far as the user keeps them."""
    return contents_of_model(model_of(wildcards)["path"])


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


def labels_of(systems):
    """What systems and evaluation sets are called in tables and plots, by their names."""
    return {
        "system": {name: SYSTEMS[name]["label"] for name in systems},
        "dataset": {name: dataset["label"] for name, dataset in DATASETS.items()},
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
