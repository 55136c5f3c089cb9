"""The GPU check at toy size on a CPU: its cases, what a failure leaves, its tables."""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = {"compute_type", "first_step_s", "step_s", "losses", "loaded_gib", "tokens_per_s", "tflops", "peak_allocated_gib"}
TRAINING = {"compute_type", "losses", "step_s", "tokens_per_s", "tflops", "paged_optimizer_gib", "peak_allocated_gib"}
EXPECTED = {
    "gpu_cases.probe": {"versions", "machine", "bitsandbytes_library", "compute_type", "copy_gb_per_s", "matmul_tflops"},
    "gpu_reservation.reserve_and_release": {"gpus", "reserved", "seen_by_torch", "another_job"},
    "gpu_cases.use_paged_memory": {"paged"},
    "gpu_cases.take_steps": STEPS,
    "gpu_numerics.compare_with_float64": {"attention, documents", "4-bit layer", "norm", "LoRA layer", "loss in bfloat16"},
    "gpu_numerics.compare_offloading": {"difference, inputs offloaded"},
    "gpu_cases.generate": {"prefill_s", "s_a_new_token", "peak_allocated_gib"},
    "gpu_trainings.end_to_end": {"losses", "resumed", "merge", "perplexity, merged, nf4", "accuracy, passkey"},
    "gpu_trainings.train_7b": TRAINING,
    "gpu_trainings.train_variants": {"isolate_documents", "full", "adamw_torch", "float16"},
}
RUN_ALL = """
import json
import gpu_check
for name, case in gpu_check.CASES.items():
    _, next_part = gpu_check.set_up(case.function, gpu_check.arguments_of(case, "cpu", toy=True))
    row = {"case": name}
    while not (part := next_part()).get("finished"):
        row |= part
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps(row) + chr(10))
"""
STUBS = """
import os, time

def works(device, paged):
    yield {"one": device}
    yield {"paged": paged}

def fails(device):
    yield {"one": device}
    raise ValueError("no luck")

def sleeps(device):
    yield {"one": device}
    time.sleep(600)

def dies(device):
    os._exit(3)
    yield
"""
GATHERED_LOSS = """
import sys
from pathlib import Path
import stand_ins, torch
stand_ins.GATHERED = Path(sys.argv[1])
make_options, loss = stand_ins.gathered_loss()
torch.manual_seed(0)
hidden, weight, targets = torch.randn(1500, 16), torch.randn(50, 16), torch.randint(50, (1500,))
targets[7] = -100
for reduction in ("none", "sum"):
    found = []
    options = make_options(batch_chunk_size=512, chunking_method=None)
    for function in (
        lambda *given: loss(*given, reduction=reduction, options=options),
        lambda hidden, weight, targets: torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction),
    ):
        leaf = hidden.clone().requires_grad_()
        losses = function(leaf, weight, targets)
        losses.sum().backward()
        found.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(*found)
"""


