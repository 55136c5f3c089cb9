"""Trainings in two real processes on a CPU, with and without DeepSpeed, against one process with the same global batch."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import PROGRESS, ROOT, SETTINGS, save_base
from safetensors.torch import load_file

from longqlora.config.settings import RopeExtension
from longqlora.data.token_files import tokenize_documents
from longqlora.jobs.launch import launch
from longqlora.jobs.retries import LostProcesses, is_worth_a_retry
from longqlora.training.arguments import deepspeed_config
from longqlora.training.train import TrainingFiles, train

needs_deepspeed = pytest.mark.skipif(
    not find_spec("deepspeed") or not shutil.which("g++"), reason="needs deepspeed, which compiles with g++"
)
TOLERANCE = 1e-4
SRUN = """#!{python}
import os, signal, subprocess, sys

options = [word for word in sys.argv[1 : sys.argv.index(sys.executable)]]
open("srun.txt", "w").write(" ".join(options))
command = sys.argv[1 + len(options) :]
nodes = [
    subprocess.Popen(["ip", "netns", "exec", name, *command], env=os.environ | {{"SLURM_NODEID": str(node)}})
    for node, name in enumerate({names})
]
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
sys.exit(max(abs(node.wait()) for node in nodes))
"""
STEPS = {"steps": 6, "gradient_accumulation": 2, "batch_size": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer, texts) -> dict[str, str]:
    """A base, and a corpus whose last window is shorter than the others."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenize_documents(texts[:4], tokenizer, str(folder / "corpus.bin"))
    return {"base_model": save_base(folder / "base", tokenizer), "data": str(folder / "corpus.bin")}


def arguments(inputs, output, **settings) -> dict:
    """Keyword arguments of ``train``."""
    folders = {"output": str(output), "tensorboard_dir": f"{output}-events", "checkpoint_dir": f"{output}-checkpoints"}
    return {
        "files": TrainingFiles(**inputs, **folders),
        "extension": RopeExtension(target_context=128),
        "settings": SETTINGS.model_copy(update=STEPS | settings),
        "progress": PROGRESS.model_copy(update={"checkpoint_steps": 2}),
        "seed": 1,
        "device": "cpu",
        "form": "all",
    }


def train_in_processes(**asked) -> dict:
    settings = asked["settings"]
    processes = {"num_processes": settings.num_processes, "num_nodes": settings.num_nodes}
    return launch(train, threads=2, **processes, by_torchrun=settings.zero_stage > 0, **asked)


@pytest.fixture(scope="module")
def single(inputs, tmp_path_factory):
    """One process with twice the batch: its card and its adapter."""
    output = tmp_path_factory.mktemp("single") / "adapter"
    return train_in_processes(**arguments(inputs, output, batch_size=2)), load_file(output / "adapter_model.safetensors")


def assert_equal_to(single, card: dict, output: Path) -> None:
    expected, weights = single
    for row, reference in zip(card["trace"], expected["trace"], strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
    adapter = load_file(output / "adapter_model.safetensors")
    assert adapter.keys() == weights.keys()
    for name, weight in weights.items():
        assert adapter[name].shape == weight.shape
        assert adapter[name].numel() > 0
        assert (adapter[name].float() - weight).abs().max() < 10 * TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"zero_stage": 2, "offload": True}, marks=needs_deepspeed),
        pytest.param({"zero_stage": 3, "offload": True}, marks=needs_deepspeed),
    ],
    ids=["no DeepSpeed", "ZeRO-2, offloaded", "ZeRO-3, offloaded"],
)
def test_two_processes_train_what_one_trains_with_twice_the_batch(inputs, single, tmp_path, settings):
    card = train_in_processes(**arguments(inputs, tmp_path / "adapter", num_processes=2, **settings))
    assert_equal_to(single, card, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "training_args.bin").exists()


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"zero_stage": 3}, marks=needs_deepspeed)], ids=["no DeepSpeed", "ZeRO-3"]
)
def test_two_processes_that_are_killed_resume(inputs, single, tmp_path, settings):
    output = tmp_path / "adapter"
    asked = arguments(inputs, output, num_processes=2, **settings)
    started = (
        "from test_launch import arguments, train_in_processes\n"
        f"train_in_processes(**arguments({inputs!r}, {str(output)!r}, num_processes=2, **{settings!r}))"
    )
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(Path(__file__).parent)!r}]\n{started}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline, checkpoint = time.monotonic() + 240, Path(asked["files"].checkpoint_dir) / "checkpoint-2"
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # handed on to both: they end together, with a checkpoint
    process.wait(timeout=120)
    card = train_in_processes(**asked)
    assert card["resumed_from_step"] >= 2
    assert_equal_to(single, card, output)


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 2), (4, 1)], ids=["one pair", "two pairs"])
def test_pairs_of_processes_that_share_windows_train_what_one_trains(inputs, single, tmp_path, num_processes, batch_size):
    settings = {"batch_size": batch_size, "num_processes": num_processes, "sequence_parallel": 2}
    shared = arguments(inputs, tmp_path / "adapter", **settings)
    card = train_in_processes(**shared | {"form": "layer_inputs"})
    assert_equal_to(single, card, tmp_path / "adapter")
    assert 0 <= single[0]["tokens"] - card["tokens"] < 128  # the padding of a shorter window in a batch of two


