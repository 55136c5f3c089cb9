"""Systems with everything filled in, and what each of them is evaluated as."""

from os.path import normpath

from longqlora.config.completed import Experiment, System
from longqlora.config.settings import (
    DEFAULT_ROPE_SCALING,
    Configuration,
    EvaluatedModel,
    EvaluationSettings,
    ProgressSettings,
    Protocol,
    RopeExtension,
    RopeScaling,
    SystemSection,
    TrainingSection,
    TrainingSettings,
)

UNTRAINED_LABELS: dict[RopeScaling, str] = {"linear": "linear", "dynamic": "dynamic NTK", "ntk": "NTK", "yarn": "YaRN"}
LONGLORA_STRIDE = 256  # tokens, as published
DEFAULT_GROUP_RATIO = TrainingSettings().group_ratio
ADAPTER_SETTINGS = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")


def with_untrained_rows(config: Configuration) -> Configuration:
    """A configuration with the rows that its ``untrained_rows`` stands for, before the first trained system."""
    if config.untrained_rows is None:
        return config
    added = {
        f"untrained-{scaling}": SystemSection(
            label=f"{label} to {config.untrained_rows}, untrained", target_context=config.untrained_rows, rope_scaling=scaling
        )
        for scaling, label in UNTRAINED_LABELS.items()
    }
    names = list(config.systems)
    first = next((number for number, name in enumerate(names) if config.systems[name].training), len(names))
    order = [*names[:first], *(name for name in added if name not in names), *names[first:]]
    return config.model_copy(update={"systems": {name: config.systems.get(name) or added[name] for name in order}})


def complete_system(name: str, config: Configuration) -> System:
    """A listed system, its missing settings filled in from the experiment, or from the system in ``weights_of``."""
    row = config.systems[name]
    owner = config.systems.get(row.weights_of or "", SystemSection())
    model = row.model or owner.model
    training, progress = complete_training(row, config.training)
    return System(
        label=row.label or name,
        model=one_name(model or config.base_model.path),
        tokenizer=one_name(row.tokenizer or row.model or owner.tokenizer or owner.model or base_tokenizer(config)),
        target_context=row.target_context or owner.target_context,
        rope_scaling=row.rope_scaling or owner.rope_scaling or DEFAULT_ROPE_SCALING,
        rope_factor=row.rope_factor or owner.rope_factor,
        rope_theta=row.rope_theta or owner.rope_theta,
        weights_of=row.weights_of,
        merged=True if row.merged is None else row.merged,
        precision=row.precision or config.evaluation.precision,
        evaluation_attention=row.evaluation_attention or "full",
        training=training,
        progress=progress,
    )


def one_name(folder: str) -> str:
    """A folder in one spelling, without ``./`` and a slash at its end; a hub id stays as it is."""
    return normpath(folder)


def base_tokenizer(config: Configuration) -> str:
    """Folder or hub id of the base model's tokenizer."""
    return one_name(config.base_model.tokenizer or config.base_model.path)


def complete_training(row: SystemSection, common: TrainingSection) -> tuple[TrainingSettings | None, ProgressSettings | None]:
    """The settings of a trained system: its own, and the experiment's where it has none."""
    if row.training is None:
        return None, None
    own = {name: getattr(row.training, name) for name in row.training.model_fields_set}
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if length in own and other not in own:
            own[other] = None
    settings = common.model_copy(update=own)
    if settings.attention == "full" and common.attention != "full" and "full_attention_share" not in own:
        settings = settings.model_copy(update={"full_attention_share": 0.0})  # the others' share is not meant for this one
    if settings.method == "full":  # no adapter: its settings are not used, and must not retrain the system
        settings = settings.model_copy(update={name: TrainingSection.model_fields[name].default for name in ADAPTER_SETTINGS})
    return (
        TrainingSettings(**{name: getattr(settings, name) for name in TrainingSettings.model_fields}),
        ProgressSettings(**{name: getattr(settings, name) for name in ProgressSettings.model_fields}),
    )


def untrained_model(experiment: Experiment, name: str) -> EvaluatedModel:
    """A system without its training: the base or its published model, with the system's context extension."""
    system = experiment.systems[name]
    training = experiment.systems[system.weights_of or name].training
    return EvaluatedModel(
        path=system.model,
        extension=extension_of(system),
        precision=system.precision,
        attention=system.evaluation_attention,
        group_ratio=training.group_ratio if training else DEFAULT_GROUP_RATIO,
    )


def evaluated_model(experiment: Experiment, name: str) -> EvaluatedModel:
    """What a system is evaluated as: the weights that training made of it, its adapter on the base, its published model, or
    the base."""
    system, model = experiment.systems[name], untrained_model(experiment, name)
    owner = system.weights_of or name
    training = experiment.systems[owner].training
    if training is None:
        return model
    if system.merged or training.method == "full":  # the configuration of the weights has the scaling
        return model.model_copy(update={"path": f"{experiment.results}/weights/{owner}", "extension": None})
    return model.model_copy(update={"adapter": f"{experiment.results}/adapters/{owner}"})


def extension_of(system: System) -> RopeExtension | None:
    """How a system's context is extended; None where it is not."""
    if system.target_context is None:
        return None
    return RopeExtension(
        scaling=system.rope_scaling,
        target_context=system.target_context,
        factor=system.rope_factor,
        theta=system.rope_theta,
    )


def protocol_at(evaluation: EvaluationSettings, eval_length: int) -> Protocol:
    """How perplexity is measured at a context length; where the stride is left out, it is the window, with longlora 256."""
    stride = evaluation.stride or (LONGLORA_STRIDE if evaluation.protocol == "longlora" else eval_length)
    return Protocol(name=evaluation.protocol, window=eval_length, stride=stride)