@pytest.fixture
def gpu_check(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    module = importlib.import_module("gpu_check")
    gc.enable()  # which a job switches off while it imports
    return module


def run_python(root, folder, *arguments) -> str:
    """Run Python in a folder with the project and its benchmarks at hand; return what it prints."""
    paths = os.pathsep.join([str(root), str(root / "benchmarks")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_every_case_works_at_toy_size(root, gpu_check, tmp_path):
    run_python(root, tmp_path, "-c", RUN_ALL)  # one process, as the imports take longer than the cases
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == list(gpu_check.CASES)
    for row in rows:
        assert "failure" not in row, row
        assert EXPECTED[gpu_check.CASES[row["case"]].function] <= row.keys()
    found = {row["case"]: row for row in rows}
    assert found["7b_8192"]["profile_ms"]
    assert found["7b_8192_float16"]["compute_type"] == "float16"
    assert found["7b_8192_documents"]["losses"] != found["7b_8192"]["losses"]
    assert found["7b_8192_compiled"]["losses"] == pytest.approx(found["7b_8192"]["losses"][:2], rel=1e-4)
    assert found["end_to_end"]["resumed"]["from_step"] == 4  # the signal came after the third
    assert found["end_to_end"]["resumed"]["largest_difference_of_weights"] == 0
    assert found["end_to_end"]["resumed"]["losses"] == found["end_to_end"]["losses"]


@pytest.mark.process
def test_a_case_that_fails_leaves_a_line_that_says_so_and_the_others_run(gpu_check, monkeypatch, tmp_path):
    (tmp_path / "gpu_check_stubs.py").write_text(STUBS)
    monkeypatch.syspath_prepend(tmp_path)
    works = gpu_check.Case(60, "gpu_check_stubs.works", {"paged": True})
    cases = {
        "first": works,
        "paged": gpu_check.Case(60, "gpu_check_stubs.fails"),
        "sleeps": gpu_check.Case(1, "gpu_check_stubs.sleeps"),
        "dies": gpu_check.Case(60, "gpu_check_stubs.dies"),
        "is missing": gpu_check.Case(60, "gpu_check_stubs.nothing"),
        "last": works,
    }
    rows = []
    gpu_check.run_cases(cases, "cpu", toy=False, deadline=300, write=rows.append)
    found = {row.pop("case"): row for row in rows if row.pop("took_s") < 60}
    assert found == {
        "first": {"one": "cpu", "paged": True},
        "paged": {"one": "cpu", "failure": "ValueError: no luck"},
        "sleeps": {"one": "cpu", "failure": "over the time limit of 1 s"},
        "dies": {"failure": "ended with exit code 3; out of memory?"},
        "is missing": {"failure": "AttributeError: module 'gpu_check_stubs' has no attribute 'nothing'"},
        "last": {"one": "cpu", "paged": False},  # paged memory does not work on this machine
    }


def test_no_case_begins_after_the_deadline(gpu_check):
    rows = []
    gpu_check.run_cases(gpu_check.CASES, "cpu", toy=True, deadline=0, write=rows.append)
    assert rows == [{"case": name, "failure": "no time left"} for name in gpu_check.CASES]


@pytest.mark.process
def test_the_script_writes_a_line_for_each_case_and_prints_the_tables(root, tmp_path):
    output = tmp_path / "lines.jsonl"
    options = ["--device", "cpu", "--toy", "--cases", "gpus", "--output", output]
    printed = run_python(root, root, "benchmarks/gpu_check.py", *options)
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["case"] == "gpus"
    assert "failure" not in row
    assert "| gpus | " in printed


def test_peaks_beyond_a_tenth_of_the_traced_ones_are_marked(gpu_check):
    measured = {
        "compute_type": "bfloat16", "tokens_per_s": 4096, "step_s": [2.5, 2.0], "tflops": 200.0, "peak_reserved_gib": 12.0,
        "took_s": 9.0,
    }  # fmt: skip
    probe = {"case": "probe", "took_s": 3.0, "matmul_tflops": {"bfloat16": 400.0}, "copy_gb_per_s": 2000.0}
    rows = [
        probe,
        {"case": "near", "peak_allocated_gib": 9.5, **measured},
        {"case": "far", "peak_allocated_gib": 11.5, **measured},
        {"case": "another type", "peak_allocated_gib": 11.5, **measured, "compute_type": "float16", "failure": "out of memory"},
        {"case": "cut off", "failure": "no time left"},
    ]
    traced = {name: {"peak_gib": 10.0, "compute_type": "bfloat16"} for name in ("near", "far", "another type")}
    lines = gpu_check.report_markdown(rows, traced, "command").splitlines()
    assert "| near | 4096 | 2 | 200 | 50% | 9.50 | 12.00 | 10.00 | -5.0% |  |" in lines
    assert "| far | 4096 | 2 | 200 | 50% | 11.50 | 12.00 | 10.00 | **+15.0%** |  |" in lines
    assert "| another type | 4096 | 2 | 200 |  | 11.50 | 12.00 |  |  | out of memory |" in lines
    assert "| cut off |  | no time left |  |" in lines


def test_a_peak_is_traced_for_the_type_and_the_form_of_its_case(gpu_check, monkeypatch):
    arguments = {"shape": "toy", "tokens": 128, "case": "ours"}
    cases = {
        "current": gpu_check.Case(1, "", arguments, "current"),
        "offloaded": gpu_check.Case(1, "", arguments, "offloaded"),
        "float16": gpu_check.Case(1, "", arguments | {"dtype": "float16"}, "current"),
        "untraced": gpu_check.Case(1, ""),
    }
    monkeypatch.setattr(gpu_check, "CASES", cases)
    traced = gpu_check.trace_cases()
    assert {name: row["compute_type"] for name, row in traced.items()} == {
        "current": "bfloat16", "offloaded": "bfloat16", "float16": "float16",
    }  # fmt: skip
    assert traced["offloaded"]["peak_gib"] <= traced["current"]["peak_gib"] < traced["float16"]["peak_gib"]


@pytest.mark.process
def test_an_older_torch_gets_the_chunked_loss_from_its_two_files(root, tmp_path):
    modules = Path(importlib.util.find_spec("torch").origin).parent / "nn/modules"
    for name in ("linear_cross_entropy.py", "linear_cross_entropy_options.py"):
        (tmp_path / name).write_bytes((modules / name).read_bytes())
    run_python(root, tmp_path, "-c", GATHERED_LOSS, tmp_path)
