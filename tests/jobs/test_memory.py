"""An exhausted memory is recognized in all its wordings; what a paged optimizer keeps; how torch allocates."""

import os
import subprocess
import sys
from types import MethodType

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import PagedAdamW32bit

from longqlora.jobs.memory import cgroup_limits, is_out_of_memory, memory_explained, total_memory
from longqlora.training import trainer
from longqlora.training.trainer import load_paged_state, paged_state_bytes

WORDINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),  # bitsandbytes
    RuntimeError("cudaErrorMemoryAllocation"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1099511627776 bytes."),
    RuntimeError("NCCL error: unhandled cuda error, last error: Cuda failure 2 'out of memory'"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: str(error)[:40])
def test_every_wording_is_recognized_and_says_what_to_change(error):
    message = r"^out of memory reading 8192 tokens\. A smaller precision\."
    with pytest.raises(MemoryError, match=message) as caught, memory_explained("reading 8192 tokens", "A smaller precision."):
        raise error
    assert caught.value.__cause__ is error


def test_an_error_that_memory_caused_is_recognized_by_its_cause():
    error = ValueError("the layer could not be quantized")
    assert not is_out_of_memory(error)
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory of the past"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("a")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory_explained("training", "Less."):
        raise error
    assert caught.value is error


def test_an_explanation_is_not_explained_again():
    outer, inner = memory_explained("in the job", "More."), memory_explained("training", "Less.")
    with pytest.raises(MemoryError, match=r"^out of memory training\. Less\. \(") as caught, outer, inner:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "in the job" not in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None max_split_size_mb:64"),
    ],
)
def test_a_job_lets_segments_grow_unless_the_user_has_set_otherwise(root, user, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"import os, longqlora.jobs.log; print(*map(os.environ.get, {names}))"
    environment = {name: value for name, value in os.environ.items() if name not in names} | user
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == expected, run.stderr


# --- paged optimizers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def paged(monkeypatch):
    """An optimizer that takes its weights for a GPU's, and a stand-in for its paged memory, which only a GPU has."""

    def get_paged(*shape, dtype, device):
        buffer = torch.empty(*shape, dtype=dtype)
        buffer.is_paged = True
        return buffer

    def get_state_buffer(self, weight, dtype=torch.float32):  # as in bitsandbytes, without its branch for a CPU
        if weight.numel() < 1e5:
            return torch.zeros_like(weight, dtype=dtype)
        return functional.get_paged(*weight.shape, dtype=dtype, device=weight.device)

    monkeypatch.setattr(functional, "get_paged", get_paged)

    def make(*weights: torch.Tensor) -> PagedAdamW32bit:
        optimizer = PagedAdamW32bit([torch.nn.Parameter(weight) for weight in weights], lr=1e-3)
        optimizer.get_state_buffer = MethodType(get_state_buffer, optimizer)
        for group in optimizer.param_groups:
            for index, weight in enumerate(group["params"]):
                optimizer.init_state(group, weight, 0, index)
                for name in ("state1", "state2"):
                    optimizer.state[weight][name].copy_(torch.rand_like(weight))
        return optimizer

    return make


def test_a_loaded_state_is_paged_where_it_was_before_it_was_saved(paged, tmp_path):
    weights = torch.randn(400, 300), torch.randn(10)  # the second is too small to be paged
    saved, resumed = paged(*weights), paged(*weights)
    assert paged_state_bytes(saved) == 2 * 4 * 400 * 300
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    state_dict = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    for state in state_dict["state"].values():
        for value in state[PagedAdamW32bit._FSDP_WRAPPED_QUANT_STATE_KEY].values():
            value.is_paged = False  # the mark is saved with it, but what is read from a file is not
    load_paged_state(resumed, state_dict)
    assert paged_state_bytes(resumed) == paged_state_bytes(saved)
    for one, other in zip(saved.state.values(), resumed.state.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def test_the_trainer_loads_the_state_of_a_paged_optimizer_so(monkeypatch, tmp_path, model_folder, corpus):
    from conftest import train_tiny

    loaded = []
    monkeypatch.setattr(trainer, "load_paged_state", lambda optimizer, state: loaded.append(type(optimizer).__name__))
    settings = {"optimizer": "paged_adamw_32bit", "checkpoint_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longqlora.training.trainer.any_rank", lambda flag: True)
        with pytest.raises(trainer.Interrupted):
            train_tiny(model_folder, corpus, tmp_path / "adapter", steps=2, **settings)
    loaded.clear()  # accelerate loads the empty state of a new optimizer
    train_tiny(model_folder, corpus, tmp_path / "adapter", steps=2, **settings)
    assert "AdamW" in loaded[-1]


@pytest.mark.parametrize(
    ("listed", "limit_file"),
    [
        ("0::/slurm/job_7/step_0\n", "slurm/job_7/memory.max"),
        ("5:cpu,cpuacct:/x\n4:memory:/docker/8f\n0::/\n", "memory/memory.limit_in_bytes"),  # its own folder is not visible
    ],
    ids=["version 2", "version 1"],
)
def test_the_memory_of_a_machine_ends_where_its_control_group_does(tmp_path, monkeypatch, listed, limit_file):
    (tmp_path / "groups").write_text(listed)
    limits = tmp_path / "mounted" / limit_file
    limits.parent.mkdir(parents=True)
    limits.write_text("123456789\n")
    (tmp_path / "mounted/memory.max").write_text("max\n")
    found = list(cgroup_limits(tmp_path / "groups", tmp_path / "mounted"))
    assert found == [123456789]
    physical = total_memory("cpu")
    assert physical > 2**28
    monkeypatch.setattr("longqlora.jobs.memory.cgroup_limits", lambda: found)
    assert total_memory("cpu") == 123456789
