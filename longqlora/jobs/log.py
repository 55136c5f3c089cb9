"""The log file of a job, with progress, warnings and the traceback of an error; and settings of the process.

Import this module first in a script, because it sets the process up before torch is imported:

- Python's garbage collection is off until :func:`job_log` begins. While torch and transformers are imported, garbage collection
  takes a quarter of the time and frees nothing.
- torch reads the settings of its memory allocators when it creates the first tensor, which importing bitsandbytes already does.
  On a CPU, large tensors get huge pages. On a GPU, memory segments can grow, which wastes less memory between tensors, unless
  the user has set the allocator otherwise.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

gc.disable()
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def job_log(path: str) -> Iterator[None]:
    """Write log messages and warnings to the file ``path``.

    On an error, write the traceback to the file and the error as its last line, where :mod:`longqlora.jobs.terminal` finds it,
    and exit with status 1.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"")
    logging.basicConfig(  # appends, because the processes of a job write to the same file
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)
    gc.freeze()  # imported modules live as long as the process: later garbage collections skip their objects
    gc.enable()
    try:
        yield
    except Exception as error:
        logging.exception("the job failed")
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        logging.error("error: %s", message)
        sys.exit(1)
    except KeyboardInterrupt:
        logging.error("error: interrupted")
        sys.exit(1)
