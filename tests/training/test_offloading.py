"""Offloaded inputs: losses and gradients are the same bit for bit, on a CPU and on a simulated device that runs in the worst
order; there, every synchronization is needed."""

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from simulated_device import SimulatedDevice, Stream
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.training import offloading
from longqlora.training.activations import keep_activations

LAYERS, WIDTH, TOKENS, MICRO_STEPS = 4, 16, 12, 3
COPY_TIME = 30  # operations of the computing stream, of which a layer has more
FREE_BLOCKS = 300  # more than the blocks of an input's size that a step leaves


class Failure(Exception):
    """What interrupts a step."""


def small_model(form: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    keep_activations(model, form)
    return model.train()


def train(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The losses of some micro-steps, and the sums of their gradients."""
    losses = []
    for number in range(MICRO_STEPS):
        ids = torch.arange(number, number + 2 * TOKENS).reshape(2, TOKENS) % 31
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    return losses + [weight.grad for weight in model.parameters()]


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


@contextmanager
def failing_layer(model: LlamaForCausalLM, number: int, *, in_backward: bool):
    """Let a layer fail, in the forward pass or before its backward pass is at its end."""

    def fail(module, inputs, output):
        def raise_failure(gradient):
            raise Failure

        if not in_backward:
            raise Failure
        output.register_hook(raise_failure)

    handle = model.model.layers[number].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def fail_once(model: LlamaForCausalLM, number: int, *, in_backward: bool) -> None:
    """A micro-step that fails in a layer; it leaves no gradient."""
    with failing_layer(model, number, in_backward=in_backward), pytest.raises(Failure):
        train(model)
    model.zero_grad()


def test_losses_and_gradients_are_those_without_offloading():
    assert are_equal(train(small_model("offloaded")), train(small_model("layer_inputs")))


@pytest.fixture
def living(monkeypatch) -> Callable[[str], int]:
    """Counts the copies of tensors that are in memory, on the host and back on the device."""
    pack, fetch, storages = offloading.Offloading.pack, offloading.Offloading.fetch, {"pack": [], "fetch": []}

    def noted_pack(self, tensor):
        kept = pack(self, tensor)
        storages["pack"].append(weakref.ref(kept.on_host.untyped_storage()))
        return kept

    def noted_fetch(self, kept):
        tensor = fetch(self, kept)
        storages["fetch"].append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(offloading.Offloading, "pack", noted_pack)
    monkeypatch.setattr(offloading.Offloading, "fetch", noted_fetch)
    return lambda name: len({id(storage) for reference in storages[name] if (storage := reference()) is not None})


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_fails_leaves_nothing_behind(in_backward, living):
    model = small_model("offloaded")
    fail_once(model, 1, in_backward=in_backward)
    gc.collect()
    assert living("pack") == living("fetch") == 0
    assert are_equal(train(model), train(small_model("layer_inputs")))


def test_two_inputs_at_most_are_on_the_device(living):
    model, numbers = small_model("offloaded"), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *given: numbers.append((living("pack"), living("fetch"))))
    train(model)
    forward = [(number, 0) for number in range(1, LAYERS + 1)]
    backward = [(number, min(number, 2)) for number in range(LAYERS, 0, -1)]  # a layer's own input, and the next one
    assert numbers == MICRO_STEPS * (forward + backward)


def test_a_graph_that_is_kept_can_be_passed_twice_and_keeps_nothing_on_the_device(living):
    model, ids = small_model("offloaded"), torch.arange(TOKENS)[None]
    loss, weights = model(input_ids=ids, labels=ids).loss, list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert living("fetch") == 0
    train(model)
    assert living("fetch") == 0
    assert are_equal(torch.autograd.grad(loss, weights), first)
    assert living("pack") == 0


# On a simulated device


def without(missing: str) -> Callable[[Stream, Stream], None]:
    """``Stream.wait_stream`` that does nothing when called for a function of offloading."""
    wait_stream = Stream.wait_stream

    def wait(stream: Stream, other: Stream) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_name in ("start_copy", "wait"):
            frame = frame.f_back
        if frame.f_code.co_name != missing:
            wait_stream(stream, other)

    return wait


@contextmanager
def simulated(missing: str | None):
    """A simulated device; ``missing`` is the function whose synchronization is left out."""
    device = SimulatedDevice()
    with (
        patch.object(torch, "get_device_module", lambda of: device),
        patch.object(offloading, "host_buffer", device.host_buffer),
        patch.object(Stream, "wait_stream", without(missing)),
    ):
        yield device


def interrupted_once(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """Let a step fail; return tensors that take all the memory that it leaves."""
    fail_once(model, 1, in_backward=True)
    gc.collect()
    return [torch.ones(2, TOKENS, WIDTH) for _ in range(FREE_BLOCKS)]


def is_exact(copies_first: bool, missing: str | None = None, *, form: str = "offloaded", fails: bool = False) -> bool:
    """Whether a training on the simulated device ends with the numbers of the CPU."""
    model = small_model(form)
    if form == "all":
        offloading.offload_inputs(model)
    with simulated(missing) as device, device:
        others = interrupted_once(model) if fails else []
        found = train(model) + others
        on_device = [device.on_device(tensor) for tensor in found]
    device.run(copies_first=copies_first)
    assert are_equal(found, train(small_model("layer_inputs")) + others)
    return are_equal(on_device, found)


def test_the_computing_stream_waits_for_one_copy_of_a_micro_step():
    """That of the last layer's input on its way back. It begins when it is needed, the others one layer before."""
    with simulated(None) as device, device:
        train(small_model("offloaded"))
    assert device.time_taken(COPY_TIME) == device.time_taken(0) + MICRO_STEPS * COPY_TIME


@pytest.mark.parametrize("case", [{}, {"fails": True}, {"form": "all"}], ids=str)
@pytest.mark.parametrize("copies_first", [False, True])
def test_no_order_of_the_streams_changes_a_number(copies_first, case):
    """Without checkpointing, a layer saves much that it frees before it ends."""
    assert is_exact(copies_first, **case)


@pytest.mark.parametrize(
    ("missing", "copies_first", "case"),
    [
        ("pack", True, {}),
        ("__exit__", False, {}),
        ("fetch", True, {}),
        ("unpack", False, {}),
        ("__del__", False, {"fails": True}),
    ],
)
def test_every_wait_is_needed(missing, copies_first, case):
    assert not is_exact(copies_first, missing, **case)


def test_what_leaves_must_be_referenced_until_it_is_copied(monkeypatch):
    pack = offloading.Offloading.pack

    def forgetful(self, tensor):
        kept = pack(self, tensor)
        self.leaving[-1] = None
        return kept

    monkeypatch.setattr(offloading.Offloading, "pack", forgetful)
    assert not is_exact(False, form="all")
