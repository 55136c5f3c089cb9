"""The cheapest change of settings with which a job fits into the memory of a device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longqlora.config.settings import Precision, RopeExtension, TrainingSettings
from longqlora.planning.peak_memory import Memory, longest_context

PeakOf = Callable[[TrainingSettings, RopeExtension], int]  # bytes of the device


@dataclass(frozen=True)
class Change:
    """Settings with which a job fits.

    Attributes:
        settings: new values by key: of ``training``, and ``target_context`` of the system; of a cell the ``precision`` of the
            system, and the longest ``length`` that fits.
        peak: bytes of the device with them; of a training with as few activations kept as they allow.
    """

    settings: dict[str, int | str]
    peak: int

    def __str__(self) -> str:
        return ", ".join(f"{key}: {value}" for key, value in self.settings.items())


def cheapest_change(
    settings: TrainingSettings, extension: RopeExtension, peak_of: PeakOf, budget: int, *, has_gpu: bool
) -> Change | None:
    """The first change that fits, each one tried in addition to those before it. None if not even the last one does.

    Args:
        settings, extension: of the training that does not fit.
        peak_of: the smallest peak of memory that settings allow.
        budget: memory of the device in bytes.
        has_gpu: whether the device is a GPU; a CPU has no paged optimizer.
    """
    tried = settings
    for tried in changed_settings(settings, has_gpu=has_gpu):
        if (peak := peak_of(tried, extension)) <= budget:
            return Change(difference(settings, tried), peak)
    window = "pose_window" if settings.pose_window else "target_context"

    def shortened(length: int) -> tuple[TrainingSettings, RopeExtension]:
        if settings.pose_window:
            return tried.model_copy(update={"pose_window": length}), extension
        return tried, extension.model_copy(update={"target_context": length, "factor": None})

    length = longest_context(budget, lambda length: peak_of(*shortened(length)))
    return Change(difference(settings, tried) | {window: length}, peak_of(*shortened(length))) if length else None


def change_of_cell(
    memory: Callable[[int, Precision], Memory], length: int, precision: Precision, budget: int | None
) -> Change | None:
    """The change with which a cell of perplexity or retrieval fits: weights in 4 bit, and if that is not enough, a shorter
    length. None if it fits as it is, if not even that helps, or if the memory of the device is unknown.

    Args:
        memory: what a cell needs, from its length in tokens and the precision of the weights.
        length, precision: of the cell.
        budget: memory of the device in bytes.
    """
    if budget is None or memory(length, precision).peak <= budget:
        return None
    settings: dict[str, int | str] = {} if precision == "nf4" else {"precision": "nf4"}
    if settings and (peak := memory(length, "nf4").peak) <= budget:
        return Change(settings, peak)
    shorter = longest_context(budget, lambda tokens: memory(tokens, "nf4").peak)
    return Change(settings | {"length": shorter}, memory(shorter, "nf4").peak) if shorter else None


def changed_settings(settings: TrainingSettings, *, has_gpu: bool) -> Iterator[TrainingSettings]:
    """Yield settings that need less and less memory, those with the smallest disadvantage first."""
    windows = settings.batch_size * settings.gradient_accumulation
    for batch_size in range(settings.batch_size - 1, 0, -1):  # the result is the same
        if settings.batch_size % batch_size == 0:
            settings = settings.model_copy(update={"batch_size": batch_size, "gradient_accumulation": windows // batch_size})
            yield settings
    eight_bit = {"optimizer": "paged_adamw_8bit"} if has_gpu else {}
    changes = [
        {"memory": "auto"} if settings.memory == "speed" else {},  # slower, the result is the same
        eight_bit,
        {"method": "qlora", "optimizer": settings.optimizer},
        {"method": "qlora"} | eight_bit,
    ]
    for change in changes:
        changed = settings.model_copy(update=change)
        if changed != settings:
            yield (settings := changed)


def difference(before: TrainingSettings, after: TrainingSettings) -> dict[str, int | str]:
    """The settings in which two trainings differ, with the values of the second one."""
    return {name: value for name, value in after.model_dump().items() if value != getattr(before, name)}
