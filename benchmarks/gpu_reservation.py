"""A case of the GPU check: reserve a GPU as a job does. Imports nothing that starts CUDA, as reserving comes first in a job."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from longqlora.jobs.gpus import HELD_LOCKS, LOCK_FOLDER, VISIBLE, list_gpus, reserve_gpus

SECOND_JOB = """
import sys
from pathlib import Path
from longqlora.jobs.gpus import reserve_gpus
with reserve_gpus("cuda", 1, driver=lambda: sys.argv[2:], folder=Path(sys.argv[1])):
    pass
"""


def second_job_gets_one(gpus: list[str], folder: Path, seconds: float) -> bool:
    """Whether another process can reserve a GPU within so many seconds."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != HELD_LOCKS}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", SECOND_JOB, str(folder), *gpus]
    try:
        subprocess.run(command, env=environment, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def reserve_and_release(device: str) -> Iterator[dict]:
    """Reserve a GPU, by the real driver and in the machine's folder where there is one; look whether another job waits.

    Raises:
        RuntimeError: if it does not wait, or waits too long.
    """
    with tempfile.TemporaryDirectory() as temporary:
        on_gpu = device == "cuda"
        folder, gpus = (LOCK_FOLDER, list_gpus()) if on_gpu else (Path(temporary), ["GPU-0"])
        yield {"gpus": gpus}
        with reserve_gpus("cuda", 1, driver=lambda: gpus, folder=folder):
            yield {"reserved": os.environ[VISIBLE], "seen_by_torch": torch.cuda.device_count()}
            if second_job_gets_one(gpus, folder, seconds=2):
                raise RuntimeError("another job reserved the GPU that is reserved already")
        if not second_job_gets_one(gpus, folder, seconds=20):
            raise RuntimeError("another job did not get the GPU that was released")
        yield {"another_job": "waited until the end"}
