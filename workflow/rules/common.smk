# The experiment: read, checked and completed once; and the functions that rules share.

from snakemake.exceptions import WorkflowError
from snakemake.io import expand as expand_local

from longqlora.config.experiment import load_experiment
from longqlora.config.paths import is_local, is_made_here
from longqlora.config.shards import SHARD_NAME, corpus_shards, sample_shares
from longqlora.config.systems import evaluated_model, extension_of, protocol_at, untrained_model
from longqlora.config.validation import ConfigError, duplicate_keys
from longqlora.jobs.code import Code
from longqlora.jobs.digests import FileFacts, digest_of_file, digest_of_values
from longqlora.jobs.torchrun import nodes_problem
from longqlora.modeling.base_precision import BASE_PRECISION
from longqlora.modeling.model_files import model_files, tokenizer_files
from longqlora.planning.plan_file import at_attempt, job_resources
from longqlora.preflight import check_inputs, is_users_folder

try:
    if repeated := [line for path in workflow.configfiles for line in duplicate_keys(path)]:
        raise ConfigError(repeated)
    EXPERIMENT = load_experiment(config, check_inputs)
except ConfigError as error:
    raise WorkflowError(f"the configuration cannot run:\n{error}")

FACTS = FileFacts()
CODE = Code(PROJECT, FACTS)
RESULTS = EXPERIMENT.results
BASE_MODEL = EXPERIMENT.base_model
TOKENIZER = EXPERIMENT.tokenizer
SYSTEMS = EXPERIMENT.systems  # those of the configuration, and the cells of the ablations
TABLE_SYSTEMS = EXPERIMENT.rows  # those whose perplexity and retrieval are measured
TRAINED = [name for name, system in SYSTEMS.items() if system.training]
LISTED_TRAINED = [name for name in EXPERIMENT.listed if name in TRAINED]
FULL_FINETUNED = [name for name in TRAINED if SYSTEMS[name].training.method == "full"]  # nothing to merge
ADAPTED = [name for name in TRAINED if name not in FULL_FINETUNED]
DATASETS = EXPERIMENT.evaluation.datasets
LENGTHS = EXPERIMENT.evaluation.lengths
KEY_TOKENS = EXPERIMENT.evaluation.key_tokens  # None if LongPPL is not measured
CORPUS, SFT = EXPERIMENT.corpus, EXPERIMENT.sft  # None if the experiment does not have it
CHAT = [name for name in LISTED_TRAINED if SYSTEMS[name].training.data == "sft" and SFT.held_out]  # compared by their answers
WRITES_ANSWERS = bool(set(EXPERIMENT.retrieval.tasks) - {"induction"})  # retrieval depends on stop tokens and chat templates
HARNESS = EXPERIMENT.harness_cells  # tasks of lm-evaluation-harness and their lengths
GPUS = int(EXPERIMENT.device == "cuda")  # needed by a job that runs a model; the profile says how many the machine has
PLAN = f"{RESULTS}/plan.json"

if workflow.modifier.path_modifier.replace_prefix(PLAN) != PLAN:  # only inputs and outputs would have it, and not params
    raise WorkflowError(
        f"a module that uses this workflow cannot have prefix: or replace_prefix:. Its results are in {RESULTS}, which has its name "
        "from experiment: in the configuration; workdir: and --directory change the folder"
    )

SYSTEM_VALUES = {name: system.model_dump() for name, system in SYSTEMS.items()}


