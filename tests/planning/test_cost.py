"""Estimated time and disk space, compared with counted operations and with what was measured."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig

from longqlora.config.settings import RetrievalSettings, RopeExtension, TrainingSettings
from longqlora.data import packing
from longqlora.evaluation import retrieval, token_losses
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.planning import cost
from longqlora.planning.cards import Card, card_named, card_with_memory
from longqlora.planning.cost import (
    disk_bytes,
    evaluation_seconds,
    forward_pass,
    merging_seconds,
    micro_step,
    retrieval_seconds,
    shape_of,
    shared_disk_bytes,
    trained_weights,
    training_seconds,
)
from longqlora.training import trainer
from longqlora.training.adapters import add_adapter

aten = torch.ops.aten


def llama(
    width: int, inner: int, layers: int, heads: int, *, keys: int | None = None, vocabulary: int = 32000, **other
) -> dict:
    """The ``config.json`` of a LLaMA."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys or heads,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **other,
    }


SMALL = llama(128, 352, 4, 8, keys=2, vocabulary=512, torch_dtype="float32")
LLAMA_7B, LLAMA_13B = llama(4096, 11008, 32, 32), llama(5120, 13824, 40, 40)
SMOLLM2 = llama(576, 1536, 30, 9, keys=3, vocabulary=49152, tie_word_embeddings=True)
H100 = card_named("H100-80GB")
CPU = Card("a CPU", None, "float32", 1e11, 1e10)


def training(**settings) -> TrainingSettings:
    return TrainingSettings(**{"steps": 1, "gradient_accumulation": 2, **settings})


# Operations and bytes, as torch runs them


def count_flops(run) -> tuple[int, int]:
    """Operations of matrix products and of attention while a function runs; half of attention's is not causal."""

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(gradient, query, key, value)

    kernels = {  # of a CPU, which the counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for kernel, count in counts.items() if "attention" in str(kernel))
    return sum(counts.values()) - attention, attention // 2


@pytest.mark.parametrize("form", ["all", "layer_inputs"])
@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_operations_of_a_training_step_are_those_that_torch_counts(method, attention, form):
    tokens, group, settings = 512, 128 if attention == "shifted_sparse" else 512, training(method=method, rank=16)
    name = register_shifted_sparse_attention(0.25, tokens) if attention == "shifted_sparse" else "sdpa"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation=name)  # the counter misses a fused loss
    if method == "lora":
        model = add_adapter(model, settings, base=None)
    if form == "layer_inputs":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(tokens)[None] % 512
    products, in_attention = count_flops(lambda: model.train()(input_ids=ids, labels=ids).loss.backward())
    if form == "layer_inputs":  # without tiles, the recomputation ends before the layer's last product
        products += 2 * tokens * SMALL["num_hidden_layers"] * SMALL["intermediate_size"] * SMALL["hidden_size"]
    work = micro_step(shape_of(SMALL), tokens, group, settings, CPU, form)
    assert work.products == pytest.approx(products, rel=0.05)
    assert work.attention == pytest.approx(in_attention, rel=0.05)


