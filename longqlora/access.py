"""Access to models and data that are not on this machine, checked before the first job of a run.

On the Hugging Face Hub, every repository, revision and file is looked up, as well as whether this user may read it. Any other
address is looked up with ``fsspec``, and to a store of checkpoints a file is written. What no job of the run needs is not
looked up. Without a network, a model in the hub's cache is enough. The configuration of a model on the hub is read too, to see
whether it can be extended.

Imports nothing heavy before it is needed: most experiments have nothing to look up.
"""

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from longqlora.config.completed import Experiment
from longqlora.config.paths import is_local
from longqlora.data.hub import HF, MAIN, is_hub_id, split_revision
from longqlora.modeling.model_files import VOCABULARY, WEIGHTS, weight_files
from longqlora.preflight import first_keys, fit_problems, paths_of, read_config

REQUESTS = 16  # at the same time
TIMEOUT = 10  # seconds, of a request to the hub
LOGIN = "log in on this machine (hf auth login, or set HF_TOKEN)"

FindFile = Callable[[list[str]], str]  # from the names of the files in a repository to that which is read; ValueError without
LookUp = Callable[[str, str, str], Any]  # see repository


def access_problems(experiment: Experiment, params: Iterable[Any]) -> list[str]:
    """Find what the jobs of a run need and cannot read; a line for each.

    Args:
        experiment: names the models and the data.
        params: of the jobs that are going to run.

    Raises:
        ImportError: if a package is missing that is needed to look something up.
    """
    used = set(strings_in(list(params)))
    checks: list[tuple[str, str, Callable[[str, LookUp], str | None]]] = [
        (key, path, check)
        for what, check in (("model", model_problem), ("tokenizer", tokenizer_problem))
        for key, path in first_keys(experiment, what).items()
        if is_hub_id(path) and path in used
    ]
    for key, paths in paths_of(experiment).items():
        checks += [(key, path, file_problem) for path in paths if not is_local(path) and path in used]
    stores = {system.progress.checkpoint_store for system in experiment.systems.values() if system.progress}
    checks += [("training.checkpoint_store", path, store_problem) for path in sorted(used & (stores - {None}))]
    first_key: dict[str, str] = {}  # by problem: a gated data set is one mistake, not one for each of its files
    models = set()  # that can be read
    with ThreadPoolExecutor(REQUESTS) as pool:
        look_up = cache(repository)  # once for all files of a data set, because the hub limits the number of requests
        problems = pool.map(lambda check: check[2](check[1], look_up), checks)
        for (key, path, check), problem in zip(checks, problems, strict=True):
            if problem:
                first_key.setdefault(problem, key)
            elif check is model_problem:
                models.add(path)
    return [f"{key}: {problem}" for problem, key in first_key.items()] + list(unfit_models(experiment, models))


def unfit_models(experiment: Experiment, models: set[str]) -> Iterator[str]:
    """Yield which models on the hub cannot be extended, trained or evaluated as configured.

    Raises:
        ImportError: see :func:`access_problems`.
    """
    keys = {path: key for key, path in first_keys(experiment, "model").items()}
    damaged: set[str] = set()
    for name, system in experiment.systems.items():
        if system.model not in models - damaged:
            continue
        from huggingface_hub import hf_hub_download

        repository_name, revision = split_revision(system.model)
        try:
            config = read_config(Path(hf_hub_download(repository_name, "config.json", revision=revision)).parent)
        except ValueError as error:
            damaged.add(system.model)
            yield f"{keys[system.model]}: {error}"
            continue
        for problem in fit_problems(config, system):
            yield f"{experiment.key_of(name)}: {system.model}: {problem}"


