"""The code that a stage's result depends on, file by file, each with a digest of what it says.

Snakemake knows only the date of a stage's own script and nothing of what the script imports. A rule therefore has one param
for each file behind its script, ``longqlora/data/packing.py 3f2a…``: an edit that changes what a file says reruns the rule, and
Snakemake's reason names the file, while a comment, a docstring or another format reruns nothing.

Standard library only: the workflow imports it on every start, and a job may run on another Python than the workflow.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from longqlora.jobs.digests import FileFacts

PACKAGE = "longqlora"
WITHOUT_EFFECT = ("longqlora/jobs/", "longqlora/config/settings.py", "longqlora/modeling/compatibility.py")
"""Files that change no result: log, digests and processes of a job; the types of settings, whose values are params themselves;
checks that refuse a model before anything is computed."""
IGNORED_FIELDS = ("ctx", "kind", "type_comment", "type_ignores")
"""Fields of a syntax tree that follow from others, or hold comments and ways of writing (``u"…"``)."""


FACT = f"code by {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
"""What facts about a Python file are kept under: another version of this module finds them anew."""


class Code:
    """The Python files of a project: what each says and which others it imports.

    Args:
        root: folder that holds the package and the scripts.
        facts: where digests and imports are kept by size and date of the files.
    """

    def __init__(self, root: Path, facts: FileFacts):
        self.root, self.facts = root, facts

    def describe(self, name: str) -> dict:
        """Digest and imported modules of a file, whose path is relative to the root."""
        (description,) = self.facts.find(FACT, [self.root / name], describe_code)
        return description

    def files_behind(self, script: str) -> list[str]:
        """A script and the files of the package that its result depends on, directly or through others, sorted, without those
        of :data:`WITHOUT_EFFECT`; paths are relative to the root."""
        found, pending = {script}, [script]
        while pending:
            modules = self.describe(pending.pop())["imports"]
            files = {"/".join(module.split(".")) + ".py" for module in modules}
            new = {file for file in files - found if (self.root / file).is_file()}
            found |= new
            pending += new
        return sorted(name for name in found if not name.startswith(WITHOUT_EFFECT))

    def params(self, script: str) -> list[str]:
        """What a rule names as params: ``path digest`` of each file that its script's result depends on."""
        return [f"{name} {self.describe(name)['digest']}" for name in self.files_behind(script)]


def describe_code(path: Path) -> dict:
    """What a Python file says, as a digest that is the same on every Python from 3.11 on (first 12 hexadecimal digits of a
    SHA-256), and the modules of the package that it imports (``import longqlora.x``, ``from longqlora.x import y``)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    said = "\0".join(canonical_form(tree))
    return {"digest": hashlib.sha256(said.encode()).hexdigest()[:12], "imports": sorted(imported_modules(tree))}


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names of the package's modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # "from longqlora import tokens"
    return {name for name in names if name.split(".")[0] == PACKAGE}


def canonical_form(node: object) -> Iterator[str]:
    """Yield a syntax tree in a form that does not depend on the version of Python, as ``ast.dump`` does: fields that are empty
    are left out, since newer versions have more of them."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name in IGNORED_FIELDS or value is None or value == []:
                continue
            yield f".{name}"
            if isinstance(node, ast.JoinedStr):  # versions cut the constant parts of an f-string differently
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
        yield f"{type(node).__name__} {node!a}"  # what repr leaves unescaped differs between versions


def is_bare_string(node: object) -> bool:
    """Whether a statement is a string alone: a docstring, of a module, class, function or constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def joined_constants(parts: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, constant ones that follow each other joined and empty ones left out."""
    joined: list[ast.expr] = []
    for part in parts:
        if not isinstance(part, ast.Constant):
            joined.append(part)
        elif joined and isinstance(joined[-1], ast.Constant):
            joined[-1] = ast.Constant(joined[-1].value + part.value)
        elif part.value:
            joined.append(part)
    return joined
