"""A task of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a system.

The model is loaded as in every other evaluation and handed to the harness, which makes the prompts and scores the answers.
"""

import logging
import math
from importlib.metadata import version
from tempfile import TemporaryDirectory

import numpy
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from longqlora.config.settings import Device, EvaluatedModel, HarnessSettings
from longqlora.data.chat_template import with_chat_template
from longqlora.data.tokenizers import load_tokenizer
from longqlora.evaluation.evaluated_model import at_commit, load_evaluated_model, memory_advice
from longqlora.evaluation.statistics import ratio_estimate
from longqlora.jobs.digests import digest_of_values
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import rope_of

log = logging.getLogger(__name__)

NOT_MEASURED = -1  # RULER's score for the lengths that a document does not have


def evaluate_harness(
    *,
    model: EvaluatedModel,
    tokenizer: str,
    is_trained_to_answer: bool,
    task: str,
    length: int | None,
    settings: HarnessSettings,
    device: Device,
) -> dict:
    """Measure a system on a task, or on all tasks of a group or tag. A prompt that is longer than the system's context loses
    its beginning, as is usual in the harness.

    Args:
        model: the model of the system.
        tokenizer: directory or hub id of its tokenizer.
        is_trained_to_answer: the system was trained on instructions, with the chat template for training.
        task: name in the harness.
        length: tokens of the texts that the task makes; None if it has texts of its own.
        settings: few-shot examples, limit, chat template, batch size, and the folder of the user's own tasks.
        device: ``cpu`` or ``cuda``.

    Returns:
        Model; version of the harness; ``max_length``, tokens that the model reads at most; ``chat_template``, whether prompts
        were written with one; ``results``, see :func:`metrics_of`.
    """
    model = at_commit(model)
    rope = rope_of(load_config(model.path, model.extension))
    context, own_tokenizer = rope["target_context"], load_tokenizer(tokenizer)
    if is_trained_to_answer:
        with_chat_template(own_tokenizer)
    if not own_tokenizer.chat_template:
        settings = settings.model_copy(update={"chat_template": False})
    with memory_explained(*memory_advice(model, context)):
        loaded = load_evaluated_model(model, device, context)
        reader = HFLM(pretrained=loaded, tokenizer=own_tokenizer, max_length=context, batch_size=settings.batch_size)
        measured = run_task(reader, task, length, settings)
    results = [result for name in measured["results"] for result in metrics_of(measured, name, reader)]
    for result in results:
        log.info("%s, %s: %.4f", result["task"], result["metric"], result["value"])
    return {
        "precision": model.precision,
        "attention": model.attention,
        "model": model.path,
        **rope,
        "max_length": context,
        "chat_template": settings.chat_template,
        "limit": settings.limit,
        "lm_eval_version": version("lm_eval"),
        "results": results,
    }


def run_task(reader: HFLM, task: str, length: int | None, settings: HarnessSettings) -> dict:
    """Let the harness measure a model on a task; its result, with the answer to each document."""
    with TemporaryDirectory() as folder:
        reader.tokenizer.save_pretrained(folder)  # RULER loads it by its path, and would run code that comes with it
        tasks = TaskManager(
            include_path=settings.include_path,
            metadata={"tokenizer": folder} | ({"max_seq_lengths": [length]} if length else {}),
        )
        measured = simple_evaluate(
            reader,
            tasks=[task],
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            task_manager=tasks,
        )
    assert measured is not None  # only other processes than the first get nothing
    return measured


def metrics_of(measured: dict, name: str, reader: HFLM) -> list[dict]:
    """The metrics of a task or group.

    Args:
        measured: what the harness returned.
        name: of the task or group.
        reader: the model in the harness.

    Returns:
        For each metric (``metric``) of the answers as a filter of the task reads them (``filter``; ``none`` is the usual one):
        its ``value``, ``standard_error`` over documents (None if the harness has none), whether ``higher_is_better``;
        ``eval_length``, tokens of a text made for RULER, whose metric is called ``score`` here; ``scores`` by document, if the
        value is their mean; ``documents``, a digest of the documents; ``num_documents``, ``num_truncated`` (those whose prompt
        did not fit the context), ``task_version`` and ``num_fewshot``.
    """
    samples, found = measured["samples"].get(name, []), []
    documents = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    values = {key: value for key, value in measured["results"][name].items() if isinstance(value, int | float)}
    shared = {
        "task": name,
        "task_version": measured["versions"].get(name),
        "num_fewshot": measured["n-shot"].get(name),
        "num_documents": len(documents) or values.get("sample_len"),
        "num_truncated": sum(any(is_truncated(request, reader) for request in each["arguments"]) for each in documents),
        "documents": digest_of_values([each["doc_hash"] for each in documents]) if documents else None,
    }
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or (metric.isdigit() and value == NOT_MEASURED):
            continue
        scores = scores_of([sample for sample in samples if sample["filter"] == filter_name], metric, value)
        error = values.get(f"{metric}_stderr,{filter_name}")
        if error is None and scores:
            error = ratio_estimate(numpy.array(scores), numpy.ones(len(scores))).standard_error
        found.append(
            shared
            | {
                "metric": "score" if metric.isdigit() else metric,
                "eval_length": int(metric) if metric.isdigit() else None,
                "filter": filter_name,
                "value": value,
                "standard_error": error,
                "higher_is_better": metric.isdigit() or measured["higher_is_better"].get(name, {}).get(metric),
                "scores": scores,
            }
        )
    return found


def scores_of(samples: list[dict], metric: str, value: float) -> list[float] | None:
    """The score of each document; None unless the value of the metric is their mean."""
    found = [sample.get(metric) for sample in samples]
    numbers = [float(score) for score in found if isinstance(score, int | float | numpy.number)]
    if not numbers or len(numbers) < len(found):
        return None
    return numbers if math.isclose(sum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12) else None


def is_truncated(request: tuple, reader: HFLM) -> bool:
    """Whether a request was too long for the model, and lost its beginning. A text whose perplexity is measured never does: it
    is read in windows.

    Args:
        request: the arguments of one request: a context and its continuation, a context and settings of the generation, or a
            text.
        reader: the model in the harness.
    """
    if len(request) < 2:
        return False
    context, rest = request[:2]
    length = len(reader.tok_encode(context))
    if isinstance(rest, dict):
        return length + normalize_gen_kwargs(rest, reader.max_gen_toks)["max_gen_toks"] > reader.max_length
    return length + len(reader.tok_encode(rest, add_special_tokens=False)) > reader.max_length + 1
