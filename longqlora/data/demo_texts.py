"""Text for the demo from the one library that is on every machine: the Python standard library.

Two kinds of text, in RedPajama's record format (``text`` and ``meta.source``):

* ``code``: the source of every top-level function and class, one document each;
* ``prose``: the documentation of a module (its docstrings in order), and the topics of ``help()``.

A module is held out of the corpus as a whole, chosen by a hash of its name, so that no evaluation document has a sibling
among the training documents. Held-out code is a whole source file: evaluation needs texts longer than any window.
"""

import ast
import gzip
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
MAX_EVALUATION_CHARACTERS = 20_000  # of one held-out text, so that an evaluation set is several texts, not one long module


@dataclass(frozen=True)
class Module:
    """One module of the standard library: its file name inside the library, its lines and its syntax tree."""

    name: str
    lines: list[str]
    tree: ast.Module

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)

    def source(self, first: ast.AST, last: ast.AST) -> str:
        """The lines from one node to another, decorators included."""
        start = min(node.lineno for node in [first, *getattr(first, "decorator_list", [])])
        return "\n".join(self.lines[start - 1 : last.end_lineno])

    def documentation(self) -> str:
        """All docstrings in the order of the source, each under the name that it documents."""
        sections = []
        for node in [self.tree, *self.definitions()]:
            docstring = ast.get_docstring(node)
            if docstring:
                sections.append((getattr(node, "lineno", 0), getattr(node, "name", ""), docstring))
        return "\n\n".join(f"{name}\n\n{text}" if name else text for _, name, text in sorted(sections))

    def definitions(self) -> Iterator[ast.AST]:
        """Every function and class, methods and nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, DEFINITIONS))


def is_held_out(name: str, one_in: int = 10) -> bool:
    """Whether the module or topic ``name`` belongs to the evaluation texts: one name in ``one_in``, by its hash."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0


def library_modules() -> Iterator[Module]:
    """Yield each pure-Python module of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts):
            try:
                source = path.read_text(encoding="utf-8")
                yield Module(inside.as_posix(), source.splitlines(), ast.parse(source))
            except (SyntaxError, UnicodeDecodeError):  # templates and Python 2 files that some distributions ship
                continue


def documents() -> Iterator[tuple[str, bool, dict]]:
    """Yield (kind, held out, record) for every document of the demo; kind is ``code`` or ``prose``."""

    def document(kind: str, name: str, text: str) -> tuple[str, bool, dict]:
        return kind, is_held_out(name), {"text": text, "meta": {"source": kind, "name": name}}

    for module in library_modules():
        prose = module.documentation()
        if prose:
            yield document("prose", module.name, prose)
        top_level = [node for node in module.tree.body if isinstance(node, DEFINITIONS)]
        if module.held_out and top_level:
            yield document("code", module.name, "\n".join(module.lines))
        elif not module.held_out:
            for node in top_level:
                yield document("code", module.name, module.source(node, node))
    for name, text in sorted(topics.items()):
        yield document("prose", name, text)


def write_corpus(shards: list[str], evaluation_sets: dict[str, str], evaluation_characters: int, seed: int) -> dict:
    """Write the training shards (gzipped JSON lines, shuffled) and one evaluation file per kind of text.

    Args:
        shards: paths of the shards; documents are dealt out to them in turn.
        evaluation_sets: path by kind, ``code`` and ``prose``.
        evaluation_characters: how much held-out text to keep per kind: the first documents of a seeded order that reach it.
        seed: of the order of the documents.

    Returns:
        Number of documents and characters, for the corpus and for each evaluation set.
    """
    training, held_out = [], {kind: [] for kind in evaluation_sets}
    for kind, is_evaluation, record in documents():
        (held_out[kind] if is_evaluation else training).append(record)
    random.Random(seed).shuffle(training)
    for number, shard in enumerate(shards):
        write_json_lines(shard, training[number :: len(shards)])
    counts = {"corpus": size_of(training)}
    for kind, records in held_out.items():
        random.Random(seed).shuffle(records)
        kept = []
        while records and size_of(kept)["characters"] < evaluation_characters:
            record = records.pop()
            kept.append(record | {"text": record["text"][:MAX_EVALUATION_CHARACTERS]})
        write_json_lines(evaluation_sets[kind], kept)
        counts[kind] = size_of(kept)
    return counts


def size_of(records: list[dict]) -> dict[str, int]:
    """Number of documents and of characters of a list of records."""
    return {"documents": len(records), "characters": sum(len(record["text"]) for record in records)}


def write_json_lines(path: str, records: list[dict]) -> None:
    """Write one JSON object a line, gzipped where the name ends in ``.gz``; the same records give the same bytes."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)


def natural_questions(module: Module) -> Iterator[dict]:
    """Questions on a passage, its answer a sentence of it (Natural Questions: document, question, answers)."""
    text = module.documentation()
    for match in re.finditer(r"^(\w+)\n\n([A-Z][^\n]{20,120}\.)$", text, re.MULTILINE):
        yield {
            "document": text[max(0, match.start() - 250) : match.end() + 150],
            "question": f"what does {match[1]} in {module.name} do",
            "short_answers": [match[2]],
            "long_answer": match[0],
        }


def programming_tasks(module: Module) -> Iterator[dict]:
    """Tasks with their solution (Evol-Instruct: instruction, output)."""
    for node in module.tree.body:
        docstring = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        if docstring:
            task = f"Write the Python function {node.name} of {module.name}. {docstring.splitlines()[0]}"
            yield {"instruction": task, "output": module.source(node, node)}


def summaries(module: Module) -> Iterator[dict]:
    """Chapters with their summary (BookSum: chapter, summary_text): the summary of a function's body is the first line of
    its docstring."""
    for node in module.definitions():
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1:
            yield {"chapter": module.source(node.body[1], node), "summary_text": docstring.splitlines()[0]}


def long_questions(module: Module) -> Iterator[dict]:
    """Questions whose instruction holds the text that they are about (LongAlpaca: instruction, output)."""
    for node in module.tree.body:
        methods = [part.name for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)]
        if methods and isinstance(node, ast.ClassDef):
            text = module.source(node, node)
            before = f"Below is a class of {module.name}. Read it and answer my question after it.\nThe class begins.\n"
            question = f"{before}{text}\nNow the class ends. Which methods does {node.name} define?"
            yield {"instruction": question, "output": ", ".join(methods)}


def write_instructions(paths: dict[str, str]) -> dict[str, int]:
    """Write one JSON-lines file of instruction records per schema, made from the modules that are not held out.

    Args:
        paths: file by schema: ``natural_questions``, ``evol_instruct``, ``booksum``, ``long_alpaca``.

    Returns:
        Number of records by schema.
    """
    generators = {
        "natural_questions": natural_questions,
        "evol_instruct": programming_tasks,
        "booksum": summaries,
        "long_alpaca": long_questions,
    }
    records = {schema: [] for schema in paths}
    for module in library_modules():
        if not module.held_out:
            for schema in paths:
                records[schema].extend(generators[schema](module))
    for schema, path in paths.items():
        write_json_lines(path, records[schema])
    return {schema: len(found) for schema, found in records.items()}
