"""An experiment: its configuration checked before any job starts, and everything in it filled in.

Imports nothing heavy: the workflow reads it on every start.
"""

from collections.abc import Callable, Iterator

from longqlora.config.ablations import add_ablations
from longqlora.config.checks import check_values
from longqlora.config.completed import Experiment
from longqlora.config.paths import expand
from longqlora.config.settings import Configuration, CorpusSettings, PretrainingSettings, RetrievalSettings, SftSettings
from longqlora.config.systems import (
    base_tokenizer,
    complete_system,
    label_of,
    one_name,
    seed_rows,
    with_seeds,
    with_untrained_rows,
)
from longqlora.config.validation import ConfigError, follows_from, validate


def load_experiment(config: object, *further_checks: Callable[[Experiment], Iterator[str]]) -> Experiment:
    """Check a configuration and fill in everything that it leaves open.

    Args:
        config: as parsed from YAML.
        further_checks: functions that yield a line for each mistake, in addition to the checks of the values.

    Raises:
        ConfigError: with all mistakes, a line each.
    """
    valid, problems, removed = validate(config)
    if valid is None:
        raise ConfigError(problems)
    experiment = complete(valid)
    for check in (lambda experiment: check_values(valid, experiment), *further_checks):
        problems += [line for line in check(experiment) if not any(follows_from(line, key) for key in removed)]
    if problems:
        raise ConfigError(problems)
    return experiment


def complete(config: Configuration) -> Experiment:
    """Fill in what a configuration leaves open, expand wildcards, and add the cells of the ablations to the systems."""
    with_rows = with_untrained_rows(config)
    written, config, rows_by_seed = config, with_seeds(with_rows), seed_rows(with_rows)
    listed = {name: complete_system(name, config) for name in config.systems}
    systems, ablations = add_ablations(listed, config.ablations)
    evaluation, retrieval = config.evaluation, config.retrieval
    datasets = {
        name: dataset.model_copy(update={"paths": expand_all(dataset.paths)}) for name, dataset in evaluation.datasets.items()
    }
    return Experiment(
        name=config.experiment,
        base_model=one_name(config.base_model.path),
        tokenizer=base_tokenizer(config),
        corpus=complete_corpus(config.corpus) if config.corpus else None,
        sft=complete_sft(config.sft) if config.sft else None,
        systems=systems,
        listed=list(listed),
        rows=[name for name in listed if config.systems[name].table_row],
        untrained=[name for name in with_rows.systems if name not in written.systems],
        seed_rows=rows_by_seed,
        row_labels={name: label_of(row, with_rows.systems) for name, row in rows_by_seed.items()},
        evaluation=evaluation.model_copy(update={"datasets": datasets}),
        retrieval=RetrievalSettings(
            tasks=retrieval.tasks,
            depths=retrieval.depths,
            samples=retrieval.samples,
            chat_template=retrieval.chat_template,
            seed=config.seed,
        ),
        retrieval_lengths=retrieval.lengths or evaluation.lengths,
        filler=retrieval.filler or next(iter(datasets)),
        ablations=ablations,
        pretraining=complete_pretraining(config.pretraining) if config.pretraining else None,
        **{
            name: getattr(config, name)
            for name in ("seed", "device", "max_malformed_share", "decontamination", "merge", "serving", "published")
        },
    )


def expand_all(patterns: list[str]) -> list[str]:
    """The files that several patterns match."""
    return [path for pattern in patterns for path in expand(pattern)]


def complete_pretraining(pretraining: PretrainingSettings) -> PretrainingSettings:
    """A pre-training whose texts have no wildcards of local files."""
    return pretraining.model_copy(update={"paths": expand_all(pretraining.paths)})


def complete_corpus(corpus: CorpusSettings) -> CorpusSettings:
    """A corpus whose sources have a name and no wildcards of local files."""
    sources = [
        source.model_copy(update={"name": source.name or source.paths[0], "paths": expand_all(source.paths)})
        for source in corpus.sources
    ]
    return corpus.model_copy(update={"sources": sources})


def complete_sft(sft: SftSettings) -> SftSettings:
    """An instruction set whose sources have no wildcards of local files."""
    sources = [source.model_copy(update={"paths": expand_all(source.paths)}) for source in sft.sources]
    return sft.model_copy(update={"sources": sources})
