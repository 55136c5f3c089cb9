import pytest

from longqlora.config.settings import RopeExtension, TrainingSettings
from longqlora.planning import peak_memory
from longqlora.planning.peak_memory import (
    evaluation_memory,
    longest_context,
    merging_memory,
    retrieval_memory,
    training_memory,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}
EXTENSION = RopeExtension(target_context=256)


def test_a_training_has_its_parts_and_an_allowance():
    model, extension = LLAMA | {"vocab_size": 64}, RopeExtension(target_context=2048)
    found = training_memory(model, extension, TrainingSettings(rank=8), "cuda", "bfloat16", "layer_inputs")
    parts = {"weights", "quantization constants", "adapter", "gradients", "optimizer", "layer inputs", "recomputation"}
    assert parts <= set(found.parts)
    assert found.peak == sum(found.parts.values())
    assert found.parts["allowance"] > peak_memory.CUDA_CONTEXT
    assert found.parts["optimizer"] == 2 * found.parts["adapter"]  # too small to be paged
    assert found.at_peak.startswith("backward pass of the last layer")


@pytest.mark.parametrize("scaling", ["dynamic", "yarn", "llama3", "ntk"])
def test_every_scaling_takes_the_memory_of_linear_scaling(scaling):
    other, linear = (
        training_memory(
            LLAMA, RopeExtension(target_context=256, scaling=name), TrainingSettings(rank=8), "cuda", "bfloat16", "layer_inputs"
        )
        for name in (scaling, "linear")
    )
    assert other == linear


def test_paged_optimizer_state_of_large_weights_is_on_the_host():
    model = LLAMA | {"intermediate_size": 16384}
    settings = TrainingSettings(rank=8, target_modules=["gate_proj"])
    paged, plain = (
        training_memory(model, EXTENSION, settings.model_copy(update={"optimizer": name}), "cuda", "bfloat16", "layer_inputs")
        for name in ("paged_adamw_32bit", "adamw_torch")
    )
    assert plain.parts["optimizer"] - paged.parts["optimizer"] == paged.host - plain.host == 2 * 4 * 8 * 16384 * 4


def test_zero_shards_gradients_and_optimizer_state():
    settings = TrainingSettings(rank=8, optimizer="adamw_torch")
    alone, two = (
        training_memory(
            LLAMA, EXTENSION, settings.model_copy(update={"zero_stage": stage, "num_processes": 2}), "cpu", "float32", "all"
        )
        for stage in (0, 2)
    )
    assert two.parts["gradients"] == alone.parts["gradients"] / 2
    assert two.parts["optimizer"] == alone.parts["optimizer"] / 2
    assert two.parts["weights"] == alone.parts["weights"]


def test_processes_that_share_windows_hold_a_part_of_their_tokens():
    settings, longer = TrainingSettings(rank=8), EXTENSION.model_copy(update={"target_context": 2 * EXTENSION.target_context})
    shared = settings.model_copy(update={"num_processes": 2, "sequence_parallel": 2})
    parts = [
        training_memory(LLAMA, extension, each, "cpu", "float32", "layer_inputs").parts["layer inputs"]
        for extension, each in ((EXTENSION, settings), (longer, shared))
    ]
    assert parts[0] == parts[1]


def test_on_a_cpu_the_host_is_the_device():
    found = training_memory(LLAMA, EXTENSION, TrainingSettings(rank=8), "cpu", "float32", "all")
    assert found.host == found.peak
    assert found.parts["allowance"] == peak_memory.PROCESS["training"]


def test_an_evaluation_holds_the_logits_of_a_chunk_in_float32():
    found = evaluation_memory(LLAMA, 8192, "nf4", "cuda", "bfloat16")
    logits = 4 * 1024 * LLAMA["vocab_size"]
    assert found.at_peak.startswith("output layer")
    assert 2 * logits <= found.parts["loss"] <= 4 * logits
    more = evaluation_memory(LLAMA, 8192, "bfloat16", "cuda", "bfloat16", adapter=TrainingSettings(rank=8))
    assert more.parts["weights"] > found.parts["weights"]
    assert more.parts["adapter"] > 0


def test_the_weights_of_a_precision():
    weights = {
        precision: evaluation_memory(LLAMA | {"vocab_size": 8}, 128, precision, "cuda", "bfloat16").parts["weights"]
        for precision in ("float32", "bfloat16", "int8", "nf4")
    }
    assert weights["float32"] == pytest.approx(2 * weights["bfloat16"], rel=0.05)
    assert weights["bfloat16"] > weights["int8"] > weights["nf4"]


def test_the_cache_of_retrieval_is_that_of_all_layers_and_prompts():
    one = 2 * 4 * 2 * 16 * 256 * 2  # keys and values, layers, heads, width of a head, tokens, bytes
    assert retrieval_memory(LLAMA, 256, "nf4", "cuda", "bfloat16").parts["cache"] == one
    many = retrieval_memory(LLAMA, 256, "nf4", "cuda", "bfloat16", device_memory=24 * 2**30, samples=5)
    assert many.parts["cache"] == 5 * one


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come():
    few, many = (retrieval_memory(LLAMA | {"num_hidden_layers": n}, 256, "nf4", "cuda", "bfloat16") for n in (2, 3))
    assert many.parts["forward pass"] == few.parts["forward pass"]


def test_induction_needs_no_cache():
    assert "cache" not in retrieval_memory(LLAMA, 256, "float32", "cpu", "float32", tasks=["induction"]).parts


def test_a_merge_compares_in_16_bit_where_that_fits(monkeypatch):
    settings = TrainingSettings(rank=8)
    found = merging_memory(LLAMA, EXTENSION, settings, "cuda", "bfloat16")
    assert "quantization constants" not in found.parts  # the merges in 16 bit need more than the adapter on the NF4 base
    little = merging_memory(LLAMA, EXTENSION, settings, "cuda", "bfloat16", device_memory=2**30)
    assert little.parts["quantization constants"] > 0
    assert merging_memory(LLAMA, EXTENSION, settings, "cpu", "float32").host > peak_memory.PROCESS["merging"]


@pytest.mark.parametrize("budget", [0, 999, 1000, 12_345, 250_000, 10**9])
def test_the_longest_context_is_the_last_that_fits(budget):
    asked = []

    def peak_at(tokens: int) -> int:
        asked.append(tokens)
        return 900 + tokens // 10 + (tokens // 4096) * 7 + 3000 * (tokens > 50_000)

    found = longest_context(budget, peak_at, step=100)
    fitting = [tokens for tokens in range(100, peak_memory.LONGEST_CONTEXT, 100) if peak_at(tokens) <= budget]
    assert found == (min(fitting[-1], 100 * (peak_memory.LONGEST_CONTEXT // 100 - 1)) if fitting else 0)


def test_the_longest_context_is_found_with_few_traces():
    asked = []
    longest_context(24 * 2**30, lambda tokens: asked.append(tokens) or 5 * 2**30 + 200_000 * tokens)
    assert len(asked) <= 6
