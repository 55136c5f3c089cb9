"""Publishing a trained system on the Hugging Face Hub: a plan of what would be sent, and its upload in one commit.

The repository gets the model folder, with the results of the evaluation in its model card, the adapter in ``adapter/`` and the
report of the experiment. Only files that are known by name are sent, never checkpoints or logs, and paths of this machine are
removed from their text.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from longqlora.publishing.hub_card import License, hub_card, license_in, read_card
from longqlora.publishing.hub_files import (
    ADAPTER_FILES,
    VERBATIM,
    adapter_config,
    base_paths,
    files_of_adapter,
    files_of_model,
    without_base_path,
    without_local_paths,
)

TIMEOUT = 10  # seconds, of a question to the hub
LOGIN = "log in on this machine with a token that may write (hf auth login, or set HF_TOKEN)"
ADAPTER = "adapter"  # folder of the repository
REPLACED = ("*.safetensors", "*.safetensors.index.json", f"{ADAPTER}/*")
"""Files of the repository that an upload replaces as a whole, because old weights could be loaded in the place of new ones."""


@dataclass(frozen=True)
class Publication:
    """What to publish, and as what.

    Attributes:
        results: folder of the experiment.
        system: name of the system.
        repository: hub id, owner/name.
        private: whether a repository that is not there yet is created as a private one.
        license: id of the license on the hub; None for that of the base model.
        base: hub id of the base model; None for that which the experiment has.
    """

    results: Path
    system: str
    repository: str
    private: bool = False
    license: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class UploadPlan:
    """What would be sent to the hub.

    Attributes:
        publication: what was asked for.
        card: the model card.
        files: a file of this machine or its contents, by the path in the repository.
        notes: what the user should know.
        problems: why it cannot be published.
        commit: the newest commit of the repository; None if the repository is not there, or the hub could not be asked.
        state: of the repository, in words.
        old_files: files of the repository that would be deleted.
    """

    publication: Publication
    card: ModelCard
    files: dict[str, Path | bytes]
    notes: list[str]
    problems: list[str]
    commit: str | None = None
    state: str = ""
    old_files: tuple[str, ...] = ()


# --- the plan --------------------------------------------------------------------------------------------------------------


def plan_upload(publication: Publication) -> UploadPlan:
    """Find what would be sent to the hub, without sending anything.

    Raises:
        ValueError: if the experiment has no such system, a file is missing or damaged, or a name is illegal.
    """
    for key, name in (("--repo", publication.repository), ("--base", publication.base)):
        if name is not None:
            check_hub_name(key, name)
    results, system, notes = publication.results, publication.system, []
    files: dict[str, Path | bytes] = {file.name: file for file in files_of_model(results, system)}
    paths_of_base = list(base_paths(results, system))
    own: Any = read_card(results / "models" / system / "README.md").data
    base = publication.base or own.base_model
    license = License(publication.license) if publication.license else license_of(base, paths_of_base[-1])
    card = hub_card(results, system, repository=publication.repository, license=license, base=base)
    shown_base = base or Path(paths_of_base[-1]).name
    files["README.md"] = without_base_path(str(card), paths_of_base[-1], shown_base).encode()
    if (adapter := results / "adapters" / system).is_dir():
        fits = shown_base if len(paths_of_base) == 1 else Path(paths_of_base[0]).name
        files |= {f"{ADAPTER}/{file.name}": file for file in files_of_adapter(adapter)}
        files[f"{ADAPTER}/{ADAPTER_FILES[0]}"] = adapter_config(adapter, fits)
        if not base or len(paths_of_base) > 1:
            notes.append(f"the base model in {ADAPTER}/{ADAPTER_FILES[0]} is {fits!r}, which is no hub id")
    if (report := results / "report.html").is_file():
        files[report.name] = report
    else:
        notes.append(f"there is no {report}, so none is sent")
    for name in sorted(files):
        if Path(name).name not in VERBATIM and not name.endswith(".safetensors"):
            files[name], found = without_local_paths(files[name])
            notes += [f"{name}: {path} is sent as {short}" for path, short in found.items()]
    if not base:
        notes.append(f"the base model, {paths_of_base[-1]}, has no hub id: give it with --base if it has one")
    problems = [] if license else [f"the license of {shown_base} is not known: give it with --license, such as apache-2.0"]
    return ask_hub(UploadPlan(publication, card, dict(sorted(files.items())), notes, problems))


def check_hub_name(key: str, name: str) -> None:
    """Check that a name can be that of a repository.

    Raises:
        ValueError: if it cannot; the message names the argument.
    """
    if name.count("/") != 1:
        raise ValueError(f"{key} {name}: is not a repository's name; write it as owner/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{key} {name}: {error}") from None


def license_of(base: str | None, path: str) -> License | None:
    """The license of the base model, by its model card: on the hub, or in a folder; None if none is found.

    Args:
        base: hub id; None if it has none.
        path: of the base model, as the training has it.
    """
    if base:
        try:
            return license_in(HfApi().model_info(base, timeout=TIMEOUT).card_data, base)
        except Exception:  # without a network, it is one of the HTTP library that huggingface_hub uses
            return None
    card = Path(path) / "README.md"
    return license_in(read_card(card).data) if card.is_file() else None


# --- the hub ---------------------------------------------------------------------------------------------------------------


def ask_hub(plan: UploadPlan) -> UploadPlan:
    """The plan with what the hub says of the repository and the model card, or why it could not be asked."""
    asked, problems = plan.publication, list(plan.problems)
    visibility = "private" if asked.private else "public"
    try:
        problems += metadata_problems(plan.card)
        info = HfApi().model_info(asked.repository, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        hidden = "" if get_token() else ", unless it is there and private, which only a login shows"
        return replace(plan, state=f"would be created, {visibility}{hidden}", problems=problems)
    except Exception as error:  # without a network, it is one of the HTTP library that huggingface_hub uses
        return replace(
            plan, state=f"would be created, {visibility}, unless it is there (the hub could not be asked: {reason_of(error)})"
        )
    names = [sibling.rfilename for sibling in info.siblings or []]
    old = [name for name in names if name not in plan.files and any(fnmatch(name, pattern) for pattern in REPLACED)]
    if asked.private and not info.private:
        problems.append(f"{asked.repository} is there and public: make it private in its settings, or leave out --private")
    state = f"is there, {'private' if info.private else 'public'}, with {len(names)} files"
    return replace(plan, state=state, commit=info.sha, old_files=tuple(old), problems=problems)


def metadata_problems(card: ModelCard) -> Iterator[str]:
    """Yield what the hub does not accept in the metadata of a model card."""
    try:
        card.validate()
    except ValueError as error:  # with the hub's answer as its text
        messages = "; ".join(each["message"] for each in json.loads(str(error))["errors"])
        yield f"the hub does not accept the metadata of the model card: {messages}"


def upload(plan: UploadPlan) -> tuple[str, bool]:
    """Send the files of a plan to the hub in one commit; files that are there already are not sent again.

    Returns:
        The address of the repository, and whether anything has changed there.

    Raises:
        ValueError: if the plan has problems, there is no login, the hub refuses something, or the upload was cut off.
    """
    name = plan.publication.repository
    if plan.problems:
        raise ValueError("; ".join(plan.problems))
    if not get_token():
        raise ValueError(f"publishing needs a login: {LOGIN}")
    operations = [CommitOperationAdd(path, content) for path, content in plan.files.items()]
    deletions = [CommitOperationDelete(path) for path in plan.old_files]
    with explained(name):
        if plan.commit is None:
            HfApi().create_repo(name, private=plan.publication.private, exist_ok=True)
        message = f"Publish {plan.publication.system} with longqlora"
        commit = HfApi().create_commit(name, [*operations, *deletions], commit_message=message)
    return f"{constants.ENDPOINT}/{name}", commit.oid != plan.commit


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Say what a refusal of the hub, or an upload that was cut off, means.

    Raises:
        ValueError: in the place of any error of the block.
    """
    again = "run the same command again: large files that have arrived are not sent again"
    try:
        yield
    except HfHubHTTPError as error:
        status, reason, owner = error.response.status_code, reason_of(error), repository.partition("/")[0]
        means = {
            401: f"the hub does not accept the token of this machine: {LOGIN}",
            403: f"the token of this machine may not write to {owner} ({reason}); it needs write access",
            409: f"{repository} has changed during the upload ({reason}); {again}",
            412: f"{repository} has changed during the upload ({reason}); {again}",
        }
        answer = f"the hub answers {status} ({reason})" + (f"; {again}" if status >= 500 else "")
        raise ValueError(f"{repository} was not published: {means.get(status, answer)}") from error
    except ValueError as error:  # metadata that the hub does not accept
        raise ValueError(f"{repository} was not published: {error}") from error
    except Exception as error:  # of the HTTP library, or of the one that transfers large files
        raise ValueError(f"{repository} was not published, the connection failed ({reason_of(error)}); {again}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error, or of the error that caused it: what the hub or the network says."""
    while error.__cause__ and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "it is switched off, by HF_HUB_OFFLINE"
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# --- the command -----------------------------------------------------------------------------------------------------------


def publish_command(options: argparse.Namespace) -> None:
    """Print the plan, and carry it out with ``--really``; a dry run that finds problems ends with status 1.

    Raises:
        ValueError: if there is nothing to publish, or it cannot be published.
    """
    asked = {"private": options.private, "license": options.license, "base": options.base}
    plan = plan_upload(Publication(options.results, options.system, options.repo, **asked))
    print(describe_plan(plan), flush=True)
    if options.really:
        address, changed = upload(plan)
        print(f"\nPublished: {address}" if changed else f"\nNothing has changed since the last upload: {address}")
        return
    print("\nNothing was sent." + ("" if plan.problems else " Add --really to publish."))
    if plan.problems:
        sys.exit(1)


def describe_plan(plan: UploadPlan) -> str:
    """A plan in words: the repository, the files with their sizes, the metadata of the model card, notes and problems."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in plan.files.items()}
    width, digits = max(map(len, sizes)), len(f"{sum(sizes.values()):,}")
    lines = [f"repository: {plan.publication.repository} {plan.state}", "", "files, in bytes:"]
    lines += [f"  {name:{width}}  {size:{digits},}" for name, size in sizes.items()]
    lines += [f"  {'total':{width}}  {sum(sizes.values()):{digits},}"]
    lines += [f"  {name} is deleted" for name in plan.old_files]
    data: Any = plan.card.data
    metadata = {key: value for key, value in data.to_dict().items() if key != "model-index"}
    lines += ["", "metadata of the model card:", *(f"  {key}: {shown(value)}" for key, value in metadata.items())]
    for found in data.eval_results or []:
        lines.append(f"  result: {found.metric_name}, {found.dataset_name}: {found.metric_value}")
    lines += [""] if plan.notes or plan.problems else []
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes), *(f"problem: {problem}" for problem in plan.problems)])


def shown(value: Any) -> str:
    """A value of the metadata in one line."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