def test_two_processes_share_windows_with_full_attention(inputs, tmp_path):
    alone = train_in_processes(**arguments(inputs, tmp_path / "alone", attention="full"))
    settings = {"attention": "full", "num_processes": 2, "sequence_parallel": 2}
    card = train_in_processes(**arguments(inputs, tmp_path / "adapter", **settings))
    assert_equal_to((alone, load_file(tmp_path / "alone" / "adapter_model.safetensors")), card, tmp_path / "adapter")


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A job of SLURM on two nodes: two network namespaces that are connected by a cable only, and an ``srun`` that starts a
    command in each of them."""
    names = [f"longqlora-{os.getpid()}-{node}" for node in (0, 1)]
    first, second = names
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}",
        *(f"ip -n {name} addr add 10.77.0.{node}/24 dev eth0" for node, name in enumerate(names, 1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "eth0")),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable, names=names), encoding="utf-8")
        (tmp_path / "bin" / "srun").chmod(0o755)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        for variable in ("GLOO_SOCKET_IFNAME=eth0", "MASTER_ADDR=10.77.0.1", "SLURM_JOB_ID=1"):
            monkeypatch.setenv(*variable.split("="))
        yield tmp_path
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and iproute2, to make network namespaces: {getattr(error, 'stderr', error)}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_nodes_train_what_two_processes_of_one_node_train(inputs, single, two_nodes, tmp_path):
    card = train_in_processes(**arguments(inputs, tmp_path / "adapter", num_nodes=2))
    assert_equal_to(single, card, tmp_path / "adapter")
    options = (tmp_path / "srun.txt").read_text().split()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=2"} <= set(options)
    assert not [path for path in (tmp_path / ".snakemake/longqlora").iterdir() if path.is_dir()]  # the arguments are removed


def test_accumulated_batches_of_different_lengths_weigh_by_their_tokens(inputs, tmp_path):
    """The short last window has fewer tokens: one batch of four and four batches of one learn the same."""
    settings = {"steps": 20}
    big = train_in_processes(**arguments(inputs, tmp_path / "big", batch_size=4, gradient_accumulation=1, **settings))
    small = train_in_processes(**arguments(inputs, tmp_path / "small", batch_size=1, gradient_accumulation=4, **settings))
    for row, reference in zip(small["trace"], big["trace"], strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)


def test_a_failing_process_is_an_error(inputs, tmp_path):
    asked = arguments(inputs, tmp_path / "adapter", num_processes=2) | {"extension": RopeExtension(target_context=32)}
    with pytest.raises(RuntimeError, match=r"one of 2 processes failed: ValueError: .*target_context 32 is below") as caught:
        train_in_processes(**asked)
    assert not is_worth_a_retry(caught.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_is_worth_a_retry(inputs, tmp_path, monkeypatch, rank):
    """The other process may lose its connection and report an error before it is ended."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        f"if os.environ.get('RANK') == '{rank}':\n"
        "    import torch.distributed\n"
        "    torch.distributed.all_reduce = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(LostProcesses, match="one of 2 processes failed"):
        train_in_processes(**arguments(inputs, tmp_path / "adapter", num_processes=2))


def test_deepspeed_that_is_missing_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("longqlora.training.train.find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"zero_stage 2 needs DeepSpeed, which is not installed: pip install deepspeed ninja \(with conda, add both",
    ):
        train(**arguments(inputs, tmp_path / "adapter", zero_stage=2))


def test_the_configuration_of_deepspeed_shards_and_offloads_what_the_stage_says():
    assert deepspeed_config(2, False)["zero_optimization"] == {"stage": 2}
    assert deepspeed_config(2, True)["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert deepspeed_config(3, True)["zero_optimization"]["offload_param"] == {"device": "cpu"}
