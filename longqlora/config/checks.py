"""How the values of a configuration fit together: what a type alone cannot say."""

from collections.abc import Iterator

from longqlora.config.completed import Experiment, System
from longqlora.config.settings import Configuration, CorpusSettings, SystemSection, TrainingSettings
from longqlora.config.shards import sample_shares
from longqlora.config.systems import protocol_at


def check_values(config: Configuration, experiment: Experiment) -> Iterator[str]:
    """Yield a line for each mistake.

    Args:
        config: as it was written.
        experiment: made from it.
    """
    yield from check_evaluation(experiment)
    yield from check_harness(experiment)
    yield from check_key_tokens(experiment)
    yield from check_ablations(config, experiment)
    yield from check_served(experiment)
    yield from check_pretraining(experiment)
    datasets = experiment.evaluation.datasets
    yield from check_distinct("evaluation.datasets", "label", [dataset.label for dataset in datasets.values()])
    labels_of_seeds = [experiment.row_labels[name] for name, row in experiment.seed_rows.items() if name == row]
    labels = [experiment.systems[name].label for name in experiment.listed]
    yield from check_distinct("systems", "label", labels + labels_of_seeds)
    for name in config.systems:
        if experiment.seed_rows.get(name, name) != name:
            yield f"systems.{name}: is the name of a seed of {experiment.seed_rows[name]!r}; choose another name"
            continue
        yield from check_system(name, config, experiment)
    for name, system in experiment.systems.items():
        # a right base would give it its context
        has_wrong_base = name in config.systems and config.systems[name].base is not None and system.base is None
        is_repeated = experiment.seed_rows.get(name, name) != name  # by another seed
        if system.training is not None and not has_wrong_base and not is_repeated:
            yield from check_training(name, system, experiment)
        if system.training is not None and name in config.systems:
            yield from check_length(name, config, system)
            yield from check_variants(name, config, system)
    if not experiment.rows:
        yield "systems: none is a row of the tables; remove table_row: false from at least one"
    yield from check_data(experiment)
    labels_of_sets = {dataset.label for dataset in datasets.values()}
    for row in experiment.published:
        if row.dataset not in labels_of_sets:
            legal = ", ".join(sorted(labels_of_sets))
            yield f"published: dataset {row.dataset!r} is not a label of evaluation.datasets (legal: {legal})"


