"""Calls a function in this process, or with torchrun in several processes of this machine, one per GPU."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from pydantic import validate_call
from pydantic_core import to_jsonable_python

from longqlora.jobs.gpus import share_reservation
from longqlora.jobs.retries import LostProcesses, is_worth_a_retry

ROOT = Path(__file__).resolve().parent.parent.parent
ARGUMENTS, RESULT, ERROR = "arguments.json", "result.json", "error.json"  # files in a temporary folder


def launch(function: Callable[..., dict], *, num_processes: int, threads: int, by_torchrun: bool = False, **arguments) -> dict:
    """Call a function of this package, in several processes if ``num_processes`` says so.

    The arguments reach other processes as JSON. There pydantic validates them and rebuilds typed objects (pydantic models,
    dataclasses), by the annotations of the function's parameters.

    Args:
        function: annotated with types that pydantic knows; returns a dictionary of JSON values.
        num_processes: number of processes, one per GPU.
        threads: CPU threads of all processes together.
        by_torchrun: use torchrun for a single process too.
        arguments: keyword arguments of the function; ``device`` must be one of them.

    Returns:
        The result of the first process.

    Raises:
        RuntimeError: if one of several processes fails, with its error; LostProcesses if it may succeed when it is started
            again. The job's log has what they printed.
    """
    if num_processes == 1 and not by_torchrun:
        return function(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ARGUMENTS).write_text(json.dumps(to_jsonable_python(arguments)), encoding="utf-8")
        code = run_processes(
            ["-m", "longqlora.jobs.launch", function.__module__, function.__name__, folder],
            num_processes=num_processes,
            environment=process_environment(arguments["device"], threads // num_processes),
        )
        if code:
            error = Path(folder) / ERROR  # there is none if a process was killed
            reason, again = json.loads(error.read_text(encoding="utf-8")) if error.exists() else (f"exit status {code}", True)
            raise (LostProcesses if again else RuntimeError)(f"one of {num_processes} processes failed: {reason}")
        return json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))


def process_environment(device: str, threads: int) -> dict[str, str]:
    """Environment variables of each process; on a CPU the processes communicate through the loopback interface only."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(max(1, threads))}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    return environment


def run_processes(command: list[str], *, num_processes: int, environment: dict[str, str]) -> int:
    """Run a Python command in several processes with torchrun, and forward SIGTERM and SIGINT to them.

    Returns:
        The exit status, which is not 0 if one of them fails.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # for this machine only
    process = subprocess.Popen([*torchrun, *command], env=environment, start_new_session=True)
    former = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(module: str, function: str, folder: str) -> None:
    """Run by each process: call the function. The first process writes its result to the folder, and the first one that fails
    its error."""
    share_reservation()
    is_first = os.environ["RANK"] == "0"
    level = logging.INFO if is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        call = validate_call(getattr(import_module(module), function))
        result = call(**json.loads((Path(folder) / ARGUMENTS).read_text(encoding="utf-8")))
    except Exception as error:
        with suppress(FileExistsError), (Path(folder) / ERROR).open("x", encoding="utf-8") as file:
            json.dump([f"{type(error).__name__}: {error}", is_worth_a_retry(error)], file)
        raise
    if is_first:
        (Path(folder) / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
