"""Estimated times, compared with those that were measured."""

from dataclasses import replace

import pytest
from planned_models import DEMO, DEMO_TRAINING, H100, LLAMA_7B, LLAMA_13B, SMALL, SMOLLM2, SMOLLM2_TRAINING, training

from longqlora.config.settings import RetrievalSettings, RopeExtension
from longqlora.data import packing
from longqlora.evaluation import retrieval, token_losses
from longqlora.planning import cost, work
from longqlora.planning.cards import Card, card_with_memory
from longqlora.planning.cost import evaluation_seconds, merging_seconds, retrieval_seconds, training_seconds
from longqlora.planning.work import forward_pass, shape_of

CORE = Card("one core of a Xeon", None, "float32", 152e9, 12.6e9)  # as the probe measures them
TO_16K = RopeExtension(target_context=16384)


def test_constants_are_those_of_the_modules_that_a_plan_does_not_import():
    assert cost.TOKENS_PER_BATCH == token_losses.TOKENS_PER_BATCH == retrieval.TOKENS_PER_BATCH
    assert (cost.CACHE_SHARE, cost.CACHE_BYTES) == (retrieval.CACHE_SHARE, retrieval.CACHE_BYTES)
    assert cost.HELD_OUT_TOKENS == packing.HELD_OUT_TOKENS


# Times measured on an H100 (benchmarks/RESULTS.md, "On a GPU"), with steps that moved more bytes


@pytest.fixture
def former_steps(monkeypatch):
    """What operations element by element moved when the times were measured: with peft's LoRA layers and transformers' norms,
    which are those of the plain step too."""
    former = {"bfloat16": (18, 29, 10), "float16": (21, 33, 10), "float32 under autocast": (33, 52, 10)}
    for residual, traffic in former.items():
        monkeypatch.setitem(work.TRAFFIC, residual, traffic)


@pytest.mark.parametrize(
    ("model", "tokens", "attention", "seconds"),
    [
        (LLAMA_7B, 8192, "shifted_sparse", 2.31),
        (LLAMA_13B, 12288, "shifted_sparse", 5.81),
        (LLAMA_7B, 32768, "shifted_sparse", 9.68),
        (LLAMA_7B, 32768, "full", 12.6),
    ],
)
def test_a_training_step_takes_as_long_as_on_an_h100(model, tokens, attention, seconds, former_steps):
    time = training_seconds(model, RopeExtension(target_context=tokens), training(attention=attention), H100)
    assert time.step == pytest.approx(seconds, rel=0.25)


def test_a_step_in_float16_takes_as_long_as_on_an_h100(former_steps):
    card = replace(H100, compute="float16", matmul_rate=753e12)
    assert training_seconds(LLAMA_7B, RopeExtension(target_context=8192), training(), card).step == pytest.approx(
        2.48, rel=0.25
    )


def test_the_plain_step_with_its_float32_residual_stream_takes_as_long_as_on_an_h100(monkeypatch, former_steps):
    monkeypatch.setitem(work.TRAFFIC, "bfloat16", work.TRAFFIC["float32 under autocast"])
    time = training_seconds(LLAMA_7B, RopeExtension(target_context=8192), training(attention="full"), H100)
    assert time.step == pytest.approx(3.18, rel=0.25)


def test_an_evaluation_and_an_answer_take_as_long_as_on_an_h100():
    shape = shape_of(LLAMA_7B)
    assert forward_pass(shape, 8192, "nf4", H100).seconds(H100) == pytest.approx(0.267, rel=0.25)
    assert forward_pass(shape, 8192, "nf4", H100, scored=1).seconds(H100) == pytest.approx(0.27, rel=0.25)
    assert forward_pass(shape, 1, "nf4", H100, before=8192).seconds(H100) == pytest.approx(0.078, rel=0.25)


# Times measured on one core, beside other jobs (docs/results/smollm2-16k.md)


def test_smollm2_takes_as_long_as_on_one_core_that_other_jobs_used_too():
    pose = SMOLLM2_TRAINING.model_copy(update={"attention": "full", "pose_window": 4096})
    estimated_and_measured = [
        (training_seconds(SMOLLM2, TO_16K, SMOLLM2_TRAINING, CORE).run, 60 * 60),
        (training_seconds(SMOLLM2, TO_16K, pose, CORE).run, 13 * 60),
        (evaluation_seconds(SMOLLM2, 16384, 2, "auto", CORE), 7 * 60),
        (merging_seconds(SMOLLM2, TO_16K, SMOLLM2_TRAINING, CORE), 19 * 60),
    ]
    for estimated, measured in estimated_and_measured:
        assert 0.65 * measured < estimated < 1.05 * measured


