"""Trainings that are killed, interrupted, or stopped by a loss that is not finite, and the checkpoints that they leave."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import LONGLORA, ROOT, train_tiny
from safetensors.torch import load_file, save_file

import longqlora.training.train
from longqlora.jobs.checkpointing import checkpoints, is_complete, newest_complete_checkpoint, open_checkpoint_folder
from longqlora.training.trainer import Interrupted, NonFiniteLoss

STEPS = {"steps": 8, "checkpoint_steps": 2, "batch_size": 1, "gradient_accumulation": 2, "dropout": 0.1}
VARIANTS = {"dora": True, "rslora": True, "loraplus_ratio": 4.0}
POSE = {"attention": "full", "pose_window": 64, "batch_size": 64}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import train_tiny
card = train_tiny(*sys.argv[2:5], **json.loads(sys.argv[5]))
print("CARD" + json.dumps(card))
"""


def start(base, data, output, cwd=None, **settings) -> subprocess.Popen:
    """A training as a process of its own, in a working folder."""
    command = [sys.executable, "-c", SCRIPT, ROOT / "tests", base, data, output, json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, **pipes)


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.split("CARD")[1])


def weights_of(folder) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (Path(folder) / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(Path(folder) / name)


def assert_same(folder, reference) -> None:
    weights, expected = weights_of(folder), weights_of(reference)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def trained_without_a_break(inputs, tmp_path, settings) -> Path:
    finish(start(*inputs, tmp_path / "unbroken", **settings))
    return tmp_path / "unbroken"


def wait_for(condition, process, seconds=120) -> bool:
    """Wait until the condition holds or the process is over; whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer, texts):
    from conftest import save_base

    from longqlora.data.token_files import tokenize_documents

    folder = tmp_path_factory.mktemp("inputs")
    tokenize_documents(texts[:8], tokenizer, str(folder / "corpus.bin"))
    return save_base(folder / "base", tokenizer), str(folder / "corpus.bin")


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """An adapter and its card of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "adapter"
    return output, finish(start(*inputs, output, **STEPS))


@pytest.mark.process
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(inputs, uninterrupted, tmp_path):
    output, work = tmp_path / "adapter", tmp_path / "adapter-checkpoints"
    reference, expected = uninterrupted
    delays = random.Random(0)
    for first in (2, 4, 6):  # killed some time after this checkpoint, in the middle of a step or of the writing of the next
        process = start(*inputs, output, **STEPS)
        assert wait_for((work / f"checkpoint-{first}").exists, process)
        time.sleep(delays.uniform(0, 0.1))
        process.kill()
        process.communicate()
    card = finish(start(*inputs, output, **STEPS))
    assert card["resumed_from_step"] >= 6
    assert card["trace"] == expected["trace"]
    assert card["tokens"] == expected["tokens"]
    assert_same(output, reference)


@pytest.mark.process
def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(inputs, uninterrupted, tmp_path):
    output, work = tmp_path / "adapter", tmp_path / "adapter-checkpoints"
    process = start(*inputs, output, **STEPS)
    assert wait_for((work / "writing" / "checkpoint-4").exists, process)
    process.kill()
    process.communicate()
    card = finish(start(*inputs, output, **STEPS))
    assert card["resumed_from_step"] in (2, 4)
    assert card["trace"] == uninterrupted[1]["trace"]
    assert_same(output, uninterrupted[0])


@pytest.mark.process
def test_a_run_whose_machine_is_lost_goes_on_elsewhere_in_the_same_bits(inputs, uninterrupted, tmp_path):
    store = tmp_path / "store"
    settings = STEPS | {"checkpoint_store": store.as_uri()}

    def start_in(folder: Path) -> subprocess.Popen:
        """Paths are relative, so that they are the same in each folder."""
        shutil.copytree(inputs[0], folder / "base")
        shutil.copy(inputs[1], folder / "corpus.bin")
        return start("base", "corpus.bin", "adapter", cwd=folder, **settings)

    process = start_in(tmp_path / "lost")
    assert wait_for(lambda: any(store.glob("*/checkpoint-4/files.json")), process)
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "lost")
    card = finish(start_in(tmp_path / "elsewhere"))
    assert 4 <= card["resumed_from_step"] < STEPS["steps"]  # the steps before it are not computed again
    assert card["trace"] == uninterrupted[1]["trace"]
    assert_same(tmp_path / "elsewhere/adapter", uninterrupted[0])


