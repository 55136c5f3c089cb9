"""A function in this process, or in several of this machine by torchrun, for trainings and evaluations."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from longqlora.jobs.gpus import share_reservation

ROOT = Path(__file__).resolve().parent.parent.parent


def launch(function: Callable[..., dict], *, num_processes: int, threads: int, by_torchrun: bool = False, **arguments) -> dict:
    """Call a function of this package, in several processes if asked for; each finds the others by torchrun's environment.

    Args:
        function: takes and returns what JSON can hold.
        num_processes: on GPUs one each.
        threads: cores for all processes together.
        by_torchrun: also for a single process.
        arguments: to the function, ``device`` among them.

    Returns:
        What the function returned, in the first process.

    Raises:
        RuntimeError: if one of several processes fails; what it said is on the terminal.
    """
    if num_processes == 1 and not by_torchrun:
        return function(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "arguments.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(arguments))
        run_processes(
            ["-m", "longqlora.jobs.launch", function.__module__, function.__name__, str(asked), str(answered)],
            num_processes=num_processes,
            environment=process_environment(arguments["device"], threads // num_processes),
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
        raise RuntimeError(f"one of {num_processes} processes failed (exit status {code}); its error stands above")


def main(module: str, function: str, asked: str, answered: str) -> None:
    """What each process runs: the function, and the first one write what it returned."""
    share_reservation()
    is_first = os.environ["RANK"] == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    answer = getattr(import_module(module), function)(**json.loads(Path(asked).read_text()))
    if is_first:
        Path(answered).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
