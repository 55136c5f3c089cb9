"""The log file of a job: plain lines of progress, warnings, and the traceback if the job fails.

Scripts import this module first: until the job begins, Python collects no garbage. Its passes over the many objects that
torch and transformers create are a quarter of the time that their import takes, and find nothing. How torch allocates memory
is decided at the latest when it makes its first tensor, and importing bitsandbytes makes one: large tensors on a CPU get huge
pages; on a GPU segments can grow, so that less memory is lost between tensors, unless the user has set otherwise.
"""

import gc
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

gc.disable()
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def job_log(path: str):
    """Send logging and warnings to the file ``path``; on an error write the traceback there, say in one line on the terminal
    what went wrong and where to read more, and exit with status 1."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path, filemode="w", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)
    gc.freeze()  # what is imported stays: later garbage collections skip it
    gc.enable()
    try:
        yield
    except Exception as error:
        logging.exception("the job failed")
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        sys.exit(f"error: {message}\n(more in {path})")