def test_operations_of_an_evaluation_are_those_that_torch_counts():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa").eval()
    ids = torch.arange(2 * 513).reshape(2, 513) % 512
    products, in_attention = count_flops(lambda: token_losses.nll_of_batch(model, ids))
    work = forward_pass(shape_of(SMALL), 512, "float32", CPU, rows=2)
    assert work.products == pytest.approx(products, rel=0.01)
    assert work.attention == pytest.approx(in_attention, rel=0.01)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, without products, attention, and those that only make another view."""

    uncounted = re.compile(
        r"view|^t$|transpose|expand|slice$|split|select$|detach|alias|squeeze|empty|mm$|scaled_dot|cross_entropy"
    )

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if not self.uncounted.search(function.__name__.split(".")[0]):
            tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return result


@pytest.mark.parametrize("form", ["all", "layer_inputs"])
def test_traffic_of_a_layer_on_a_cpu_is_what_its_operations_move(form):
    tokens, counted = 1024, []
    for layers in (1, 2):
        config = LlamaConfig(**(SMALL | {"num_hidden_layers": layers}))
        attention = register_shifted_sparse_attention(0.25, tokens)
        model = use_chunked_loss(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
        model = add_adapter(model, training(rank=16), base=None)
        if form == "layer_inputs":
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.arange(tokens)[None] % 512
        with Traffic() as traffic:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        counted.append(traffic.num_bytes)
    forward, backward, _ = cost.TRAFFIC["float32"]
    expected = tokens * shape_of(SMALL).layer_elements * (forward * (2 if form == "layer_inputs" else 1) + backward)
    assert counted[1] - counted[0] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 8, "dora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"method": "full"},
    ],
)
def test_trained_weights_are_those_of_the_real_model(changes):
    settings = training(**{"method": "lora", **changes})
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    if settings.method == "lora":
        model = add_adapter(model, settings, base=None)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained_weights(shape_of(SMALL), settings) == trained


def test_constants_are_those_of_the_modules_that_a_plan_does_not_import():
    assert cost.TOKENS_PER_BATCH == token_losses.TOKENS_PER_BATCH == retrieval.TOKENS_PER_BATCH
    assert (cost.CACHE_SHARE, cost.CACHE_BYTES) == (retrieval.CACHE_SHARE, retrieval.CACHE_BYTES)
    assert cost.HELD_OUT_TOKENS == packing.HELD_OUT_TOKENS
    assert cost.KEPT_CHECKPOINTS == trainer.KEPT_CHECKPOINTS


def test_a_model_without_a_size_is_an_error():
    with pytest.raises(ValueError, match=r"config\.json has no vocab_size"):
        shape_of({key: value for key, value in SMALL.items() if key != "vocab_size"})


def test_mpt_has_its_published_number_of_weights():
    assert shape_of({"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}).num_parameters == pytest.approx(
        6.65e9, rel=0.01
    )


# Times measured on an H100 (benchmarks/RESULTS.md, "On a GPU")


@pytest.mark.parametrize(
    ("model", "tokens", "attention", "seconds"),
    [
        (LLAMA_7B, 8192, "shifted_sparse", 2.31),
        (LLAMA_13B, 12288, "shifted_sparse", 5.81),
        (LLAMA_7B, 32768, "shifted_sparse", 9.68),
        (LLAMA_7B, 32768, "full", 12.6),
    ],
)
def test_a_training_step_takes_as_long_as_on_an_h100(model, tokens, attention, seconds):
    time = training_seconds(model, RopeExtension(target_context=tokens), training(attention=attention), H100)
    assert time.step == pytest.approx(seconds, rel=0.25)


def test_a_step_in_float16_takes_as_long_as_on_an_h100():
    card = replace(H100, compute="float16", matmul_rate=753e12)
    assert training_seconds(LLAMA_7B, RopeExtension(target_context=8192), training(), card).step == pytest.approx(
        2.48, rel=0.25
    )


def test_the_plain_step_with_its_float32_residual_stream_takes_as_long_as_on_an_h100(monkeypatch):
    monkeypatch.setitem(cost.TRAFFIC, "bfloat16", cost.TRAFFIC["float32 under autocast"])
    time = training_seconds(LLAMA_7B, RopeExtension(target_context=8192), training(attention="full"), H100)
    assert time.step == pytest.approx(3.18, rel=0.25)


def test_an_evaluation_and_an_answer_take_as_long_as_on_an_h100():
    shape = shape_of(LLAMA_7B)
    assert forward_pass(shape, 8192, "nf4", H100).seconds(H100) == pytest.approx(0.267, rel=0.25)
    assert forward_pass(shape, 8192, "nf4", H100, scored=1).seconds(H100) == pytest.approx(0.27, rel=0.25)
    assert forward_pass(shape, 1, "nf4", H100, before=8192).seconds(H100) == pytest.approx(0.078, rel=0.25)


# Times measured on one core, beside other jobs (docs/results/smollm2-16k.md), at the rates that the probe measures there

CORE = Card("one core of a Xeon", None, "float32", 152e9, 12.6e9)
SMOLLM2_TRAINING = training(rank=32, dropout=0.0, steps=10, gradient_accumulation=1)
TO_16K = RopeExtension(target_context=16384)


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


DEMO = llama(128, 384, 5, 4, keys=2, vocabulary=1024, tie_word_embeddings=True)
DEMO_TRAINING = training(rank=16, dropout=0.0, steps=40, batch_size=8, gradient_accumulation=1, optimizer="adamw_torch")


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
    assert time.step == pytest.approx(2 * 3 * 4 * cost.PASS_SECONDS)


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
    assert evaluation_seconds(SMALL, 1024, 16, "auto", H100) - loading == pytest.approx(2 * 4 * cost.PASS_SECONDS)


# Disk space: bytes that finished runs have left


def test_smollm2s_run_is_as_large_as_measured():
    disk, shared = disk_bytes(SMOLLM2, SMOLLM2_TRAINING), shared_disk_bytes(2_422_199, 0, 49152)
    assert disk["model"] == pytest.approx(269_065_469, rel=0.01)
    assert disk["adapter"] == pytest.approx(39_145_625, rel=0.01)
    assert shared["tokens"] == pytest.approx(4_844_398, rel=0.01)
    total = 2 * (disk["model"] + disk["adapter"]) + sum(shared.values())
    assert total == pytest.approx(634_560_810, rel=0.15)


def test_the_demos_run_is_as_large_as_measured():
    in_full = ["embed_tokens", "norm"]
    lora = {"method": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": in_full}
    systems = [disk_bytes(DEMO, DEMO_TRAINING.model_copy(update=each)) for each in ({}, {}, {}, {}, lora, {"method": "full"})]
    shared = shared_disk_bytes(637_377, 248_446, 1024)
    assert sum(each["model"] for each in systems) == pytest.approx(13_462_036, rel=0.15)
    assert sum(each["adapter"] for each in systems) == pytest.approx(4_628_297, rel=0.2)
    assert shared["tokens"] == pytest.approx(3_462_183, rel=0.15)
    assert shared["texts"] == pytest.approx(2_038_768 + 227_255, rel=0.15)
    total = sum(each["model"] + each["adapter"] for each in systems) + sum(shared.values())
    assert total == pytest.approx(27_236_329, rel=0.15)


def test_a_run_of_all_weights_has_no_adapter_and_no_second_merge():
    disk = disk_bytes(LLAMA_7B, training(method="full", optimizer="paged_adamw_8bit"))
    assert (disk["adapter"], disk["merging"]) == (0, 0)
    assert disk["model"] == pytest.approx(13.5e9, rel=0.01)
    assert disk["checkpoints"] == pytest.approx(2 * 6 * 6.74e9, rel=0.01)


def test_checkpoints_are_as_large_as_adapter_and_optimizer_state():
    assert disk_bytes(LLAMA_7B, training())["checkpoints"] == pytest.approx(2 * 1.9e9, rel=0.02)