def folder_of_copies():
    """The folder of the local copies of files in a default storage, with a slash at its end; empty without such a storage.

    Snakemake keeps ``results/x`` in the bucket, and has a local copy in ``.snakemake/storage``. Params and records have the path
    ``results/x``. So that folder is a link to the working folder: the local copy of ``results/x`` is ``results/x``.
    """
    settings = workflow.storage_settings
    if not settings.default_storage_provider:
        return ""
    query = f"{(settings.default_storage_prefix or '').rstrip('/')}/name"
    folder = workflow.storage_registry.default_storage_provider.object(query).local_path().parent
    if folder.is_symlink() and folder.resolve() != Path.cwd():  # of a working folder that was moved
        folder.unlink()
    if not folder.exists():
        if Path(RESULTS).exists():
            raise WorkflowError(
                f"{RESULTS} is not in {settings.default_storage_prefix} yet, and Snakemake would remove what the storage lacks: "
                "copy it there and move it away, or run in another folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(Path.cwd())
    elif folder.resolve() != Path.cwd():
        raise WorkflowError(f"{folder} has to be a link to the working folder; remove it")
    return f"{folder}/"


COPIES = folder_of_copies()


def without_storage(path):
    """The path of a rule's output as it was before Snakemake put it into a default storage."""
    return str(path).removeprefix(COPIES)


def expand(pattern, **wildcards):
    """Snakemake's function, which refuses outputs in a default storage."""
    patterns = [pattern] if isinstance(pattern, (str, Path)) else pattern
    return expand_local([without_storage(path) for path in patterns], **wildcards)


def one_of(names):
    """A pattern that matches these names and nothing else; without names, it matches nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    system=one_of(SYSTEMS),
    dataset=one_of(DATASETS),
    ablation=one_of(EXPERIMENT.ablations),
    length=r"\d+",


def code_of(script):
    """Params that stand for the code behind a script in workflow/scripts: one per Python file that the result depends on, with a
    digest of the code in it, so that an edit reruns the script and a comment does not."""
    return CODE.params(f"workflow/scripts/{script}.py")


# What jobs ask of a cluster, for a first attempt; a retry gets more, because memory or time may have been the reason. Resources
# rerun nothing, and without --resources mem_mb=… a machine does not count its memory. `mem` is in MB: Snakemake makes mem_mb of
# it, and mem_mb itself could not be left out. `attempt` tells a job which attempt it is (longqlora.jobs.retries).


def planned(stage, runtime=None, system=lambda wildcards: wildcards.system):
    """Resources of jobs that run a model: main memory (mem), memory of each GPU (gpu_mem_mb) and minutes (runtime), as the plan
    has them; without a plan there is no memory.

    Args:
        stage: of longqlora.planning.plan.Job.
        runtime: minutes, for a job that the plan does not have.
        system: returns the name of the system by the wildcards.
    """

    def resource(name):
        def value(wildcards, attempt):
            length = int(wildcards.length) if "length" in wildcards.keys() else None
            return job_resources(Path(PLAN), stage, system(wildcards), length, attempt, runtime).get(name)

        return value

    return {name: resource(name) for name in ("mem", "gpu_mem_mb", "runtime")} | {"attempt": attempt_of_job}


def measured(mem, runtime):
    """Resources of jobs on texts and results: main memory in MB and minutes. They are at least twice what benchmarks/RESULTS.md
    has of the stages of the data, and generous for jobs that were measured on small data only."""

    def resource(first):
        return lambda wildcards, attempt: at_attempt(first, attempt)

    return {"mem": resource(mem), "runtime": resource(runtime), "attempt": attempt_of_job}


def attempt_of_job(wildcards, attempt):
    """The number of the attempt, from 1 on."""
    return attempt


REPORTING = measured(mem=1000, runtime=30)  # tables, plots, the report


def num_processes(wildcards):
    """Number of processes that train a system, on all nodes together."""
    training = SYSTEMS[wildcards.system].training
    return training.num_processes * training.num_nodes


def on_several_nodes():
    """Resources of a training on several nodes, as snakemake-executor-plugin-slurm names them.

    Each node has one task, which has all cores of ``threads``, and the same number of GPUs. With ``mpi``, the job runs on its
    first node and starts the tasks itself. Without ``tasks_per_gpu: 0``, each GPU would have as many tasks as there are nodes.
    """

    def resource(value):
        def of_job(wildcards):
            training = SYSTEMS[wildcards.system].training
            return value(training) if training.num_nodes > 1 else None

        return of_job

    return {
        "nodes": lambda wildcards: SYSTEMS[wildcards.system].training.num_nodes,
        "tasks": resource(lambda training: training.num_nodes),
        "tasks_per_gpu": resource(lambda training: 0),
        "mpi": resource(lambda training: "srun"),
        "gres": resource(lambda training: f"gpu:{training.num_processes}" if GPUS else None),
    }


def slurm_problems(names):
    """Yield which systems are to be trained on several nodes, but not as a job of SLURM."""
    for name in names:
        if problem := nodes_problem(SYSTEMS[name].training.num_nodes):
            yield f"{EXPERIMENT.key_of(name)}.training.{problem}"


# A rule that reads the user's files has a digest of their contents as a param, and Snakemake ignores their dates. Files that the
# workflow makes are ordinary inputs.


def sources_of(paths):
    """Data files of this machine as inputs, which are in no storage; remote files are read by the job itself."""
    return [path if is_made_here(path) else ancient(local(path)) for path in paths if is_local(path)]


def contents_of(paths):
    """A digest of the user's data files."""
    return FACTS.fingerprint(path for path in paths if is_local(path) and not is_made_here(path))


def contents_of_folder(path):
    """A digest of all files of the user's in a folder, hidden ones and compiled Python aside; None without a folder."""
    if path is None:
        return None
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file() and file.suffix != ".pyc"]
    return FACTS.fingerprint(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def made_model(path):
    """The folder of a model as an input, if the workflow makes it."""
    return path if is_made_here(path) else []


def contents_of_model(path):
    """A digest of configuration and weights, for a model in a folder of the user's."""
    return FACTS.fingerprint(model_files(path)) if is_users_folder(path) else None


def contents_of_tokenizer(path, with_chat_template=False):
    """A digest of the tokenizer files, for a tokenizer in a folder of the user's."""
    files = tokenizer_files(path, with_chat_template=with_chat_template) if is_users_folder(path) else []
    return FACTS.fingerprint(files) if files else None


def contents_of_generation_settings(path):
    """A digest of the generation settings, for a model in a folder of the user's."""
    file = Path(path) / "generation_config.json"
    return FACTS.fingerprint([file]) if is_users_folder(path) and file.is_file() else None


# Params that equal an input path are functions, because Snakemake's linter reports a string that occurs in both.


def base_model(wildcards):
    """Folder or hub id of the base model."""
    return BASE_MODEL


def base_tokenizer(wildcards):
    """Folder or hub id of the base model's tokenizer."""
    return TOKENIZER


def trained_model(wildcards):
    """Folder or hub id of the model that a system is trained on: the base model, or the merged weights of another system."""
    return SYSTEMS[wildcards.system].model


def first_model(wildcards):
    """Folder or hub id of the model of a system before any training of this experiment."""
    return SYSTEMS[EXPERIMENT.stages_of(wildcards.system)[0]].model


def contents_of_trained(wildcards):
    """A digest of the model that a system is trained on, if it is in a folder of the user's."""
    return contents_of_model(trained_model(wildcards))


def made_trained_model(wildcards):
    """The folder of the model that a system is trained on, if the workflow makes it."""
    return made_model(trained_model(wildcards))


def files_of_stages(wildcards, folder, names):
    """The files of a folder on the trainings of a system, those of the systems that it is trained on first."""
    return [f"{RESULTS}/{folder}/{name}.json" for name in EXPERIMENT.stages_of(wildcards.system) if name in names]


def training_data(wildcards):
    """The tokens that a system is trained on."""
    return getattr(rules, f"tokenize_{SYSTEMS[wildcards.system].training.data}").output.tokens


def model_of(wildcards):
    """The model that a system is evaluated with, as longqlora.config.settings.EvaluatedModel has it."""
    return evaluated_model(EXPERIMENT, wildcards.system).model_dump()


def untrained_model_of(wildcards):
    """A trained system before its training, as longqlora.config.settings.EvaluatedModel has it."""
    return untrained_model(EXPERIMENT, wildcards.system).model_dump()


def made_folders(wildcards):
    """The folders of the model and adapter that a system is evaluated with, if the workflow makes them."""
    model = model_of(wildcards)
    return [path for path in (model["path"], model["adapter"]) if path and is_made_here(path)]


def scaling_record(name):
    """The record of the choice for a system with ``rope_scaling: best``; None for any other."""
    name = SYSTEMS[name].weights_of or name
    while EXPERIMENT.continues_its_base(name):  # has the scaling of its base
        name = SYSTEMS[name].base
    system = SYSTEMS[name]
    if system.target_context is None or system.rope_scaling != "best":
        return None
    data = system.training.data if system.training else "corpus"
    precision = BASE_PRECISION[system.training.method] if system.training else system.precision
    return f"{RESULTS}/scalings/{system.target_context}-{data}-{precision}.json"


def first_with_scaling(wildcards):
    """The first system that is extended by a chosen scaling."""
    record = f"{RESULTS}/scalings/{wildcards.target}-{wildcards.data}-{wildcards.precision}.json"
    return next((name for name in SYSTEMS if scaling_record(name) == record), None)


def scaling_of(wildcards):
    """The record of the choice of a system's scaling, if there is one."""
    return scaling_record(wildcards.system) or []


def scaling_of_evaluated(wildcards):
    """The same for an evaluation; the configuration of merged weights has the scaling already."""
    return scaling_of(wildcards) if model_of(wildcards)["extension"] else []


def contents_of_evaluated(wildcards):
    """A digest of the model that a system is evaluated with, if it is in a folder of the user's."""
    return contents_of_model(model_of(wildcards)["path"])


def is_trained_to_answer(wildcards):
    """Whether the weights of a system are trained on instructions, in any of its stages."""
    stages = EXPERIMENT.stages_of(SYSTEMS[wildcards.system].weights_of or wildcards.system)
    return any(SYSTEMS[name].training.data == "sft" for name in stages if SYSTEMS[name].training)


def has_own_tokenizer(wildcards):
    """Whether a system is a published model with another tokenizer than the base model."""
    return SYSTEMS[wildcards.system].tokenizer != TOKENIZER


def of_all_shards(files):
    """A function that returns a file of each shard. As a list, Snakemake would compute the list's hash for each file in it."""
    return lambda wildcards: expand(files, shard=SHARDS)


def evaluation_files(output, datasets=DATASETS):
    """A function of the wildcards: the prepared files of evaluation sets, encoded with the system's tokenizer.

    Args:
        output: ``tokens`` or ``description``.
        datasets: names of the evaluation sets.
    """

    def files(wildcards):
        made = rules.retokenize_evaluation_set if has_own_tokenizer(wildcards) else rules.prepare_evaluation_set
        return [
            without_storage(getattr(made.output, output)).format(system=wildcards.system, dataset=dataset)
            for dataset in datasets
        ]

    return files


def evaluator_of(wildcards):
    """Name of the system that chooses the key tokens on which a system's LongPPL is measured; None: it is not measured."""
    return KEY_TOKENS.system if KEY_TOKENS and not has_own_tokenizer(wildcards) else None


def key_tokens_of(wildcards):
    """The files with the key tokens of the evaluation sets, if a system's LongPPL is measured."""
    name = evaluator_of(wildcards)
    return expand(rules.find_key_tokens.output.key_tokens, system=name) if name else []


def labels_of(systems):
    """Labels of systems and evaluation sets in tables and plots, by their names."""
    return {
        "system": {name: SYSTEMS[name].label for name in [*systems, *([KEY_TOKENS.system] if KEY_TOKENS else [])]},
        "dataset": {name: dataset.label for name, dataset in DATASETS.items()},
    }


def labels_of_rows():
    """Labels in the table and the curves of perplexity, in which systems that differ in the seed are one row."""
    labels = labels_of(TABLE_SYSTEMS)
    return labels | {"system": {name: EXPERIMENT.row_labels.get(name, label) for name, label in labels["system"].items()}}


def window_losses(records):
    """The files with the loss of each window, for records of perplexity."""
    return [f"{without_storage(record).removesuffix('.json')}.parquet" for record in records]


def answer_reports(wildcards):
    """The reports on the answers of fine-tuned systems."""
    if not CHAT:
        raise WorkflowError("no answers are compared: this needs a system with training.data: sft, and sft.held_out above 0")
    return rules.report_answers.output


def served_files(wildcards):
    """The GGUF files of the published models, and the table of their check."""
    if not EXPERIMENT.serving:
        raise WorkflowError("no GGUF files are configured; add the section serving:, for example serving: {gguf: [q8_0]}")
    files = expand(rules.convert_gguf.output, system=EXPERIMENT.served, format=EXPERIMENT.serving.gguf)
    return files + list(rules.report_serving.output)


def ablation_records(wildcards):
    """The records of perplexity of a grid."""
    cells = EXPERIMENT.ablations[wildcards.ablation].rows
    return expand(rules.evaluate_perplexity.output.records, system=cells, length=LENGTHS)


def ablation_reports(wildcards):
    """The reports of all ablations."""
    if not EXPERIMENT.ablations:
        raise WorkflowError(
            "no ablations are configured; add config/ablations.yaml after the experiment's file: "
            "--configfile config/x.yaml config/ablations.yaml"
        )
    return expand(rules.report_ablation.output, ablation=EXPERIMENT.ablations)
