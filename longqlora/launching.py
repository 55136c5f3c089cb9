"""A training in this process, or in several of this machine by torchrun, with DeepSpeed's ZeRO where it is asked for."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(threads: int = 1, **arguments) -> dict:
    """Train one system, see :func:`longqlora.training.train`, in ``settings["num_processes"]`` processes.

    Args:
        threads: cores for all processes together.
        arguments: to ``train``.

    Raises:
        ValueError: if DeepSpeed is asked for and not installed.
        RuntimeError: if one of several processes fails; what it said is on the terminal.
    """
    settings = arguments["settings"]
    if settings["zero_stage"] and not find_spec("deepspeed"):
        raise ValueError(
            f"training.zero_stage {settings['zero_stage']} needs DeepSpeed, which is not installed: pip install deepspeed, or "
            "zero_stage: 0"
        )
    if settings["num_processes"] == 1 and settings["zero_stage"] == 0:
        from longqlora.training import train

        return train(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "arguments.json", Path(folder) / "card.json"
        asked.write_text(json.dumps(arguments))
        run_processes(
            ["-m", "longqlora.launching", str(asked), str(answered)],
            num_processes=settings["num_processes"],
            environment=process_environment(arguments["device"], threads // settings["num_processes"]),
        )
        return json.loads(answered.read_text())


def process_environment(device: str, threads: int) -> dict[str, str]:
    """Environment of each process; on a CPU they speak through the loopback interface alone."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(max(1, threads))}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    return environment


def run_processes(command: list[str], *, num_processes: int, environment: dict[str, str]) -> None:
    """Run a Python command in several processes by torchrun, and hand SIGTERM and SIGINT on to them.

    Raises:
        RuntimeError: if one fails.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # open to no other machine
    process = subprocess.Popen([*torchrun, *command], env=environment, start_new_session=True)
    former = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if code:
        raise RuntimeError(f"one of {num_processes} training processes failed (exit status {code}); its error stands above")


def deepspeed_config(stage: int, offload: bool) -> dict:
    """DeepSpeed's configuration: ZeRO-2 shards gradients and the optimizer's state, ZeRO-3 the weights too (Rajbhandari et al.
    2020, arXiv 1910.02054).

    Args:
        stage: 2 or 3.
        offload: keep the optimizer's state, with stage 3 the weights too, in CPU memory.
    """
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if offload:
            zero["offload_param"] = {"device": "cpu"}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # those of transformers
        "zero_force_ds_cpu_optimizer": False,  # else offloading would refuse them
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(automatic, "auto"),
    }


def main(asked: str, answered: str) -> None:
    """What each process runs: train, and the first one write the card."""
    import logging

    from longqlora.training import train

    is_first = os.environ["RANK"] == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    card = train(**json.loads(Path(asked).read_text()))
    if is_first:
        Path(answered).write_text(json.dumps(card))


if __name__ == "__main__":
    main(*sys.argv[1:])
