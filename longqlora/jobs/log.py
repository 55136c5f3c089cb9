"""The log file of a job, with progress, warnings and the traceback of an error; and settings of the process.

Import this module first in a script, because it sets the process up before torch is imported:

- Another attempt of a job that would fail again ends at once (:mod:`longqlora.jobs.retries`).
- Python's garbage collection is off until :func:`job_log` begins. While torch and transformers are imported, garbage collection
  takes a quarter of the time and frees nothing. :func:`importing` is for modules that are imported later.
- torch reads the settings of its memory allocators when it creates the first tensor, which importing bitsandbytes already does.
  On a CPU, large tensors get huge pages. On a GPU, memory segments can grow, which wastes less memory between tensors, unless
  the user has set the allocator otherwise.
- Ctrl-C ends the process silently until :func:`job_log` begins. Otherwise each job would print where in its imports it was.
- Progress bars are off. Jobs that run at the same time would overwrite each other's.
- transformers does not ask the hub to convert a model's older weights, which would open a pull request there.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longqlora.jobs.retries import end_if_failed_for_good, is_worth_a_retry, leave_mark, remove_mark

end_if_failed_for_good()
gc.disable()
INTERRUPT = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell script
if INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def job_log(path: str) -> Iterator[None]:
    """Write to the file ``path`` what the job logs and prints, also from native code and from its processes.

    On an error, write the traceback, then the error as :mod:`longqlora.jobs.terminal` finds it, its further lines indented, and
    exit with status 1; if another attempt would fail in the same way, leave a mark that says so.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    remove_mark(path)
    with open(path, "wb"), open(path, "ab") as file:  # appends, because several processes write to it
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout = sys.stderr  # which has no buffer, so that what is printed is in order with what is logged
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # otherwise each request to the hub is a line
    logging.captureWarnings(True)
    signal.signal(signal.SIGINT, INTERRUPT)
    start_garbage_collection()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        logging.exception("the job failed")
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{kind}{error}"
        logging.error("error: %s", message.replace("\n", "\n  "))
        if isinstance(error, Exception) and not is_worth_a_retry(error):
            leave_mark(path)
        sys.exit(1)


@contextmanager
def importing() -> Iterator[None]:
    """Import modules without garbage collection although :func:`job_log` has begun."""
    gc.disable()
    try:
        yield
    finally:
        start_garbage_collection()


def start_garbage_collection() -> None:
    """Let garbage collection begin. It skips the objects of the modules imported so far, which live as long as the process."""
    gc.freeze()
    gc.enable()
