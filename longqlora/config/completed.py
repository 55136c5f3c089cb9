"""A configuration with everything filled in, as the workflow uses it."""

from longqlora.config.settings import (
    Ablation,
    Attention,
    CorpusSettings,
    CorpusSource,
    DecontaminationSettings,
    Device,
    EvaluationSettings,
    MergeSettings,
    Precision,
    PretrainingSettings,
    ProgressSettings,
    PublishedRow,
    RetrievalSettings,
    RopeScaling,
    Section,
    ServingSettings,
    SftSettings,
    TrainingSettings,
)


class System(Section):
    """One row of the table, or one cell of an ablation, with everything filled in; the fields are those of
    :class:`SystemSection`.

    Attributes:
        model: with ``base``, the folder of that system's merged weights.
        training: None if the system is not trained.
        progress: None if the system is not trained.
        seed: of its training.
    """

    label: str
    model: str
    tokenizer: str
    target_context: int | None
    rope_scaling: RopeScaling
    rope_factor: float | None
    rope_theta: float | None
    base: str | None
    weights_of: str | None
    merged: bool
    precision: Precision
    evaluation_attention: Attention
    training: TrainingSettings | None
    progress: ProgressSettings | None
    seed: int


class Shard(Section):
    """What one job reads of a corpus.

    Attributes:
        source: with the files of this job alone.
        part: (index, count): of the files that a remote pattern matches, this job reads every count-th one.
    """

    source: CorpusSource
    part: tuple[int, int]


class Experiment(Section):
    """An experiment with everything filled in: wildcards expanded, each system with its own training.

    Attributes:
        name: everything it makes lies under ``results/<name>/``.
        systems: those that the configuration lists and the cells of the ablations, by name.
        listed: names of the systems that the configuration lists.
        rows: names of those that are rows of the table.
        untrained: names of those that ``untrained_rows`` stands for.
        seed_rows: the row of the configuration, by the names of the systems that are this row trained by one of several seeds.
        row_labels: labels of these rows, by the same names.
        retrieval_lengths: context lengths in tokens.
        filler: name of the evaluation set that retrieval takes its text from.

    The other fields are those of :class:`Configuration`.
    """

    name: str
    seed: int
    device: Device
    base_model: str
    tokenizer: str
    pretraining: PretrainingSettings | None
    max_malformed_share: float
    decontamination: DecontaminationSettings
    corpus: CorpusSettings | None
    sft: SftSettings | None
    systems: dict[str, System]
    listed: list[str]
    rows: list[str]
    untrained: list[str]
    seed_rows: dict[str, str]
    row_labels: dict[str, str]
    evaluation: EvaluationSettings
    retrieval: RetrievalSettings
    retrieval_lengths: list[int]
    filler: str
    merge: MergeSettings
    serving: ServingSettings | None
    ablations: dict[str, Ablation]
    published: list[PublishedRow]

    @property
    def results(self) -> str:
        """Folder of everything that the experiment makes."""
        return f"results/{self.name}"

    def key_of(self, system: str) -> str:
        """The key of the configuration that a system is from."""
        return "untrained_rows" if system in self.untrained else f"systems.{self.seed_rows.get(system, system)}"

    def stages_of(self, system: str) -> list[str]:
        """Names of the systems whose trainings make a system, in their order; the last one is the system itself."""
        base = self.systems[system].base
        return [*(self.stages_of(base) if base else []), system]

    def continues_its_base(self, system: str) -> bool:
        """Whether a system has the context of the system that it is trained on, so that nothing is scaled any more."""
        base = self.systems[system].base
        return base is not None and self.systems[base].target_context == self.systems[system].target_context

    @property
    def base_row(self) -> str | None:
        """Name of the row that is the base model as it is, preferably in the experiment's precision; None if there is none."""
        found = [
            name
            for name, system in self.systems.items()
            if name in self.rows
            and (system.model, system.evaluation_attention) == (self.base_model, "full")
            and not (system.target_context or system.training or system.weights_of)
        ]
        return min(found, key=lambda name: self.systems[name].precision != self.evaluation.precision, default=None)

    @property
    def extended_rows(self) -> dict[int, dict[str, list[str]]]:
        """Names of the ``trained`` and the ``untrained`` rows that extend the base model, by target context, where there are
        both; without those in another precision or with another attention than usual."""
        found: dict[int, dict[str, list[str]]] = {}
        for name in self.rows:
            system = self.systems[name]
            first = self.systems[self.stages_of(name)[0]]
            how = (first.model, system.evaluation_attention, system.precision)
            if system.target_context and how == (self.base_model, "full", self.evaluation.precision):
                rows = found.setdefault(system.target_context, {"trained": [], "untrained": []})
                rows["trained" if system.training or system.weights_of else "untrained"].append(name)
        return {target: rows for target, rows in found.items() if all(rows.values())}

    @property
    def harness_rows(self) -> list[str]:
        """Names of the rows that are measured on tasks of lm-evaluation-harness: those with full attention, because the harness
        reads with a cache, which the shifted sparse attention does not support."""
        return [name for name in self.rows if self.systems[name].evaluation_attention == "full"]

    @property
    def harness_cells(self) -> dict[str, tuple[str, int | None]]:
        """Each task of lm-evaluation-harness and the length of its texts, if it makes them, by the name of its record."""
        harness = self.evaluation.harness
        if harness is None:
            return {}
        lengths = harness.lengths or self.evaluation.lengths
        cells: dict[str, tuple[str, int | None]] = {task: (task, None) for task in harness.tasks}
        return cells | {f"{task}-{length}": (task, length) for task in harness.long_tasks for length in lengths}

    @property
    def served(self) -> list[str]:
        """Names of the trained systems that are written as GGUF files."""
        if self.serving is None:
            return []
        return self.serving.systems or [name for name in self.listed if self.systems[name].training]

    @property
    def pretrained(self) -> str:
        """Folder of a base model that the experiment trains from scratch."""
        return f"{self.results}/pretrained"
