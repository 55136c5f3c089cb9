"""What to say about a mistake in a configuration: the key, the value, what would be legal, and a guess for a misspelled key."""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import ErrorDetails

from longqlora.config.setting_types import description_of, fields_of, has_alternatives, kind_of, type_at
from longqlora.config.settings import NAME_PATTERN, Configuration

FORMER_KEYS = {
    "context_length": ("target_context", "it is called target_context now"),
    "demo": ("pretraining", "the demo's model and texts are in the folder demo/; the section pretraining trains a model"),
    "checkpoints_kept": ("checkpoint_steps", "it is gone; the last two checkpoints are kept"),
    "activation_checkpointing": (
        "memory",
        "the key is memory now: leave it out in place of true, and write memory: speed in place of false",
    ),
    "offload_activations": ("memory", "the key is memory now: write memory: smallest in place of true"),
    "revision": ("tokenizer", "a revision follows the hub id, after an @ (owner/name@revision)"),
}
"""Keys of earlier versions and of transformers: a key of the section that they were in, and what is right now."""
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}
BOUNDS = {
    "greater_than_equal": "below the minimum of {ge:g}",
    "greater_than": "not above {gt:g}",
    "less_than_equal": "above the maximum of {le:g}",
    "less_than": "not below {lt:g}",
}
NAME_RULE = "a name has lower-case letters, digits, '.', '_' and '-', and begins with a letter or digit"
TASK_NAME_RULE = "a name has letters, digits, '.', '_', '+' and '-', and begins with a letter or digit"


def dotted(place: Iterable) -> str:
    """A key with the sections that it lies in: ``sft.sources[1].share`` of ``("sft", "sources", 1, "share")``."""
    text = ""
    for key in place:
        if isinstance(key, int) and not isinstance(key, bool):
            text += f"[{key}]"
        else:
            text += f".{key}" if isinstance(key, str) and key.isprintable() else f".{key!r}"
    return text.lstrip(".") or "the configuration"


def place_of(details: ErrorDetails) -> tuple:
    """Keys that lead to a mistake, without pydantic's marks for the alternatives of a union."""
    place = details["loc"]
    kind: Any = Configuration
    kept: list = []
    for key in place:
        if key == "[key]":
            break
        if kind is not None and has_alternatives(kind) and isinstance(key, str) and key not in fields_of(kind):
            continue
        kept.append(key)
        kind = kind_of(kind, key)
    return tuple(kept)


def describe(details: Iterable[ErrorDetails]) -> Iterator[str]:
    """Yield a line for each mistake."""
    seen = set()
    for item in details:
        place = place_of(item)
        if item["type"] == "extra_forbidden":
            yield unknown_key(place)
        elif place not in seen:
            seen.add(place)
            key = place[:-1] if item["loc"][-1] == "[key]" else place
            yield f"{dotted(key)}: {complaint(item, place)}"


def no_value(place: tuple) -> str:
    """What to say about a key without a value."""
    name = str(place[-1])
    if ":" in name:
        return f"{dotted(place)}: has no value; a space is missing after the colon in {name!r}"
    fields = fields_of(type_at(place)).values()
    has_defaults = fields and not any(field.is_required() for field in fields)
    advice = "write {} for the defaults" if has_defaults else "write one"
    return f"{dotted(place)}: has no value; {advice}, or leave the key out"


def guess_key(place: tuple) -> tuple | None:
    """The existing key that an unknown one probably is."""
    *section, key = place
    guesses = difflib.get_close_matches(str(key), sorted(fields_of(type_at(section))), n=1)
    return (*section, guesses[0]) if guesses else None


def unknown_key(place: tuple) -> str:
    """What to say about a key that does not exist."""
    *section, key = place
    fields = fields_of(type_at(section))
    inside = [name for name, field in fields.items() if key in fields_of(field.annotation)]
    neighbor, fate = FORMER_KEYS.get(str(key), ("", ""))
    if neighbor in fields:
        hint = f": {fate}"
    elif inside:
        hint = f"; it is a key of {inside[0]}: write {dotted([*section, inside[0], key])}"
    else:
        guess = guess_key(place)
        hint = f"; did you mean {guess[-1]!r}?" if guess else ""
    return f"{dotted(section)}: unknown key {key!r}{hint} (legal: {', '.join(sorted(fields))})"


def complaint(details: ErrorDetails, place: tuple) -> str:
    """What is wrong with a value, and what would be right."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    described = description_of(place)
    hint = f" ({described})" if described else ""
    if details["loc"][-1] == "[key]" and kind.startswith("int"):
        return f"{value!r} is not a whole number{hint}"
    if details["loc"][-1] == "[key]":
        return f"{value!r} is not a legal name: {explain_key(value)}"
    if kind == "invalid_key":
        return f"YAML reads this key as {name_of_type(place[-1])}; keys are text"
    if kind == "missing":
        return f"missing{hint}"
    if kind == "literal_error" and place[-1] != "target_modules":
        return f"{value!r} is not one of {context['expected'].replace(' or ', ', ')}"
    if kind in BOUNDS:
        return f"{value!r} is {BOUNDS[kind].format(**context)}{hint}"
    if kind == "too_short":
        return f"must not be empty{hint}"
    if kind == "string_too_short":
        return f"must not be empty text{hint}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{value!r} is not a legal name: {NAME_RULE if context['pattern'] == NAME_PATTERN else TASK_NAME_RULE}"
    if kind in EXPECTED and place[-1] != "target_modules":
        return f"{shorten(value)} is {name_of_type(value)}, expected {EXPECTED[kind]}{advice(kind, value, place)}{hint}"
    return f"{shorten(value)} is not legal{hint}"


def explain_key(value: object) -> str:
    """Why a key of a mapping is not text, or not a name."""
    if isinstance(value, bool):
        return "YAML reads yes, no, on and off as true and false; put the name into quotes"
    if not isinstance(value, str):
        return f"YAML reads it as {name_of_type(value)}; put the name into quotes"
    return NAME_RULE


def advice(kind: str, value: object, place: tuple) -> str:
    """How to write a value that YAML reads as another type."""
    text = str(value).strip()
    if kind == "float_type" and isinstance(value, str) and is_number(text):
        return f"; write it without quotes: {text}" if "." in text else f"; YAML reads {text} as text: write {float(text)}"
    if kind.startswith("int") and isinstance(value, float) and value.is_integer():
        return f": write {value:.0f}"
    if kind.startswith("int") and isinstance(value, str) and text.isdecimal():
        return "; write it without quotes"
    if kind == "string_type" and isinstance(value, bool):
        return "; YAML reads yes, no, on and off as true and false: put it into quotes"
    if kind == "string_type" and not isinstance(value, list | dict):
        return "; put it into quotes"
    if kind == "list_type" and not isinstance(value, dict):
        return f"; write [{value}]"
    required = [name for name, field in fields_of(type_at(place)).items() if field.is_required()]
    if kind.startswith("model") and isinstance(value, str) and len(required) == 1:
        return f"; write {place[-1]}: {{{required[0]}: {value}}}"
    return ""


def is_number(text: str) -> bool:
    """Whether a text is a number in Python's notation."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def name_of_type(value: object) -> str:
    """What a value of YAML is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


def shorten(value: object) -> str:
    """A value as Python writes it, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
