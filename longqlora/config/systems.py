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
ADAPTER_SETTINGS = ("rank", "alpha", "rslora", "dora", "loraplus_ratio", "dropout", "target_modules", "modules_to_save")


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


def seeds_of(name: str, config: Configuration) -> list[int]:
    """The seeds that a listed system is trained by."""
    training = config.systems[name].training
    return (training.seeds or config.training.seeds or [config.seed]) if training else []


def name_by_seed(name: str, seed: int, config: Configuration) -> str:
    """The name of a listed system as it is trained by a seed: its own for the first one, and for one that it does not have."""
    return f"{name}.seed-{seed}" if seed in seeds_of(name, config)[1:] else name


def seed_rows(config: Configuration) -> dict[str, str]:
    """The listed systems with several seeds, by the names of the systems that they are for each of them."""
    several = {name: seeds for name in config.systems if len(seeds := seeds_of(name, config)) > 1}
    return {name_by_seed(name, seed, config): name for name, seeds in several.items() for seed in seeds}


def with_seeds(config: Configuration) -> Configuration:
    """A configuration that lists a system once for each of its seeds, on the same seed of its base if that has it."""
    systems = {}
    for name, row in config.systems.items():
        seeds = seeds_of(name, config)
        if row.training is None or len(seeds) < 2:
            systems[name] = row
            continue
        for seed in seeds:
            changes = {
                "label": f"{label_of(name, config.systems)}, seed {seed}",
                "base": name_by_seed(row.base, seed, config) if row.base in config.systems else row.base,
                "training": row.training.model_copy(update={"seeds": [seed]}),
            }
            systems[name_by_seed(name, seed, config)] = row.model_copy(update=changes)
    return config.model_copy(update={"systems": systems})


def complete_system(name: str, config: Configuration) -> System:
    """A listed system; the experiment, the system in ``weights_of`` and that in ``base`` fill in what it leaves out."""
    row = config.systems[name]
    owner = config.systems.get(row.weights_of or "", SystemSection())
    bases = bases_of(row.weights_of or name, config.systems)
    base_rows = [config.systems[base] for base in bases]
    model = row.model or owner.model or (weights_folder(config.experiment, bases[0]) if bases else None)
    training, progress = complete_training(row, config.training)
    return System(
        label=label_of(name, config.systems),
        model=one_name(model or config.base_model.path),
        tokenizer=one_name(row.tokenizer or row.model or owner.tokenizer or owner.model or base_tokenizer(config)),
        target_context=next((each.target_context for each in (row, owner, *base_rows) if each.target_context), None),
        rope_scaling=next((each.rope_scaling for each in (row, owner, *base_rows) if each.rope_scaling), DEFAULT_ROPE_SCALING),
        rope_factor=row.rope_factor or owner.rope_factor,
        rope_theta=row.rope_theta or owner.rope_theta,
        base=bases[0] if bases else None,
        weights_of=row.weights_of,
        merged=True if row.merged is None else row.merged,
        precision=row.precision or config.evaluation.precision,
        evaluation_attention=row.evaluation_attention or "full",
        training=training,
        progress=progress,
        seed=next(iter(seeds_of(name, config)), config.seed),
    )


def bases_of(name: str, systems: dict[str, SystemSection]) -> list[str]:
    """The systems that a listed system is trained on: its base, the base of that one, and so on; none if they form a circle."""
    found: list[str] = []
    base = systems[name].base if name in systems else None
    while base in systems and base not in found and systems[base].training is not None:
        found.append(base)
        base = systems[base].base
    return found if name not in found else []


def label_of(name: str, systems: dict[str, SystemSection]) -> str:
    """A listed system's name in tables and plots: its label, or its own name and what it is trained on."""
    bases = bases_of(name, systems)
    return systems[name].label or (f"{name}, trained on {label_of(bases[0], systems)}" if bases else name)


def weights_folder(experiment: str, name: str) -> str:
    """The folder of the weights of a trained system, with its adapter merged into them."""
    return f"results/{experiment}/weights/{name}"


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
    """A system without its training: the model that it is trained on, or its published model, with the system's context
    extension."""
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
        return model.model_copy(update={"path": weights_folder(experiment.name, owner), "extension": None})
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