@pytest.mark.process
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_not_used(inputs, uninterrupted, tmp_path, damage):
    output, work = tmp_path / "adapter", tmp_path / "adapter-checkpoints"
    train_tiny(*inputs, output, **STEPS)
    newest, before = checkpoints(work)
    assert [newest.name, before.name] == ["checkpoint-8", "checkpoint-6"]  # the last two are kept
    file = newest / "optimizer.pt"
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    card = finish(start(*inputs, output, **STEPS))
    assert card["resumed_from_step"] == 6
    assert_same(output, uninterrupted[0])


@pytest.mark.process
@pytest.mark.parametrize(
    "settings",
    [{"method": "full", "learning_rate": 1e-3, "full_attention_share": 0.25}, LONGLORA, POSE, VARIANTS],
    ids=["full, with full attention at the end", "longlora", "PoSE, in its second or third epoch", "DoRA, rsLoRA and LoRA+"],
)
def test_every_method_resumes_in_the_same_bits(inputs, tmp_path, settings):
    settings = STEPS | settings
    finish(start(*inputs, tmp_path / "whole", **settings))
    process = start(*inputs, tmp_path / "cut", **settings)
    assert wait_for((tmp_path / "cut-checkpoints" / "checkpoint-4").exists, process)
    process.kill()
    process.communicate()
    assert finish(start(*inputs, tmp_path / "cut", **settings))["resumed_from_step"] >= 4
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_step_and_an_error(inputs, tmp_path, number):
    output, work = tmp_path / "adapter", tmp_path / "adapter-checkpoints"
    settings = STEPS | {"steps": 60, "checkpoint_steps": 7}
    process = start(*inputs, output, **settings)
    assert wait_for((work / "checkpoint-7").exists, process)
    shutil.rmtree(f"{output}-events")  # as Snakemake does with the outputs of a job that a cluster ends
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"ended by {number.name} after step" in error
    newest = checkpoints(work)[0]
    assert is_complete(newest)
    assert newest.name.split("-")[1] in error
    card = finish(start(*inputs, output, **settings))
    assert card["resumed_from_step"] == int(newest.name.split("-")[1]) >= 7
    assert [row["step"] for row in card["trace"]] == list(range(1, 61))
    assert_same(output, trained_without_a_break(inputs, tmp_path, settings))


def test_other_settings_or_data_begin_anew(inputs, tmp_path):
    base, data = inputs
    settings = STEPS | {"steps": 2}
    train_tiny(base, data, tmp_path / "adapter", **settings)
    assert train_tiny(base, data, tmp_path / "adapter", **settings)["resumed_from_step"] == 2
    without_effect = {"checkpoint_steps": 1, "logging_steps": 2}
    assert train_tiny(base, data, tmp_path / "adapter", **settings | without_effect)["resumed_from_step"] == 2
    assert train_tiny(base, data, tmp_path / "adapter", **settings | {"learning_rate": 1e-3})["resumed_from_step"] == 0


def test_other_weights_of_the_base_begin_anew(inputs, tmp_path):
    """Under the same path, with the same configuration."""
    base = shutil.copytree(inputs[0], tmp_path / "base")
    settings = STEPS | {"steps": 2}
    assert train_tiny(base, inputs[1], tmp_path / "adapter", **settings)["resumed_from_step"] == 0
    assert train_tiny(base, inputs[1], tmp_path / "adapter", **settings)["resumed_from_step"] == 2
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert train_tiny(base, inputs[1], tmp_path / "adapter", **settings)["resumed_from_step"] == 0


@pytest.mark.parametrize("settings", [{}, {"method": "full", "learning_rate": 1e-3}], ids=["qlora", "full"])
def test_a_run_that_ended_before_its_output_was_written_takes_no_further_step(inputs, tmp_path, settings):
    base, data = inputs
    expected = train_tiny(base, data, tmp_path / "adapter", **STEPS | settings)
    shutil.copytree(tmp_path / "adapter", tmp_path / "expected")
    shutil.rmtree(tmp_path / "adapter")
    card = train_tiny(base, data, tmp_path / "adapter", **STEPS | settings)
    assert card["resumed_from_step"] == card["steps"] == STEPS["steps"]
    assert card["trace"] == expected["trace"]
    assert card["tokens"] == expected["tokens"]
    assert_same(tmp_path / "adapter", tmp_path / "expected")


