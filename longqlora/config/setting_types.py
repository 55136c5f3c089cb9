"""The types of the settings, found by the keys that lead to them."""

import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from longqlora.config.settings import Configuration


def without_none(kind: Any) -> list:
    """The alternatives of a type, None left out."""
    if get_origin(kind) in (Union, types.UnionType):
        return [part for part in get_args(kind) if part is not type(None)]
    return [kind]


def has_alternatives(kind: Any) -> bool:
    """Whether pydantic names the alternative in the place of a mistake."""
    return len(without_none(bare(kind))) > 1


def bare(kind: Any) -> Any:
    """A type without the constraints of ``Annotated``."""
    while hasattr(kind, "__metadata__"):
        kind = get_args(kind)[0]
    return kind


def fields_of(kind: Any) -> dict:
    """Fields of a section by the names that they have in YAML; none for another type."""
    parts = [bare(part) for part in without_none(bare(kind))]
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return {field.alias or name: field for model in models for name, field in model.model_fields.items()}


def kind_of(kind: Any, key: object) -> Any:
    """The type of what lies under a key; None where it is unknown."""
    fields = fields_of(kind)
    if fields:
        return fields[key].annotation if key in fields else None
    for part in without_none(bare(kind)):
        arguments = get_args(bare(part))
        if get_origin(bare(part)) in (list, dict) and arguments:
            return arguments[-1]
    return None


def type_at(place: Iterable) -> Any:
    """The type of the value at a place; None where no key is known."""
    kind: Any = Configuration
    for key in place:
        kind = kind_of(kind, key)
    return kind


def description_of(place: tuple) -> str | None:
    """The description of the key at a place, or of the section that it lies in."""
    kind: Any = Configuration
    found = None
    for key in place:
        field = fields_of(kind).get(key)
        found = field.description if field is not None else found
        kind = kind_of(kind, key)
    return found.rstrip(".") if found else None
