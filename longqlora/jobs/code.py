"""Digests of the code behind each rule, so that an edit reruns exactly the rules whose results it can change.

Snakemake compares a rule's own script by its date and ignores the modules that the script imports. Each rule therefore has one
param for each Python file that its script depends on, such as ``longqlora/data/packing.py 3f2a…``. The digest is that of the
file's syntax tree without comments and docstrings: a change of these or of the formatting reruns nothing, any other change
reruns the rule, and Snakemake's reason names the file.

This module uses the standard library only: Snakemake imports it at every start.
"""

import ast
import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from longqlora.jobs.digests import FileFacts

PACKAGE = "longqlora"
WITHOUT_EFFECT = ("longqlora/jobs/", "longqlora/config/", "longqlora/planning/", "longqlora/modeling/compatibility.py")
"""Code that changes no result, nor does what only this code imports. ``jobs`` logs, computes digests and starts processes;
``config`` defines and checks settings, whose values are params of the rules themselves; ``planning`` estimates memory and time;
``compatibility`` rejects a model before anything is computed."""
IGNORED_FIELDS = ("ctx", "kind", "type_comment", "type_ignores")
"""Fields of a syntax tree that follow from other fields, or hold comments and notation (the prefix of ``u"…"``)."""


FACT_NAME = f"code by {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
"""Key of the stored descriptions of Python files. It changes with this module, so that another version of it computes them
again."""


class Code:
    """The Python files of a project: the digest of each one and the modules that it imports.

    Args:
        root: folder that contains the package and the scripts.
        facts: stores digests and imports until a file's size or date changes.
    """

    def __init__(self, root: Path, facts: FileFacts):
        self.root, self.facts = root, facts

    def describe(self, name: str) -> dict:
        """Digest and imported modules of a file, given by its path relative to the root (see :func:`describe_code`)."""
        (description,) = self.facts.find(FACT_NAME, [self.root / name], describe_code)
        return description

    def files_behind(self, script: str) -> list[str]:
        """The script and the files of the package that it imports, directly or through other files, sorted and relative to
        the root. Files in :data:`WITHOUT_EFFECT` are left out, and what they import is not followed."""
        found, pending = {script}, [script]
        while pending:
            modules = self.describe(pending.pop())["imports"]
            files = {"/".join(module.split(".")) + ".py" for module in modules}
            new = {file for file in files - found if (self.root / file).is_file() and not file.startswith(WITHOUT_EFFECT)}
            found |= new
            pending += new
        return sorted(name for name in found if not name.startswith(WITHOUT_EFFECT))

    def params(self, script: str) -> list[str]:
        """The params of a rule that runs the script: ``path digest`` for each of :meth:`files_behind`."""
        return [f"{name} {self.describe(name)['digest']}" for name in self.files_behind(script)]


def describe_code(path: Path) -> dict:
    """Describe a Python file by its digest and its imports.

    Returns:
        ``digest``: the first 12 hexadecimal digits of the SHA-256 of its syntax tree without comments and docstrings, the same
        with every Python from 3.11 on. ``imports``: dotted names of the package's modules that it imports, sorted.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    text = "\0".join(canonical_form(tree))
    return {"digest": hashlib.sha256(text.encode()).hexdigest()[:12], "imports": sorted(imported_modules(tree))}


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names of the package's modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # "from longqlora.data import packing"
    return {name for name in names if name.split(".")[0] == PACKAGE}


def canonical_form(node: object) -> Iterator[str]:
    """Yield a syntax tree as text that is the same with every version of Python, unlike that of ``ast.dump``. Empty fields are
    left out, because newer versions have more of them."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name in IGNORED_FIELDS or value is None or value == []:
                continue
            yield f".{name}"
            if isinstance(node, ast.JoinedStr):
                value = joined_constants(value)
            yield from canonical_form(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            if not is_bare_string(item):
                yield from canonical_form(item)
        yield "]"
    else:
        yield f"{type(node).__name__} {node!a}"  # ASCII: versions of Python differ in the characters that repr escapes


def is_bare_string(node: object) -> bool:
    """Whether a statement is nothing but a string: the docstring of a module, class, function or constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def joined_constants(parts: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, with adjacent constants joined and empty ones left out: versions of Python split the constant
    text of an f-string differently."""
    joined: list[ast.expr] = []
    for is_constant, group in groupby(parts, lambda part: isinstance(part, ast.Constant)):
        if not is_constant:
            joined += group
        elif text := "".join(map(ast.literal_eval, group)):
            joined.append(ast.Constant(text))
    return joined
