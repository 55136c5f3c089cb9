"""What a path of a data file in a configuration is: a local file, an address, or an output of the workflow."""

import glob
import os
import re

REMOTE = re.compile(r"^\w[\w+.-]*://|::.*://")  # an address of fsspec, perhaps in a chain (simplecache::https://…)


def is_local(path: str) -> bool:
    """Whether a data path is a file of this machine, not an address that ``fsspec`` opens."""
    return not REMOTE.search(path)


def is_made_here(path: str) -> bool:
    """Whether a rule of the workflow makes this path, so that it need not exist yet."""
    return path.startswith("results/")


def expand(pattern: str) -> list[str]:
    """The local files that a pattern matches, sorted; addresses and outputs of the workflow stay as they are. As in an address,
    ``**`` stands for folders at any depth, or none.

    This happens once, when the configuration is read. Jobs get names of files, in which brackets, ``?`` and ``*`` mean nothing.
    """
    if not is_local(pattern) or is_made_here(pattern):
        return [pattern]
    return sorted(glob.glob(with_names_escaped(pattern), recursive=True)) or [pattern]


def with_names_escaped(pattern: str) -> str:
    """A pattern without the wildcards that are part of a name: in the file or the folders of the pattern that exist."""
    folder, name = os.path.split(pattern)
    if os.path.lexists(pattern) or folder == pattern:
        return glob.escape(pattern)
    return os.path.join(with_names_escaped(folder), name) if folder else pattern