def check_pretraining(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with the training of a base model from scratch."""
    pretraining = experiment.pretraining
    if pretraining is None:
        return
    if experiment.base_model != experiment.pretrained:
        yield (
            f"base_model.path: {experiment.base_model} is not what the section pretraining makes; "
            f"write {experiment.pretrained}, or remove the section"
        )
    elif experiment.tokenizer != experiment.pretrained:
        yield f"base_model.tokenizer: {experiment.tokenizer} is not what the section pretraining makes; leave the key out"
    if pretraining.tokens_per_step % pretraining.context:
        yield (
            f"pretraining.tokens_per_step: {pretraining.tokens_per_step} is not a multiple of pretraining.context, "
            f"{pretraining.context}"
        )
    evaluated = {path: name for name, dataset in experiment.evaluation.datasets.items() for path in dataset.paths}
    for path in pretraining.paths:
        if path in evaluated:
            yield f"pretraining.paths: {path} is also in evaluation.datasets.{evaluated[path]}, and would be trained on"
    shape = pretraining.architecture
    width, heads, key_value_heads = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    if width % (2 * heads):  # rotary embeddings rotate pairs
        yield f"pretraining.architecture.hidden_size: {width} is not a multiple of 2 * num_attention_heads, {2 * heads}"
    if heads % key_value_heads:
        yield (
            f"pretraining.architecture.num_attention_heads: {heads} is not a multiple of num_key_value_heads, {key_value_heads}"
        )


def check_evaluation(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with how perplexity and retrieval are measured."""
    evaluation, shortest = experiment.evaluation, min(experiment.evaluation.lengths)
    stride = protocol_at(evaluation, shortest).stride
    if evaluation.protocol == "longqlora" and evaluation.stride:
        yield "evaluation.stride: in the protocol longqlora the stride is the window; leave it out, or use exact"
    elif stride > shortest:
        yield f"evaluation.stride: {stride} exceeds the shortest of evaluation.lengths, {shortest}"
    if experiment.filler not in evaluation.datasets:
        legal = ", ".join(evaluation.datasets)
        yield f"retrieval.filler: {experiment.filler!r} is not a name of evaluation.datasets (legal: {legal})"
    for length in experiment.retrieval_lengths if experiment.retrieval.tasks else []:
        if length not in evaluation.lengths:
            yield f"retrieval.lengths: {length} is not in evaluation.lengths ({', '.join(map(str, evaluation.lengths))})"


def check_harness(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with the tasks of lm-evaluation-harness."""
    harness = experiment.evaluation.harness
    if harness is None:
        return
    if not harness.tasks and not harness.long_tasks:
        yield "evaluation.harness: names no task; give tasks or long_tasks"
    elif not experiment.harness_rows:
        yield "evaluation.harness: no row of the table has full attention, which the harness needs"
    for name in set(harness.tasks) & set(harness.long_tasks):
        yield f"evaluation.harness.long_tasks: {name!r} is in tasks, too; keep one of them"
    lengths = harness.lengths or experiment.evaluation.lengths
    for name in set(harness.tasks) & {f"{task}-{length}" for task in harness.long_tasks for length in lengths}:
        yield f"evaluation.harness.tasks: {name!r} is the name of the results of one of the long_tasks, too"
    if harness.lengths and not harness.long_tasks:
        yield "evaluation.harness.lengths: has no effect without long_tasks"


def check_key_tokens(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with how the key tokens of LongPPL are found."""
    evaluation, key_tokens, key = experiment.evaluation, experiment.evaluation.key_tokens, "evaluation.key_tokens"
    if key_tokens is None:
        return
    if evaluation.protocol != "exact":
        yield f"{key}: needs evaluation.protocol: exact, which scores every token once, found {evaluation.protocol}"
    if key_tokens.short_context >= max(evaluation.lengths):
        yield (
            f"{key}.short_context: {key_tokens.short_context} is not below the longest of evaluation.lengths, "
            f"{max(evaluation.lengths)}"
        )
    same = [name for name in experiment.listed if experiment.systems[name].tokenizer == experiment.tokenizer]
    if key_tokens.system not in experiment.listed:
        yield f"{key}.system: {key_tokens.system!r} is not a system (legal: {', '.join(same)})"
    elif key_tokens.system not in same:
        tokenizer = experiment.systems[key_tokens.system].tokenizer
        yield (
            f"{key}.system: {key_tokens.system!r} has the tokenizer {tokenizer} instead of the base model's "
            f"(legal: {', '.join(same)}); if the two are equal, set its tokenizer to {experiment.tokenizer}"
        )


def check_ablations(config: Configuration, experiment: Experiment) -> Iterator[str]:
    """Yield which ablations do not vary a trained system, or vary nothing."""
    trained = [name for name in experiment.listed if experiment.systems[name].training]
    for name, ablation in config.ablations.items():
        if ablation.system not in trained:
            legal = ", ".join(trained)
            yield f"ablations.{name}.system: {ablation.system!r} is not a trained system (legal: {legal or 'none'})"
            continue
        training = experiment.systems[ablation.system].training
        if ablation.grid.rope_scaling and experiment.systems[ablation.system].base:
            yield f"ablations.{name}.grid.rope_scaling: {ablation.system!r} has the scaling of its base; vary that one"
        if ablation.grid.rank and training and training.method == "full":
            yield f"ablations.{name}.grid.rank: {ablation.system!r} trains all weights and has no rank"
        if "theta" in (ablation.grid.rope_scaling or ()) and experiment.systems[ablation.system].rope_theta is None:
            yield f"ablations.{name}.grid.rope_scaling: theta needs systems.{ablation.system}.rope_theta"
        if "best" in (ablation.grid.rope_scaling or ()) and experiment.systems[ablation.system].rope_factor:
            yield f"ablations.{name}.grid.rope_scaling: best cannot be combined with systems.{ablation.system}.rope_factor"
        if not experiment.ablations[name].axes:
            yield f"ablations.{name}.grid: names no setting (legal: {', '.join(type(ablation.grid).model_fields)})"


def check_served(experiment: Experiment) -> Iterator[str]:
    """Yield which systems cannot be written as GGUF files, because they are not trained here."""
    trained = [name for name in experiment.listed if experiment.systems[name].training]
    for name in experiment.served:
        if name not in trained:
            yield f"serving.systems: {name!r} is not a trained system (legal: {', '.join(trained) or 'none'})"
    if experiment.serving and not trained and not experiment.serving.systems:
        yield "serving: no system is trained, so there is no model to serve; remove the section"


def check_system(name: str, config: Configuration, experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with a listed system: keys that do not go with each other."""
    row, system = config.systems[name], experiment.systems[name]
    if row.training is not None and row.model is not None and system.model != experiment.base_model:
        yield f"systems.{name}.model: {system.model} is evaluated as it is; only the base_model is trained"
    key_tokens = experiment.evaluation.key_tokens
    if row.training is None and not row.table_row and not (key_tokens and key_tokens.system == name):
        yield f"systems.{name}.table_row: false needs 'training': of a system that is not trained, nothing else would be made"
    if row.base is not None:
        yield from check_base(name, config, experiment)
    if not experiment.continues_its_base(name):
        yield from check_scaling(name, row, system)
    if row.rope_scaling == "best" and row.weights_of is None and not experiment.continues_its_base(name):
        yield from check_choice(name, system, experiment)
    if row.tokenizer is not None and row.model is None and row.weights_of is None:
        yield f"systems.{name}.tokenizer: has no effect without model; the tokenizer of the base model is base_model.tokenizer"
    trained = experiment.systems[row.weights_of or name].training if (row.weights_of or name) in experiment.systems else None
    if row.merged is False and (trained is None or trained.method == "full"):
        yield f"systems.{name}.merged: false needs an adapter, training of method qlora or lora"
    if row.weights_of is None:
        return
    owner = config.systems.get(row.weights_of)
    if owner is None or owner.training is None:
        legal = ", ".join(other for other in config.systems if config.systems[other].training) or "none"
        yield f"systems.{name}.weights_of: {row.weights_of!r} is not a trained system (legal: {legal})"
        return
    for key in ("training", "base", "target_context", "rope_scaling", "rope_factor", "rope_theta", "model", "tokenizer"):
        given = getattr(row, key)
        if given is not None and (key == "training" or given != getattr(owner, key)):
            yield f"systems.{name}.{key}: comes from {row.weights_of!r}, whose weights this system has; leave it out"


def check_base(name: str, config: Configuration, experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with a listed system that is trained on another one."""
    row, system, key = config.systems[name], experiment.systems[name], f"systems.{name}.base"
    base = config.systems.get(row.base or "")
    trained = [other for other in config.systems if config.systems[other].training and other != name]
    if row.weights_of is not None:  # reported below, with the other keys that come from there
        return
    if row.training is None:
        yield f"{key}: needs 'training'; to evaluate the weights of {row.base!r} in another way, write weights_of: {row.base}"
    if row.model is not None:
        yield f"{key}: cannot be combined with model: the model of {row.base!r} is trained on"
    if row.base == name or (base and base.training and system.base is None):
        yield f"{key}: {row.base!r} is this system itself, or is trained on it"
    elif base and base.weights_of:
        yield f"{key}: {row.base!r} has the weights of {base.weights_of!r}; write base: {base.weights_of}"
    elif base and not base.training:
        yield f"{key}: {row.base!r} is not trained; leave base out, and give target_context and rope_scaling to this system"
    elif base is None:
        yield f"{key}: {row.base!r} is not a trained system (legal: {', '.join(trained) or 'none'})"
    elif row.rope_scaling and experiment.continues_its_base(name):
        yield (
            f"systems.{name}.rope_scaling: has no effect without a target_context above that of {row.base!r}, "
            f"{system.target_context}, whose scaling this system has; leave it out"
        )
    elif extends_a_choice(system, experiment):
        yield (
            f"systems.{name}.target_context: {row.base!r} is not extended further, because its rope_scaling: best is chosen "
            "only when the workflow runs; name the chosen scaling in place of best, or leave target_context out"
        )


def extends_a_choice(system: System, experiment: Experiment) -> bool:
    """Whether a system extends a system further whose scaling is not known before it is chosen (``rope_scaling: best``)."""
    base = experiment.systems[system.base] if system.base else None
    return base is not None and base.rope_scaling == "best" and (system.target_context or 0) > (base.target_context or 0)


def check_scaling(name: str, row: SystemSection, system: System) -> Iterator[str]:
    """Yield what is wrong with how a listed system's positions are scaled."""
    for key in ("rope_scaling", "rope_factor", "rope_theta"):
        if getattr(row, key) is not None and system.target_context is None:
            yield f"systems.{name}.{key}: has no effect without target_context; give both"
    if system.rope_scaling == "theta":
        if system.rope_theta is None:
            yield f"systems.{name}.rope_theta: missing; rope_scaling: theta needs it (rope_scaling: ntk computes it)"
        if system.rope_factor is not None:
            yield f"systems.{name}.rope_factor: has no effect with rope_scaling: theta, which has rope_theta"
    elif system.rope_theta is not None:
        yield f"systems.{name}.rope_theta: works only with rope_scaling: theta, found rope_scaling: {system.rope_scaling}"


def check_choice(name: str, system: System, experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with a listed system whose scaling is chosen (``rope_scaling: best``)."""
    key = f"systems.{name}"
    if system.model != experiment.base_model:
        yield f"{key}.rope_scaling: best works only for the base_model, found model: {system.model}"
    elif system.training is None and experiment.corpus is None:
        yield f"{key}.rope_scaling: best is chosen on training texts; add the section corpus:"
    if system.rope_factor is not None:
        yield f"{key}.rope_factor: has no effect with rope_scaling: best, whose factor follows from target_context"


def check_length(name: str, config: Configuration, system: System) -> Iterator[str]:
    """Yield that the length of a training is not given, or given twice."""
    training, own = system.training, config.systems[name].training
    assert training is not None
    assert own is not None
    key = f"systems.{name}.training" if {"steps", "epochs"} & own.model_fields_set else "training"
    if training.steps is not None and training.epochs is not None:
        yield f"{key}: has both steps ({training.steps}) and epochs ({training.epochs:g}); keep one of them"
    elif training.steps is None and training.epochs is None:
        yield f"{key}: needs steps or epochs"


def check_training(name: str, system: System, experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with a trained system."""
    training, key = system.training, f"systems.{name}"
    assert training is not None
    if system.target_context is None:
        yield f"{key}.target_context: missing; a trained system needs the context length to reach, in tokens"
    if getattr(experiment, training.data) is None:
        yield f"{key}.training.data: {training.data!r} is not configured; add the section {training.data}:"
    for option, data in (("isolate_documents", "corpus"), ("pose_window", "corpus"), ("pack_records", "sft")):
        if getattr(training, option) and training.data != data:
            yield f"{key}.training.{option}: works only with data: {data}, found data: {training.data}"
    yield from (f"{key}.training.pose_window: {problem}" for problem in pose_problems(training, system.target_context))
    for problem in sequence_parallel_problems(training):
        yield f"{key}.training.sequence_parallel: {problem}"
    if training.sequence_parallel > 1 and system.rope_scaling == "dynamic":
        yield f"{key}.rope_scaling: dynamic depends on the length of the window, of which a process has a part only"
    if training.full_attention_share and training.attention == "full":
        yield f"{key}.training.full_attention_share: has no effect with attention: full"
    elif (share := training.full_attention_share) and training.steps and not round(share * training.steps):
        yield f"{key}.training.full_attention_share: {share:g} of {training.steps} steps is less than one step"
    if training.offload and not training.zero_stage:
        yield f"{key}.training.offload: needs DeepSpeed, zero_stage: 2 or 3"
    longest = experiment.sft.max_tokens if experiment.sft else 0
    if training.pack_records and longest > (system.target_context or longest):
        yield f"{key}.training.pack_records: sft.max_tokens is {longest}, more than the window of {system.target_context}"


def check_variants(name: str, config: Configuration, system: System) -> Iterator[str]:
    """Yield which variants of an adapter are asked for where none is trained. Those of the experiment are for its other systems
    if only this one trains all weights."""
    own, training = config.systems[name].training, system.training
    if own is None or training is None or training.method != "full":
        return
    common = {"training": config.training} if config.training.method == "full" else {}
    for key, section in ({f"systems.{name}.training": own} | common).items():
        for variant in ("rslora", "dora", "loraplus_ratio"):
            if getattr(section, variant):
                yield f"{key}.{variant}: needs an adapter, method qlora or lora, found method: full"


def sequence_parallel_problems(training: TrainingSettings) -> Iterator[str]:
    """Yield why processes cannot share the windows of a training."""
    size, processes = training.sequence_parallel, training.num_processes * training.num_nodes
    if size == 1:
        return
    if processes % size:
        yield f"{size} does not divide the number of processes, num_processes · num_nodes = {processes}"
    if training.zero_stage:
        yield f"{size} does not work with zero_stage: {training.zero_stage}"
    for option in ("isolate_documents", "pack_records", "pose_window"):
        if getattr(training, option):
            yield f"{size} does not work with {option}: processes share windows of one document only"


def pose_problems(training: TrainingSettings, target_context: int | None) -> Iterator[str]:
    """Yield why a system cannot be trained in short windows with long positions."""
    window = training.pose_window
    if window is None:
        return
    if window >= (target_context or window + 1):
        yield f"{window} is not below target_context, {target_context}; the positions of a window could not skip any"
    if training.attention != "full":
        yield f"needs attention: full, found {training.attention}, which would cut the short window into groups"
    if training.isolate_documents:
        yield "cannot be combined with isolate_documents: true, which keeps the two parts of a window apart"


def check_data(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with the corpus and the instruction set."""
    corpus, sft = experiment.corpus, experiment.sft
    if corpus:
        if corpus.min_tokens > corpus.max_tokens:
            yield f"corpus.min_tokens: {corpus.min_tokens} exceeds corpus.max_tokens, {corpus.max_tokens}"
        yield from check_corpus_shares(corpus)
    if sft:
        if sft.held_out >= sft.num_records:
            yield f"sft.held_out: {sft.held_out} of sft.num_records {sft.num_records} leaves nothing to train on"
        yield from check_distinct("sft.sources", "name", [source.name for source in sft.sources])
        yield from check_shares("sft.sources", [source.share for source in sft.sources])


def check_corpus_shares(corpus: CorpusSettings) -> Iterator[str]:
    """Yield what is wrong with the shares of the corpus."""
    with_share = [str(source.name) for source in corpus.sources if source.share is not None]
    without = [str(source.name) for source in corpus.sources if source.share is None]
    if with_share and corpus.shares:
        yield "corpus.shares: give shares either here or to the sources (corpus.sources), not both"
    elif with_share and without:
        yield f"corpus.sources: {', '.join(without)} has no share but {', '.join(with_share)} has; give one to all or to none"
    elif len(set(with_share)) < len(with_share):
        yield f"corpus.sources: every source with a share needs a name of its own, found {', '.join(with_share)}"
    elif shares := sample_shares(corpus):
        yield from check_shares("corpus.shares" if corpus.shares else "corpus.sources", list(shares.values()))


def check_distinct(key: str, what: str, values: list[str]) -> Iterator[str]:
    """Yield which labels or names occur more than once."""
    for value in dict.fromkeys(value for number, value in enumerate(values) if value in values[:number]):
        yield f"{key}: every {what} must be different, but {value!r} occurs {values.count(value)} times"


def check_shares(key: str, shares: list[float]) -> Iterator[str]:
    """Yield that shares do not add up to 1."""
    if abs(sum(shares) - 1) > 1e-6:
        yield f"{key}: the shares add up to {sum(shares):.9g}, they must add up to 1"
