"""Calls a function in this process, or with torchrun in several processes of one or more machines, one per GPU."""

import json
import logging
import os
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
from longqlora.jobs.torchrun import process_environment, run_on_nodes, run_processes

SHARED = Path(".snakemake/longqlora")  # the working directory is on a file system that all nodes share
ARGUMENTS, STARTED, RESULT, ERROR = "arguments.json", "started", "result.json", "error.json"  # files in a temporary folder


def launch(
    function: Callable[..., dict],
    *,
    num_processes: int,
    threads: int,
    num_nodes: int = 1,
    by_torchrun: bool = False,
    **arguments,
) -> dict:
    """Call a function of this package, in several processes if ``num_processes`` says so.

    The arguments reach other processes as JSON. There pydantic validates them and rebuilds typed objects (pydantic models,
    dataclasses), by the annotations of the function's parameters.

    Args:
        function: annotated with types that pydantic knows; returns a dictionary of JSON values.
        num_processes: number of processes on each node, one per GPU.
        threads: CPU threads of all processes of a node together.
        num_nodes: number of nodes of the SLURM job that this process belongs to; 1: all processes are on this machine.
        by_torchrun: use torchrun for a single process too.
        arguments: keyword arguments of the function; ``device`` must be one of them.

    Returns:
        The result of the first process.

    Raises:
        ValueError: if there are to be several nodes, but this process does not belong to a SLURM job.
        RuntimeError: if one of several processes fails, with its error; LostProcesses if it may succeed when it is started
            again. The job's log has what they printed.
    """
    world_size = num_processes * num_nodes
    if world_size == 1 and not by_torchrun:
        return function(**arguments)
    if num_nodes > 1:
        SHARED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SHARED.resolve() if num_nodes > 1 else None) as folder:
        (Path(folder) / ARGUMENTS).write_text(json.dumps(to_jsonable_python(arguments)), encoding="utf-8")
        command = ["-m", "longqlora.jobs.launch", function.__module__, function.__name__, folder]
        environment = process_environment(arguments["device"], threads // num_processes, num_nodes)
        if num_nodes > 1:
            code = run_on_nodes(
                command, num_nodes=num_nodes, num_processes=num_processes, threads=threads, environment=environment
            )
        else:
            code = run_processes(command, num_processes=num_processes, environment=environment)
        if code:
            raise error_of(Path(folder), code, world_size)
        return json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))


def error_of(folder: Path, code: int, world_size: int) -> RuntimeError:
    """The error of several processes, of which one has failed; LostProcesses if it may succeed when it is started again."""
    error = folder / ERROR
    if error.exists():
        reason, again = json.loads(error.read_text(encoding="utf-8"))
    else:  # one was killed, or could not even be started
        reason, again = f"exit status {code}", (folder / STARTED).exists()
    return (LostProcesses if again else RuntimeError)(f"one of {world_size} processes failed: {reason}")


def main(module: str, function: str, folder: str) -> None:
    """Run by each process: call the function. The first process writes its result to the folder, and the first one that fails
    its error."""
    share_reservation()
    (Path(folder) / STARTED).touch()
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