def test_a_folder_of_checkpoints_is_emptied_for_another_run_only(tmp_path):
    folder = open_checkpoint_folder(str(tmp_path / "work"), {"seed": 1})
    (folder / "checkpoint-5").mkdir()
    assert (open_checkpoint_folder(str(folder), {"seed": 1}) / "checkpoint-5").exists()
    assert not (open_checkpoint_folder(str(folder), {"seed": 2}) / "checkpoint-5").exists()


def test_a_checkpoint_without_a_manifest_is_ignored(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"1")
    assert newest_complete_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_loss_that_is_no_number_names_step_and_documents_and_keeps_the_last_good_checkpoint(inputs, tmp_path, monkeypatch):
    compute, calls = longqlora.training.train.ResumableTrainer.__mro__[1].compute_loss, []

    def spoiled(self, *arguments, **kwargs):
        calls.append(1)
        loss = compute(self, *arguments, **kwargs)
        return loss * float("nan") if len(calls) == 11 else loss  # of the sixth step

    monkeypatch.setattr(longqlora.training.train.ResumableTrainer.__mro__[1], "compute_loss", spoiled)
    with pytest.raises(NonFiniteLoss, match=r"step 6: the loss is nan in a batch of tokens \d+ to \d+ of .*, documents \d+ to"):
        train_tiny(*inputs, tmp_path / "adapter", **STEPS)
    assert [path.name for path in checkpoints(tmp_path / "adapter-checkpoints")] == ["checkpoint-4", "checkpoint-2"]
    assert all(map(is_complete, checkpoints(tmp_path / "adapter-checkpoints")))


def test_a_full_disk_says_what_was_being_written_and_leaves_whole_checkpoints(inputs, tmp_path, monkeypatch):
    saved = longqlora.training.train.ResumableTrainer._save_rng_state

    def full(self, folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(self, folder)

    monkeypatch.setattr(longqlora.training.train.ResumableTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match=r"checkpoint-4: the checkpoint could not be written .*No space left on device"):
        train_tiny(*inputs, tmp_path / "adapter", **STEPS)
    assert [path.name for path in checkpoints(tmp_path / "adapter-checkpoints")] == ["checkpoint-2"]
    assert not (tmp_path / "adapter-checkpoints" / "writing").exists()


@pytest.mark.parametrize(
    ("settings", "window"), [({}, "target_context 128"), ({"attention": "full", "pose_window": 64}, "pose_window 64")]
)
def test_an_exhausted_memory_says_which_settings_to_change(inputs, tmp_path, monkeypatch, settings, window):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(longqlora.training.train.ResumableTrainer, "training_step", exhausted)
    advice = rf"{window}, batch_size 1, rank 4.*smaller batch_size with more gradient.*a shorter {window.split()[0]}\."
    with pytest.raises(MemoryError, match=advice):
        train_tiny(*inputs, tmp_path / "adapter", **STEPS, **settings)


def test_an_interrupted_training_is_an_error(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("longqlora.training.trainer.any_rank", lambda flag: True)
    with pytest.raises(Interrupted, match="after step 1 of 8; a rerun resumes from there"):
        train_tiny(*inputs, tmp_path / "adapter", **STEPS)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_loraplus_trains_b_at_a_multiple_of_the_learning_rate(inputs, tmp_path, monkeypatch, optimizer):
    trainers, resume = [], longqlora.training.train.ResumableTrainer.resume
    monkeypatch.setattr(longqlora.training.train.ResumableTrainer, "resume", lambda self: trainers.append(self) or resume(self))
    settings = STEPS | {"steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "optimizer": optimizer}
    train_tiny(*inputs, tmp_path / "adapter", **settings, loraplus_ratio=8.0)
    (trainer,) = trainers
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in trainer.optimizer.optimizer.param_groups for weight in group["params"]}
    assert set(rates) == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {8e-3}
