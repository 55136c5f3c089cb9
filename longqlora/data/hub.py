"""Models and data sets on the Hugging Face Hub, each with the revision to read: a branch, a tag or a commit.

A revision stands after an @, in the hub's own notation: ``owner/name@revision`` for a model or tokenizer,
``hf://datasets/owner/name@revision/file`` for a file. A job first replaces the revision with the commit that it has now
(:func:`pinned_model`, :func:`pinned_file`), then reads and records that commit, so it never mixes two versions.
"""

import re
from pathlib import Path
from urllib.parse import unquote

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")
HF = "hf://"
MAIN = "main"  # the revision of a path that names none


def is_hub_id(path: str) -> bool:
    """Whether a model's path is a hub id (``owner/name`` or ``owner/name@revision``) and not a folder of this machine."""
    found = HUB_ID.fullmatch(path)
    return found is not None and not Path(path).exists() and not Path(found[1]).exists()  # a folder has no revision


def split_revision(path: str) -> tuple[str, str]:
    """A hub id without its revision, and the revision, as ``from_pretrained`` takes them; a folder stays as it is."""
    found = HUB_ID.fullmatch(path) if is_hub_id(path) else None
    return (found[1], unquote(found[2] or MAIN)) if found else (path, MAIN)


def pinned_model(path: str) -> str:
    """A hub id at the commit that its revision has now, or without a network at that in the hub's cache; a folder as it is.

    Raises:
        OSError: if the hub does not have it, or does not let this user read it.
        RevisionResolutionError: if there is no network, and it is not in the cache.
    """
    if not is_hub_id(path):
        return path
    name, revision = split_revision(path)
    return f"{name}@{find_commit(name, 'model', revision)}"


def pinned_file(path: str) -> str:
    """An address on the hub (``hf://…``), wildcards included, at the commit that its revision has now; any other path as it is.

    Raises:
        OSError, RevisionResolutionError: see :func:`pinned_model`.
        ValueError: if the address is not one of a file on the hub.
    """
    if not path.startswith(HF):
        return path
    from huggingface_hub.utils import parse_hf_uri

    file = parse_hf_uri(path)
    if file.type == "bucket":  # has no revisions
        return path
    folder = "" if file.type == "model" else f"{file.type}s/"
    return f"{HF}{folder}{file.id}@{find_commit(file.id, file.type, file.revision or MAIN)}/{file.path_in_repo}"


def find_commit(name: str, kind: str, revision: str) -> str:
    """The hash of the commit that a revision has now."""
    from huggingface_hub import HfApi  # slow to import, and few experiments need it

    return HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved
