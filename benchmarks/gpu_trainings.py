"""Cases of the GPU check that train by ``longqlora.training.train``: a small model from the training to an answer, other ways
to train it, and the 7B shape by the real trainer.

Each is a generator that yields parts of its line.
"""

import logging
import os
import re
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy
import torch
import training_cases  # first: it lets longqlora be imported where something is missing
from gpu_cases import compute_in, memory_of
from measuring import GIB
from safetensors.torch import load_file
from training_cases import GROUP_RATIO, LEARNING_RATE, MAX_GRAD_NORM, SHAPES, build_model
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.config.settings import (
    EvaluatedModel,
    MergeSettings,
    ProgressSettings,
    Protocol,
    RetrievalSettings,
    RopeExtension,
    TrainingSettings,
)
from longqlora.data.token_files import tokenize_documents
from longqlora.evaluation.perplexity import evaluate_perplexity
from longqlora.evaluation.retrieval import evaluate_retrieval
from longqlora.modeling.devices import find_device
from longqlora.publishing.merge_report import MergeFiles, merge_adapter
from longqlora.training.activations import Form, forms_on
from longqlora.training.pretraining import train_tokenizer
from longqlora.training.train import TrainingFiles, train
from longqlora.training.trainer import Interrupted

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1024  # of the small model
EVALUATION_SET, EVALUATED_TEXTS = "evaluation.bin", 4  # file in the folder, and how many texts it has
SETTINGS = TrainingSettings(
    group_ratio=GROUP_RATIO, steps=6, gradient_accumulation=2, learning_rate=LEARNING_RATE, warmup_steps=2,
    max_grad_norm=MAX_GRAD_NORM,
)  # fmt: skip
INTERRUPTED_AFTER = 3  # steps
MERGE_FIGURES = ("perplexity", "kl_divergence", "top_1_agreement")
MAX_PERPLEXITY_RATIO = 2.0  # of the merge; a few steps leave nothing to lose
VARIANTS = {
    "isolate_documents": {"isolate_documents": True},
    "lora, embeddings trained whole": {"method": "lora", "modules_to_save": ["embed_tokens", "norm"]},
    "full": {"method": "full"},
    "adamw_torch": {"optimizer": "adamw_torch"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
}


class StepWatcher(logging.Handler):
    """Notes when a training logs its steps, and sends SIGTERM after one of them if so asked."""

    def __init__(self, interrupt_after: int | None):
        super().__init__(logging.INFO)
        self.interrupt_after, self.times = interrupt_after, []

    def emit(self, record: logging.LogRecord) -> None:
        if step := re.match(r"step (\d+) of ", record.getMessage()):
            self.times.append(record.created)
            if int(step[1]) == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def watched_steps(interrupt_after: int | None = None) -> Iterator[StepWatcher]:
    """Watch the trainings of this process, see :class:`StepWatcher`."""
    logger, watcher = logging.getLogger("longqlora.training.progress"), StepWatcher(interrupt_after)
    logger.setLevel(logging.INFO)
    logger.addHandler(watcher)
    try:
        yield watcher
    finally:
        logger.removeHandler(watcher)


class Trainings:
    """Trainings of one base on one set of data, in a folder.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: for the trained adapters.
        base: folder of the base model.
        data: a ``.bin`` file.
        tokens: of a window.
        settings: of all these trainings, where they differ from :data:`SETTINGS`.
    """

    def __init__(self, device: str, folder: Path, base: str, data: str, tokens: int, **settings):
        self.device, self.folder, self.base, self.data, self.tokens = device, folder, base, data, tokens
        self.settings = SETTINGS.model_copy(update=settings)

    def train(self, name: str, form: Form = "layer_inputs", **settings) -> dict:
        """Train under a name, with the activations of a form kept; return the training card."""
        return train(
            files=TrainingFiles(
                base_model=self.base,
                data=self.data,
                output=str(self.folder / name),
                tensorboard_dir=str(self.folder / f"{name}-events"),
                checkpoint_dir=str(self.folder / f"{name}-checkpoints"),
            ),
            extension=RopeExtension(target_context=self.tokens),
            settings=self.settings.model_copy(update=settings),
            progress=ProgressSettings(logging_steps=1, checkpoint_steps=2),
            seed=1,
            device=self.device,
            form=form,
        )


def small_trainings(device: str, folder: Path, width: int, tokens: int, rank: int, paged: bool) -> Trainings:
    """Trainings of a small model with random weights and half the context, on the project's own sources; an evaluation set
    lies in the folder."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("longqlora/*/[a-z]*.py"))]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tokens // 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base, data, evaluation_set = (str(folder / name) for name in ("base", "data.bin", EVALUATION_SET))
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tokenize_documents(texts[:EVALUATED_TEXTS], tokenizer, evaluation_set)
    tokenize_documents(texts[EVALUATED_TEXTS:], tokenizer, data)
    optimizer = "paged_adamw_32bit" if paged else "adamw_torch"
    return Trainings(device, folder, base, data, tokens, rank=rank, learning_rate=1e-3, optimizer=optimizer)


def losses_of(card: dict) -> list[float]:
    return [round(row["loss"], 4) for row in card["trace"]]


def attempts(parts: dict[str, Callable[[], object]]) -> Iterator[dict]:
    """Yield what each part returns; at the end, as ``failure``, which parts failed, so that one does not hide the others."""
    failed = []
    for name, part in parts.items():
        try:
            yield {name: part()}
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    if failed:
        yield {"failure": "; ".join(failed)}


def end_to_end(device: str, width: int, tokens: int, rank: int, paged: bool) -> Iterator[dict]:
    """A small model: train it, be interrupted, resume, merge, evaluate, ask."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trainings = small_trainings(device, folder, width, tokens, rank, paged)
        card = trainings.train("whole")
        yield {"losses": losses_of(card), "paged_optimizer_bytes": card["paged_optimizer_bytes"]}
        if paged and device == "cuda" and not card["paged_optimizer_bytes"]:
            raise RuntimeError("a paged optimizer has no state in paged memory")
        yield {"resumed": interrupt_and_resume(trainings, card)}
        report = merge_adapter(
            files=MergeFiles(trainings.base, str(folder / "whole"), trainings.data, str(folder / "merged")),
            card=card,
            settings=MergeSettings(max_perplexity_ratio=MAX_PERPLEXITY_RATIO),
            device=device,
        )
        measured = {name: {key: float(f"{row[key]:.5g}") for key in MERGE_FIGURES} for name, row in report["models"].items()}
        yield {"merge": {"published": report["published"], "precision": report["precision"]["others"], **measured}}
        yield from attempts(evaluations(trainings))
        yield memory_of(find_device(device))


def interrupt_and_resume(trainings: Trainings, whole: dict) -> dict:
    """Train once more, stop by a signal, resume: does it end in the same adapter, and is the optimizer's state still paged?

    Args:
        whole: the card of the same training without an interruption, ``whole``.

    Raises:
        RuntimeError: if nothing was interrupted, or the state of the optimizer is no longer where it was.
    """
    try:
        with watched_steps(INTERRUPTED_AFTER):
            trainings.train("parts")
    except Interrupted as error:
        message = str(error)
    else:
        raise RuntimeError("SIGTERM did not end the training")
    card = trainings.train("parts")
    if card["paged_optimizer_bytes"] != whole["paged_optimizer_bytes"]:
        sizes = f"{card['paged_optimizer_bytes']} bytes instead of {whole['paged_optimizer_bytes']}"
        raise RuntimeError(f"the resumed optimizer has paged {sizes}")
    adapters = [load_file(trainings.folder / name / "adapter_model.safetensors") for name in ("whole", "parts")]
    largest = max((adapters[0][name] - weight).abs().max().item() for name, weight in adapters[1].items())
    return {
        "interrupted": message,
        "from_step": card["resumed_from_step"],
        "losses": losses_of(card),
        "paged_optimizer_bytes": card["paged_optimizer_bytes"],
        "largest_difference_of_weights": largest,
    }


def evaluations(trainings: Trainings) -> dict[str, Callable[[], float]]:
    """Perplexity of the trained model in each precision, and what the merged one answers."""
    merged, evaluation_set = str(trainings.folder / "merged"), str(trainings.folder / EVALUATION_SET)
    extension = RopeExtension(target_context=trainings.tokens)
    adapter = {"path": trainings.base, "adapter": str(trainings.folder / "whole"), "extension": extension}
    models = {"nf4 with adapter": EvaluatedModel(**adapter, precision="nf4", group_ratio=GROUP_RATIO)}
    for name in ("auto", "nf4", "int8", "float32"):
        models[f"merged, {name}"] = EvaluatedModel(path=merged, precision=name, group_ratio=GROUP_RATIO)

    def perplexity(model: EvaluatedModel) -> float:
        results = evaluate_perplexity(
            system="small", model=model, tokens={"sources": evaluation_set},
            protocol=Protocol(name="longqlora", window=trainings.tokens, stride=trainings.tokens), device=trainings.device,
            windows={"sources": str(trainings.folder / "windows.parquet")},
        )  # fmt: skip
        return round(results["sources"]["perplexity"], 3)

    def accuracy(task: str) -> float:
        return evaluate_retrieval(
            model=models["merged, nf4"], untrained=trainings.base, tokenizer=trainings.base, is_trained_to_answer=False,
            filler=evaluation_set, length=trainings.tokens,
            settings=RetrievalSettings(tasks=[task], depths=[0.5], samples=2, seed=1), device=trainings.device,
        )["accuracy"]  # fmt: skip

    parts = {f"perplexity, {name}": lambda model=model: perplexity(model) for name, model in models.items()}
    return parts | {f"accuracy, {task}": lambda task=task: accuracy(task) for task in ("passkey", "induction")}


def train_variants(device: str, width: int, tokens: int, rank: int, paged: bool) -> Iterator[dict]:
    """Losses of a few steps of the small model in each other way to train it, at last in a V100's float16."""
    with tempfile.TemporaryDirectory() as temporary:
        trainings = small_trainings(device, Path(temporary), width, tokens, rank, paged)

        def in_float16() -> list[float]:
            with compute_in("float16"):  # with loss scaling, on a GPU
                return losses_of(trainings.train("float16", steps=3))

        variants = VARIANTS | {f"activations: {form}": {"form": form} for form in forms_on(device) if form != "layer_inputs"}
        parts = {
            name: lambda name=name, settings=settings: losses_of(trainings.train(name, **{"steps": 2, **settings}))
            for name, settings in variants.items()
            if paged or "paged" not in name
        }
        yield from attempts(parts | {"float16": in_float16})
        yield memory_of(find_device(device))


def train_7b(device: str, shape: str, tokens: int, paged: bool, steps: int = 3) -> Iterator[dict]:
    """``longqlora.training.train`` on a large base, whose random weights are built where a checkpoint would be loaded."""

    def build(path, *, device, precision, extension, attn_implementation):
        return build_model(shape, precision, extension.target_context, device, attn_implementation)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2).save_pretrained(folder / "base")
        (folder / "base" / "model.safetensors").touch()  # a training records the digest of the weights
        ids = numpy.random.default_rng(1).integers(3, SHAPES[shape]["vocab_size"], 2 * steps * tokens)
        ids.astype("<u2").tofile(folder / "data.bin")
        optimizer = "paged_adamw_32bit" if paged else "adamw_torch"
        trainings = Trainings(device, folder, str(folder / "base"), str(folder / "data.bin"), tokens, optimizer=optimizer)
        with patch("longqlora.training.train.load_model", build), watched_steps() as watcher:
            card = trainings.train("adapter", steps=steps)
    times = [end - begin for begin, end in zip(watcher.times, watcher.times[1:], strict=False)]
    used = 2 * tokens  # of a step
    yield {
        "compute_type": card["precision"]["autocast"],
        "losses": losses_of(card),
        "step_s": [round(seconds, 3) for seconds in times],
        "tokens_per_s": round(used / min(times)),
        "tflops": round(2 * training_cases.step_flops(shape, "ours", tokens) / min(times) / 1e12, 3),
        "paged_optimizer_gib": round(card["paged_optimizer_bytes"] / GIB, 3),
        **memory_of(find_device(device)),
    }
