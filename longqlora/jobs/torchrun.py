"""Runs a Python command in several processes with torchrun: on this machine, or on several nodes of a SLURM job.

On several nodes, ``srun`` starts this module once on each of them, and each starts torchrun. The processes find each other
through the first node, at MASTER_ADDR and MASTER_PORT if the environment sets them.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from longqlora.jobs.gpus import HELD_LOCKS, VISIBLE

ROOT = Path(__file__).resolve().parent.parent.parent
ONE_NODE = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
JOB_ID, NODE = "SLURM_JOB_ID", "SLURM_NODEID"


def process_environment(device: str, threads: int, num_nodes: int = 1) -> dict[str, str]:
    """Environment variables of each process.

    On a CPU, the processes of one machine communicate through the loopback interface only. On several nodes, SLURM assigns the
    GPUs; those that this job has reserved on its own machine mean nothing on another one.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of a process.
        num_nodes: number of nodes.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(max(1, threads))}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    if num_nodes > 1:
        return {name: value for name, value in environment.items() if name not in (VISIBLE, HELD_LOCKS)}
    if device == "cpu":
        environment["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    return environment


def nodes_problem(num_nodes: int) -> str | None:
    """Why a job that this machine runs cannot use several nodes, or None if it can."""
    if num_nodes == 1 or JOB_ID in os.environ:
        return None
    return (
        f"num_nodes {num_nodes} needs SLURM, and this is no job of SLURM ({JOB_ID} is not set): run Snakemake with --executor "
        f"slurm, or inside of an allocation (salloc --nodes={num_nodes}), or set num_nodes: 1"
    )


def run_on_nodes(command: list[str], *, num_nodes: int, num_processes: int, threads: int, environment: dict[str, str]) -> int:
    """Run a Python command in several processes on each node of this SLURM job, whose first node is this machine.

    Args:
        command: arguments of Python, the same on all nodes.
        num_nodes: number of nodes.
        num_processes: number of processes on each node.
        threads: CPU threads of all processes of a node together.
        environment: of all processes.

    Returns:
        The exit status, which is not 0 if one of the processes fails; SLURM then ends the others.

    Raises:
        ValueError: if this process does not belong to a SLURM job.
    """
    if problem := nodes_problem(num_nodes):
        raise ValueError(f"training.{problem}")
    srun = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={threads}"]
    torchrun = [
        f"--nnodes={num_nodes}",
        f"--nproc-per-node={num_processes}",
        f"--master-addr={os.environ.get('MASTER_ADDR') or socket.gethostname()}",
        f"--master-port={os.environ.get('MASTER_PORT') or free_port()}",
    ]
    each_node = [sys.executable, "-m", "longqlora.jobs.torchrun", *torchrun, *command]
    return run_until_end([*srun, "--kill-on-bad-exit", *each_node], environment)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_processes(command: list[str], *, num_processes: int, environment: dict[str, str]) -> int:
    """Run a Python command in several processes of this machine.

    Returns:
        The exit status, which is not 0 if one of them fails.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ONE_NODE, f"--nproc-per-node={num_processes}"]
    return run_until_end([*torchrun, *command], environment)


def run_until_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command until it ends, and on SIGTERM or SIGINT send it SIGTERM, which torchrun and srun hand on.

    Returns:
        Its exit status.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    former = {number: signal.signal(number, lambda *_: process.terminate()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


if __name__ == "__main__":  # on each node, in place of this process, which srun sends its signals to
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--node-rank={os.environ[NODE]}"]
    os.execv(sys.executable, [*torchrun, *sys.argv[1:]])
