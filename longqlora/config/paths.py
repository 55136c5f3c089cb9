"""What a path of a data file in a configuration is: a local file, an address, or an output of the workflow."""

import glob
import re
from pathlib import Path

REMOTE = re.compile(r"^\w[\w+.-]*://|::.*://")  # an address of fsspec, perhaps in a chain (simplecache::https://…)


def is_local(path: str) -> bool:
    """Whether a data path is a file of this machine, not an address that ``fsspec`` opens."""
    return not REMOTE.search(path)


def is_made_here(path: str) -> bool:
    """Whether a rule of the workflow makes this path, so that it need not exist yet."""
    return path.startswith("results/")


def expand(pattern: str) -> list[str]:
    """The local files that a pattern matches, sorted; addresses and outputs of the workflow stay as they are."""
    if not is_local(pattern) or is_made_here(pattern) or Path(pattern).is_file():  # a name may have brackets
        return [pattern]
    return sorted(glob.glob(pattern)) or [pattern]
