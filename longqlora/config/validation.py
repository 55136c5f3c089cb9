"""Checks a configuration as parsed from YAML against the settings (:mod:`longqlora.config.settings`), all mistakes at once."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from pydantic import ValidationError

from longqlora.config.messages import describe, dotted, guess_key, name_of_type, no_value, place_of
from longqlora.config.settings import Configuration

MAX_PROBLEMS = 20  # shown at once
MAX_DEPTH = 20  # of sections in each other; Configuration has six


class ConfigError(ValueError):
    """A configuration that cannot run; each line names a key and says what would be right."""

    def __init__(self, problems: Iterable[str]):
        lines = list(dict.fromkeys(problems))
        more = [f"… and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
        super().__init__("\n".join(lines[:MAX_PROBLEMS] + more))


def validate(config: object) -> tuple[Configuration | None, list[str], list[str]]:
    """Check a configuration.

    Args:
        config: as parsed from YAML.

    Returns:
        The configuration with the wrong keys removed, so that it can be checked further (None if a required key is then
        missing); the mistakes, a line each; and the keys that were removed or misspelled.
    """
    if not isinstance(config, dict):
        return None, [f"the configuration: expected keys with values, found {name_of_type(config)}"], []
    rest = copy.deepcopy(config)
    empty = list(empty_keys(rest))
    problems = [no_value(place) for place in empty]
    removed = [remove(rest, place) for place in empty]
    try:
        return Configuration.model_validate(rest), problems, removed
    except ValidationError as error:
        details = error.errors()
    meant = [guess for item in details if item["type"] == "extra_forbidden" if (guess := guess_key(place_of(item)))]
    known = {*meant, *(item for place in empty for item in (place, place[:-1]))}
    problems += describe(item for item in details if item["type"] != "missing" or place_of(item) not in known)
    removed += [remove(rest, place_of(item)) for item in details if item["type"] != "missing"]
    removed += map(dotted, meant)
    try:
        return Configuration.model_validate(rest), problems, removed
    except ValidationError:  # a required key is missing
        return None, problems, removed


def duplicate_keys(path: str) -> Iterator[str]:
    """Yield which keys a YAML file has more than once in the same section: YAML silently keeps the last one."""
    seen = set()  # nodes that an alias repeats

    def walk(node: yaml.Node | None, place: tuple) -> Iterator[str]:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                yield from walk(item, (*place, number))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and name != "<<":
                    yield f"{dotted((*place, name))}: occurs twice in {path} (lines {lines[name]} and {line})"
                lines[name] = line
                yield from walk(value, (*place, name))

    with open(path, encoding="utf-8") as file:
        yield from walk(yaml.compose(file, Loader=yaml.SafeLoader), ())


def follows_from(line: str, removed: str) -> bool:
    """Whether a mistake may follow from a key that was removed because of another one, and so be none.

    Args:
        line: about the mistake; it begins with its key.
        removed: the removed key.
    """
    key = line.split(": ")[0]
    first, last = removed.split(".")[0], removed.split(".")[-1]
    related = f"{key}.".startswith((f"{removed}.", f"{removed}[")) or f"{removed}.".startswith((f"{key}.", f"{key}["))
    of_training = first == "training" and key.startswith("systems.") and ".training" in key
    return related or of_training or f"{last!r}" in line


def empty_keys(part: object, place: tuple = ()) -> Iterator[tuple]:
    """Yield the places of keys without a value, which YAML reads as null."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else []
    for key, value in items:
        if value is None:
            yield (*place, key)
        elif len(place) < MAX_DEPTH:  # an alias may be inside of its own anchor
            yield from empty_keys(value, (*place, key))


def remove(config: dict, place: tuple) -> str:
    """Remove a key from a configuration, in place; for an item of a list, remove the list. Return the removed key."""
    section: Any = config
    parents = []
    for key in place:
        parents.append(section)
        try:
            section = section[key]
        except (KeyError, IndexError, TypeError):  # already removed
            break
    while len(parents) > 1 and isinstance(parents[-1], list):
        parents.pop()
    if isinstance(parents[-1], dict):
        parents[-1].pop(place[len(parents) - 1], None)
    return dotted(place[: len(parents)])
