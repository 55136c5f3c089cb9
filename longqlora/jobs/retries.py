"""Which failed jobs are worth another attempt.

Snakemake starts a failed job again, as often as ``retries`` of its rule says, whatever the reason was. That helps if the job
was killed, preempted, out of memory (an attempt asks for more than the one before), or cut off from the network. Any other
failure would come again: then a mark is left beside the log (:func:`leave_mark`), and further attempts end before they import
anything (:func:`end_if_failed_for_good`). An attempt heeds only the mark of the attempt before it, and a first attempt removes
it. So a mark of an earlier run stops nothing, wherever the job runs, unless the first attempt was killed before it began.

This module uses the standard library only: Snakemake imports it at every start.
"""

import errno
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from longqlora.jobs.memory import is_out_of_memory

ERRORS = (ConnectionError, TimeoutError)  # of Python
NAMES = {
    "Interrupted",  # by a signal: a training, which wrote a checkpoint
    "gaierror",  # a host name that is not found: name servers are often out of reach for a moment
    "TransportError",  # httpx2, for the Hugging Face Hub
    "Timeout",  # requests
    "ChunkedEncodingError",  # requests
    "ClientConnectionError",  # aiohttp, for https addresses and s3fs
    "ClientPayloadError",  # aiohttp
    "HTTPClientError",  # botocore
    "IncompleteRead",  # http.client, urllib3
    "DistNetworkError",  # torch.distributed
}
"""Names of the classes of such errors, or of their bases; the packages may not be installed."""
NEVER = {"OfflineModeIsEnabled"}  # a ConnectionError of huggingface_hub that the user has asked for
STATUSES = {408, 429, 500, 502, 503, 504}  # of HTTP: the server is busy or out of order
NUMBERS = {
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ESTALE,
}  # ESTALE: a network file system
LOST_PEER = re.compile(  # processes that train together, when one of them is killed
    r"connection (closed|reset|refused)|remote process exited|socket timeout|broken pipe|timed out waiting|"
    r"before timing out|nccl error|communicator was aborted",
    re.IGNORECASE,
)


class LostProcesses(RuntimeError):
    """Processes of a job ended for a reason that another attempt may not meet."""


def is_worth_a_retry(error: BaseException) -> bool:
    """Whether the job that ended with this error may succeed if it is started again."""
    return is_out_of_memory(error) or any(map(is_passing, with_causes(error)))


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it, also if it was raised ``from None``."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if error.__suppress_context__ else None)


def is_passing(error: BaseException) -> bool:
    """Whether an error is one of a connection, a busy server or a lost process."""
    names = {each.__name__ for each in type(error).__mro__}
    if names & NEVER:
        return False
    if isinstance(error, (*ERRORS, LostProcesses)) or names & NAMES or http_status(error) in STATUSES:
        return True
    if isinstance(error, OSError) and error.errno in NUMBERS:
        return True
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None


def http_status(error: BaseException) -> int | None:
    """The status of HTTP with which a server answered, if the error has one: of requests, httpx2, aiohttp, urllib, botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(response, "status_code", None), getattr(error, "status", None), getattr(error, "code", None))
    return next((status for status in found if isinstance(status, int)), None)


# --- the mark --------------------------------------------------------------------------------------------------------------


def attempt_of_script() -> tuple[int, str | None]:
    """Which attempt of a job this process is, from 1 on, and the job's log. Snakemake gives both to the script that it runs."""
    job = getattr(sys.modules["__main__"], "snakemake", None)
    resources, files = getattr(job, "resources", None), getattr(job, "log", None)
    return getattr(resources, "attempt", 1), str(files[0]) if files else None


def mark_of(log: str | Path) -> Path:
    """The file of a job's mark. It is a copy of the log, which Snakemake removes before each attempt."""
    return Path(f"{log}.failed")


def leave_mark(log: str | Path) -> None:
    """Leave the log of this attempt as a mark that another one would fail in the same way."""
    mark_of(log).write_text(
        Path(log).read_text(encoding="utf-8", errors="replace") + last_line(attempt_of_script()[0]), encoding="utf-8"
    )


def remove_mark(log: str | Path) -> None:
    """Remove the mark, if there is one, because the job is done again."""
    mark_of(log).unlink(missing_ok=True)


def last_line(attempt: int) -> str:
    """The line of a mark that says which attempt has ended last."""
    return f"attempt {attempt} failed, and another one would fail in the same way\n"


def has_failed_for_good(log: str | Path | None, attempt: int) -> bool:
    """Whether the job has a mark, and this attempt is the last one that ended with it."""
    if log is None or not mark_of(log).is_file():
        return False
    return mark_of(log).read_text(encoding="utf-8").endswith(last_line(attempt))


def end_if_failed_for_good() -> None:
    """End this process as the attempt before it ended, if that failed for a reason that remains. The log says so again."""
    attempt, log = attempt_of_script()
    if attempt == 1 and log:
        remove_mark(log)
    elif log and has_failed_for_good(log, attempt - 1):
        with mark_of(log).open("a", encoding="utf-8") as mark:
            mark.write(last_line(attempt))
        shutil.copyfile(mark_of(log), log)
        sys.exit(1)