def test_the_demo_takes_as_long_as_on_one_core():
    longer = DEMO_TRAINING.model_copy(update={"attention": "full", "steps": 80, "batch_size": 4})
    full, to_256 = DEMO_TRAINING.model_copy(update={"method": "full"}), RopeExtension(target_context=256)
    induction = RetrievalSettings(tasks=["induction"], depths=[0, 0.5, 1], samples=5, seed=1)
    estimated_and_measured = [  # job by job
        (training_seconds(DEMO, to_256, DEMO_TRAINING, CORE, form="all").run, 16.1),
        (training_seconds(DEMO, RopeExtension(target_context=512), longer, CORE, form="all").run, 30.7),
        (training_seconds(DEMO, to_256, full, CORE, form="all").run, 13.8),
        (evaluation_seconds(DEMO, 256, 35083 / 256, "float32", CORE), 5.3),
        (retrieval_seconds(DEMO, 256, induction, "float32", CORE), 4.7),
        (merging_seconds(DEMO, to_256, DEMO_TRAINING, CORE), 9.7),
    ]
    for estimated, measured in estimated_and_measured:
        assert estimated == pytest.approx(measured, rel=0.25)


# What changes the time


def test_a_training_of_epochs_takes_as_many_steps_as_its_data_has():
    settings = training(steps=None, epochs=2, batch_size=2, gradient_accumulation=4)
    time = training_seconds(LLAMA_7B, RopeExtension(target_context=8192), settings, H100, num_windows=81)
    load = training_seconds(LLAMA_7B, RopeExtension(target_context=8192), training(steps=1), H100)
    shared = settings.model_copy(update={"num_nodes": 2, "num_processes": 2, "sequence_parallel": 4})
    found = training_seconds(LLAMA_7B, RopeExtension(target_context=8192), shared, H100, num_windows=81)
    assert (found.run - time.run) == pytest.approx(22 * (found.step - time.step))
    assert time.run - 22 * time.step == pytest.approx(load.run - load.step)
    assert training_seconds(LLAMA_7B, RopeExtension(target_context=8192), settings, H100).run is None


def test_the_more_is_kept_the_faster_is_a_step():
    extension = RopeExtension(target_context=8192)
    steps = [
        training_seconds(LLAMA_7B, extension, training(), H100, form=form).step
        for form in ("all", "linear_outputs", "layer_inputs", "offloaded")
    ]
    assert steps[0] < steps[1] < steps[2] == steps[3]


def test_full_attention_at_the_end_counts_for_its_share_of_the_steps():
    sparse, half, full = (
        training_seconds(LLAMA_7B, RopeExtension(target_context=32768), training(**settings), H100).step
        for settings in ({}, {"full_attention_share": 0.5}, {"attention": "full"})
    )
    assert half == pytest.approx((sparse + full) / 2)


def test_a_tiny_model_is_as_slow_as_python_on_a_gpu():
    time = training_seconds(SMALL, RopeExtension(target_context=512), training(), H100)
    assert time.step == pytest.approx(2 * 3 * 4 * work.PASS_SECONDS)


def test_retrieval_counts_every_prompt_and_the_tokens_of_its_answer():
    def seconds(**changes):
        settings = RetrievalSettings(**{"tasks": ["passkey"], "depths": [0.0], "samples": 1, "seed": 1, **changes})
        return retrieval_seconds(LLAMA_7B, 8192, settings, "nf4", H100)

    loading = cost.loading_seconds(shape_of(LLAMA_7B))
    one = seconds() - loading
    assert one == pytest.approx(0.27 + 15 * 0.078, rel=0.25)
    assert seconds(depths=[0.0, 0.5, 1.0]) - loading == pytest.approx(3 * one)
    assert one < seconds(samples=4) - loading < 2 * one  # the answers are written at once
    assert 3 * one < seconds(tasks=["multi_value"]) - loading < 4 * one  # four numbers
    assert seconds(tasks=["induction"]) - loading == pytest.approx(8 * 0.27, rel=0.25)


def test_the_time_on_a_card_without_rates_is_unknown():
    card, settings = card_with_memory("24GB"), training()
    asked = RetrievalSettings(tasks=["passkey"], depths=[0.0], samples=1, seed=1)
    assert training_seconds(LLAMA_7B, TO_16K, settings, card) is None
    assert evaluation_seconds(LLAMA_7B, 8192, 10, "nf4", card) is None
    assert retrieval_seconds(LLAMA_7B, 8192, asked, "nf4", card) is None
    assert merging_seconds(LLAMA_7B, TO_16K, settings, card) is None


def test_evaluation_of_short_windows_batches_them():
    loading = cost.loading_seconds(shape_of(SMALL))
    assert evaluation_seconds(SMALL, 1024, 16, "auto", H100) - loading == pytest.approx(2 * 4 * work.PASS_SECONDS)
