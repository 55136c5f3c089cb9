"""The plan of an experiment: what each of its jobs needs on a device, told before the first one starts.

A plan needs the ``config.json`` of the models, no weights and no data. Jobs that need the same are traced once.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from longqlora.config.completed import Experiment, System
from longqlora.config.settings import Precision, RopeExtension, TrainingSettings
from longqlora.config.systems import evaluated_model, extension_of
from longqlora.modeling.scaling_candidates import candidates
from longqlora.planning import cost, peak_memory
from longqlora.planning.cards import Card
from longqlora.planning.changes import Change, change_of_cell
from longqlora.planning.data_sizes import evaluation_windows, training_windows
from longqlora.planning.disk import most_data_bytes, system_bytes
from longqlora.planning.training_plans import TracedOnce, TrainingPlans, traced_as
from longqlora.planning.work import shape_of
from longqlora.preflight import fit_problems
from longqlora.training.activations import Form

LONGEST_REASON = 500  # characters; transformers lists all models that it knows where it does not know one
ReadConfig = Callable[[str], dict]  # from the path of a model to its config.json


@dataclass(frozen=True)
class Job:
    """What a job needs; None: unknown.

    Attributes:
        stage: ``training``, ``merging``, ``perplexity`` or ``retrieval``.
        system: its name.
        length: tokens of a window, or of a prompt with its answer.
        peak: bytes of the device that a process of the job takes.
        parts: the same by part, see :class:`longqlora.planning.peak_memory.Memory`.
        at_peak: the operation at which the peak is reached.
        host: bytes of all its processes in the machine's memory.
        seconds: of the job, with loading.
        fits: whether the peak is within what the device has for a process.
        form: of a training: the activations that it keeps (:mod:`longqlora.training.activations`).
        change: of a training or a cell that does not fit: the cheapest change with which it does.
        problem: why the job could not be planned.
    """

    stage: str
    system: str
    length: int
    peak: int | None = None
    parts: dict[str, int] | None = None
    at_peak: str | None = None
    host: int | None = None
    seconds: float | None = None
    fits: bool | None = None
    form: Form | None = None
    change: Change | None = None
    problem: str | None = None


class Planner:
    """Plans the jobs of an experiment.

    Args:
        experiment: with everything filled in.
        card: the device that they run on; with ``memory`` None, nothing is said about what fits.
        read_config: reads the ``config.json`` of a model.
        tell: is told what is being planned, because it takes seconds.
    """

    def __init__(
        self, experiment: Experiment, card: Card, read_config: ReadConfig, tell: Callable[[str], None] = lambda text: None
    ):
        self.experiment, self.card, self.read_config, self.tell = experiment, card, read_config, tell
        self.configs: dict[str, dict | Exception] = {}
        self.once = TracedOnce()

    def plan(self) -> dict:
        """The plan, as its JSON file has it (docs/plan.md), without the longest contexts, which take most of the time."""
        jobs = list(self.jobs())
        known = [job.seconds for job in jobs if job.seconds is not None]
        return {
            "experiment": self.experiment.name,
            "device": {
                "name": self.card.name,
                "kind": self.card.device,
                "memory": self.card.memory,
                "compute": self.card.compute,
            },
            "jobs": [asdict(job) for job in jobs],
            "seconds": sum(known) if known and len(known) == len(jobs) else None,
            "longest_context": {},
            "disk": self.disk(),
        }

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs that run a model: trainings and merges first, then the cells of the tables."""
        systems, cells = self.experiment.systems, [row for grid in self.experiment.ablations.values() for row in grid.rows]
        for name, system in systems.items():
            if system.training:
                yield self.planned(Job("training", name, window_of(system)), self.training)
                if system.training.method != "full" and (name in self.experiment.listed or system.merged):
                    yield self.planned(Job("merging", name, window_of(system)), self.merging)
        retrieval = [max(self.experiment.retrieval_lengths)] if self.experiment.retrieval.tasks else []
        for name in dict.fromkeys([*self.experiment.rows, *cells]):
            for length in sorted(self.experiment.evaluation.lengths):
                yield self.planned(Job("perplexity", name, length), self.perplexity)
            for length in retrieval if name in self.experiment.rows else []:
                yield self.planned(Job("retrieval", name, length), self.retrieval)

    def planned(self, job: Job, needs: Callable[[Job], dict]) -> Job:
        """A job with what it needs, or with the reason why that is unknown: a plan must not stop a run."""
        self.tell(f"{job.stage} of {job.system} at {job.length:,} tokens")
        try:
            system = self.experiment.systems[job.system]
            if problems := list(fit_problems(self.config(system.model), system)):
                raise ValueError(f"{system.model}: {problems[0]}")
            found = needs(job)
        except Exception as error:  # any, from the code of an unusual model
            reason = f"{error}".strip() or type(error).__name__
            return Job(job.stage, job.system, job.length, problem=reason.splitlines()[0][:LONGEST_REASON])
        trace: peak_memory.Memory = found.pop("memory")
        processes: int = found.pop("processes", 1)
        budget = self.memory_of_one(processes)
        return Job(
            job.stage, job.system, job.length,
            peak=trace.peak, parts=trace.parts, at_peak=trace.at_peak, host=trace.host * processes,
            fits=None if budget is None else trace.peak <= budget, **found,
        )  # fmt: skip

    def memory_of_one(self, processes: int) -> int | None:
        """Memory in bytes that a process of a job has, if there are several: each has a GPU, but they share a machine's."""
        return self.card.memory // processes if self.card.memory and self.card.device == "cpu" else self.card.memory

    # --- what the jobs need ------------------------------------------------------------------------------------------------

    def training(self, job: Job) -> dict:
        """Memory, form and time of a training; where it does not fit, the cheapest change."""
        system = self.experiment.systems[job.system]
        (model, extension), settings = self.model_of(system), trained_by(system)
        plans = self.plans(model, settings)
        form = plans.form(settings, extension)
        needed = plans.memory(settings, extension, form)
        fits = plans.budget is None or needed.peak <= plans.budget
        windows = training_windows(self.experiment, system)
        time = cost.training_seconds(model, extension, settings, self.card, form=form, num_windows=windows)
        return {
            "memory": needed,
            "processes": settings.num_processes,
            "form": form,
            "change": None if fits else plans.change(settings, extension),
            "seconds": time.run if time else None,
        }

    def plans(self, model: dict, settings: TrainingSettings) -> TrainingPlans:
        """Plans the trainings of a model in as many processes as the settings say."""
        budget = self.memory_of_one(settings.num_processes)
        return TrainingPlans(model, self.card.device, self.card.compute, budget, self.once)

    def merging(self, job: Job) -> dict:
        """Memory and time of merging the adapter of a system."""
        system = self.experiment.systems[job.system]
        (model, extension), settings = self.model_of(system), trained_by(system)
        device = (self.card.device, self.card.compute)
        return {
            "memory": self.once(
                peak_memory.merging_memory, model, extension, traced_as(settings), *device, device_memory=self.card.memory
            ),
            "seconds": cost.merging_seconds(model, extension, settings, self.card),
        }

    def perplexity(self, job: Job) -> dict:
        """Memory and time of a cell of perplexity."""
        evaluated, adapter = evaluated_model(self.experiment, job.system), self.adapter_on(job.system)
        model, card = self.config(self.experiment.systems[job.system].model), self.card
        processes = self.experiment.evaluation.num_processes

        def memory(length: int, precision: Precision) -> peak_memory.Memory:
            return self.once(
                peak_memory.evaluation_memory, model, length, precision, card.device, card.compute, adapter=adapter,
                attention=evaluated.attention,
            )  # fmt: skip

        needs = {
            "memory": memory(job.length, evaluated.precision),
            "processes": processes,
            "change": change_of_cell(memory, job.length, evaluated.precision, self.memory_of_one(processes)),
        }
        windows = evaluation_windows(self.experiment, job.system, job.length)
        if windows is None:
            return needs
        seconds = cost.evaluation_seconds(
            model, job.length, windows, evaluated.precision, card,
            adapter=adapter, attention=evaluated.attention, group_ratio=evaluated.group_ratio,
        )  # fmt: skip
        return needs | {"seconds": seconds}

    def retrieval(self, job: Job) -> dict:
        """Memory and time of a cell of retrieval."""
        system, adapter = self.experiment.systems[job.system], self.adapter_on(job.system)
        model, card, settings = self.config(system.model), self.card, self.experiment.retrieval

        def memory(length: int, precision: Precision) -> peak_memory.Memory:
            return self.once(
                peak_memory.retrieval_memory, model, length, precision, card.device, card.compute, adapter=adapter,
                attention=system.evaluation_attention, device_memory=card.memory, tasks=settings.tasks,
                samples=settings.samples,
            )  # fmt: skip

        return {
            "memory": memory(job.length, system.precision),
            "seconds": cost.retrieval_seconds(model, job.length, settings, system.precision, card, adapter=adapter),
            "change": change_of_cell(memory, job.length, system.precision, card.memory),
        }

    def adapter_on(self, name: str) -> TrainingSettings | None:
        """Settings of the adapter that a system is evaluated with, if it is not merged."""
        if evaluated_model(self.experiment, name).adapter is None:
            return None
        owner = self.experiment.systems[self.experiment.systems[name].weights_of or name]
        return traced_as(trained_by(owner))

    # --- the experiment as a whole -----------------------------------------------------------------------------------------

    def longest_contexts(self) -> Iterator[tuple[str, int | None]]:
        """Yield each trained system and the longest context in tokens that it can be trained at with its settings, 0 if there
        is none; None for one that could not be planned, for windows of PoSE, and for a device of unknown memory."""
        for name, system in self.experiment.systems.items():
            if system.training:
                self.tell(f"longest context of {name}")
                try:
                    model, extension = self.model_of(system)
                    yield name, self.plans(model, trained_by(system)).longest_context(trained_by(system), extension)
                except Exception:  # the job of its training says why
                    yield name, None

    def disk(self) -> dict[str, int]:
        """Disk space in bytes: of models and adapters ``after`` the run, the most that they need ``during`` it, with
        checkpoints and merges, and that of texts and tokens, ``data``, if each text is as long as it may be."""
        after, extra = 0, 0
        for name in self.experiment.listed:
            system = self.experiment.systems[name]
            if system.training is None:
                continue
            try:
                sizes = system_bytes(self.model_of(system)[0], system.training)
            except Exception:  # the job of its training says why
                continue
            after += sizes["model"] + sizes["adapter"]
            extra = max(extra, sizes["checkpoints"], sizes["merging"])
        try:
            vocabulary = shape_of(self.config(self.experiment.base_model)).vocabulary
        except Exception:  # the job of a training says why
            vocabulary = 0
        return {"after": after, "during": after + extra, "data": most_data_bytes(self.experiment, vocabulary)}

    # --- models ------------------------------------------------------------------------------------------------------------

    def config(self, path: str) -> dict:
        """The ``config.json`` of a model, read once; also one that cannot be read is tried once."""
        if path not in self.configs:
            self.tell(f"config.json of {path}")
            try:
                self.configs[path] = self.read_config(path)
            except Exception as error:
                self.configs[path] = error
        found = self.configs[path]
        if isinstance(found, Exception):
            raise found
        return found

    def model_of(self, system: System) -> tuple[dict, RopeExtension]:
        """The model that a system is trained on, and how its context is extended; ``best`` scalings need the same memory."""
        model, extension = self.config(system.model), extension_of(system)
        assert extension is not None  # the configuration is checked: a trained system has a target context
        if extension.scaling == "best":
            extension = candidates(model, extension.target_context)[0]
        return model, extension


def trained_by(system: System) -> TrainingSettings:
    """The settings that a trained system is trained with."""
    assert system.training is not None
    return system.training


def window_of(system: System) -> int:
    """Tokens of the windows that a system is trained in."""
    settings = trained_by(system)
    return settings.pose_window or system.target_context or 0