def strings_in(value: Any) -> Iterator[str]:
    """Yield all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


# --- what is looked up -----------------------------------------------------------------------------------------------------


def model_problem(path: str, look_up: LookUp) -> str | None:
    """Why a model on the hub cannot be loaded; None if it can."""

    def find(names: list[str]) -> str:
        if "config.json" not in names:
            raise ValueError("holds no config.json, so it is not a model of transformers")
        return first_of(WEIGHTS, names, f"holds no weights ({' or '.join(WEIGHTS[::2])})")

    return hub_problem(*split_revision(path), "model", find, look_up)


def tokenizer_problem(path: str, look_up: LookUp) -> str | None:
    """Why a tokenizer on the hub cannot be loaded; None if it can."""
    no_tokenizer = "holds no tokenizer (tokenizer.json); give that of another repository, with the key tokenizer"
    return hub_problem(*split_revision(path), "model", lambda names: first_of(VOCABULARY, names, no_tokenizer), look_up)


def first_of(wanted: Iterable[str], names: list[str], message: str) -> str:
    """The first of some names that is there.

    Raises:
        ValueError: with the message, if none is.
    """
    for name in wanted:
        if name in names:
            return name
    raise ValueError(message)


def file_problem(address: str, look_up: LookUp) -> str | None:
    """Why a file at an address, or the files that match a pattern, cannot be read; None if they can."""
    if address.startswith(HF):
        from huggingface_hub.utils import parse_hf_uri

        try:
            file = parse_hf_uri(address)
        except ValueError as error:
            return f"{address}: {error}"
        if file.type != "bucket":
            return hub_problem(file.id, file.revision or MAIN, file.type, partial(matching, file.path_in_repo), look_up)
    import fsspec

    try:
        filesystem, name = fsspec.url_to_fs(address)
        if glob.has_magic(name) and not filesystem.glob(name):
            return f"{address}: no file matches"
        if not glob.has_magic(name):
            filesystem.info(name)
    except FileNotFoundError:
        return f"{address}: there is no such file"
    except Exception as error:  # each file system of fsspec has its own errors
        return f"{address}: cannot be read ({type(error).__name__}: {error})"
    return None


def store_problem(address: str, look_up: LookUp) -> str | None:
    """Why no checkpoint can be copied to an address; None if it can."""
    from longqlora.jobs.checkpoint_store import write_and_remove

    try:
        write_and_remove(address)
    except Exception as error:  # each file system of fsspec has its own errors
        return f"{address}: cannot be written to ({type(error).__name__}: {error})"
    return None


def matching(pattern: str, names: list[str]) -> str:
    """The first file of a repository that a pattern matches.

    Raises:
        ValueError: if there is none; the message names similar files.
    """
    from fsspec.utils import glob_translate

    if pattern in names:
        return pattern
    matches = re.compile(glob_translate(pattern)).match
    if found := next(filter(matches, sorted(names)), None):
        return found
    same_name = [name for name in names if Path(name).name == Path(pattern).name]
    similar = same_name or difflib.get_close_matches(pattern, names, n=3)
    raise ValueError(f"has no file {pattern}" + (f"; similar: {', '.join(similar[:3])}" if similar else ""))


# --- the hub ---------------------------------------------------------------------------------------------------------------


def repository(name: str, revision: str, kind: str) -> Any:
    """What the hub says about a repository; see :func:`hub_problem`."""
    from huggingface_hub import HfApi

    return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)


def hub_problem(name: str, revision: str, kind: str, find: FindFile, look_up: LookUp) -> str | None:
    """Why something in a repository on the hub cannot be read; None if it can.

    Args:
        name: of the repository, owner/name.
        revision: branch, tag or commit.
        kind: ``model`` or ``dataset``.
        find: names the file to ask for.
        look_up: :func:`repository`, which may remember its answers.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    shown = f"{kind} {name}" + (f" at revision {revision}" if revision != MAIN else "")
    try:
        info = look_up(name, revision, kind)
        file = find([sibling.rfilename for sibling in info.siblings or []])
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=info.sha), timeout=TIMEOUT)
    except ValueError as error:
        return f"{shown}: {error}"
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            return f"{shown}: {refusal(error, name, revision, kind)}"
        return cache_problem(name, revision, kind, find, f"answers {error.response.status_code}")
    except Exception as error:  # without a network, it is one of the HTTP library that huggingface_hub uses
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "is switched off (HF_HUB_OFFLINE)" if offline else f"cannot be reached ({error})"
        return cache_problem(name, revision, kind, find, reason)
    return None


def refusal(error: Any, name: str, revision: str, kind: str) -> str:
    """What the hub refuses, and how to get it."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{name}"
    if isinstance(error, GatedRepoError):
        steps = f"accept its license at {page}"
        return f"is gated; {steps}" + (" with the account of this machine's token" if get_token() else f", then {LOGIN}")
    if isinstance(error, RepositoryNotFoundError):
        hint = "or the account of this machine's token may not read it" if get_token() else f"or is private; if so, {LOGIN}"
        return f"is not at {page}, {hint}"
    if isinstance(error, RevisionNotFoundError):
        refs = HfApi().list_repo_refs(name, repo_type=kind)
        known = [ref.name for ref in [*refs.branches, *refs.tags]]
        return f"has no such revision; branches and tags: {', '.join(known[:10])}"
    if error.response.status_code == 401:
        where = "the variable HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
        return f"the hub does not accept the token of this machine, from {where}; give a valid one, or none for a public {kind}"
    return str(error.server_message or error).splitlines()[0]


def cache_problem(name: str, revision: str, kind: str, find: FindFile, reason: str) -> str | None:
    """Why something cannot be read without the hub; None if it is in the hub's cache, where only models are looked for.

    Args:
        name, revision, kind, find: see :func:`hub_problem`.
        reason: why the hub is not asked.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionResolutionError
    from huggingface_hub.file_download import repo_folder_name

    if kind != "model":
        return f"{kind} {name}: the hub {reason}; download the file on a machine with a network, and give its local path"
    cached = Path(constants.HF_HUB_CACHE)
    try:
        commit = HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved
        folder = cached / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots" / commit
        find([str(path.relative_to(folder)) for path in folder.rglob("*") if path.exists()])
        if any(folder.glob("*.index.json")):
            weight_files(folder)
    except (RevisionResolutionError, ValueError):
        pinned = f" --revision {revision}" if revision != MAIN else ""
        return (
            f"{name} is not in the hub's cache ({cached}), and the hub {reason}; "
            f"on a machine with a network, run: hf download {name}{pinned}"
        )
    return None
