"""Make the demo's texts from the standard library of the Python that runs this.

    python demo/make_texts.py demo/texts

There are two kinds of text, in RedPajama's record format (``text`` and ``meta.source``):

* ``code``: the source code of every top-level function and class, one document each;
* ``prose``: the documentation of every module (its docstrings, in order), and the topics of ``help()``.

Whole modules are held out for evaluation, chosen by a hash of their names, so that no module is in both the corpus and an
evaluation set. A held-out module is one document of code, because evaluation needs texts that are longer than any window.
"""

import ast
import hashlib
import json
import lzma
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MAX_INSTRUCTIONS = 1200  # of each kind
SHARDS = 2  # files of the corpus, which are read at the same time
EVALUATION_CHARACTERS = 40_000  # of each evaluation set
MAX_EVALUATION_CHARACTERS = 8_000  # of one held-out text, so that an evaluation set has several texts, not one long module


@dataclass(frozen=True)
class Module:
    """One module of the standard library: its path inside the library, its lines and its syntax tree."""

    name: str
    lines: list[str]
    tree: ast.Module

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)

    def source(self, first: ast.stmt, last: ast.stmt) -> str:
        """Source code from one node to another, with the decorators of the first."""
        start = min(node.lineno for node in [first, *getattr(first, "decorator_list", [])])
        return "\n".join(self.lines[start - 1 : last.end_lineno])

    def documentation(self) -> str:
        """All docstrings in the order of the source code, each below the name of what it documents."""
        sections = []
        nodes: list[ast.Module | Definition] = [self.tree, *self.definitions()]
        for node in nodes:
            docstring = ast.get_docstring(node)
            if docstring:
                sections.append((getattr(node, "lineno", 0), getattr(node, "name", ""), docstring))
        return "\n\n".join(f"{name}\n\n{text}" if name else text for _, name, text in sorted(sections))

    def definitions(self) -> Iterator[Definition]:
        """Yield every function and class, with methods and nested ones."""
        return (node for node in ast.walk(self.tree) if isinstance(node, DEFINITIONS))


def is_held_out(name: str, one_in: int = 10) -> bool:
    """Whether the module or topic ``name`` is held out for evaluation: by its hash, one name in ``one_in`` is."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0


def library_modules() -> Iterator[Module]:
    """Yield the pure-Python modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts):
            try:
                source = path.read_text(encoding="utf-8")
                yield Module(inside.as_posix(), source.splitlines(), ast.parse(source))
            except (SyntaxError, UnicodeDecodeError):  # some distributions ship templates and Python 2 files
                continue


def documents() -> Iterator[tuple[str, bool, dict]]:
    """Yield (kind, is held out, record) of every document of the demo; kind is ``code`` or ``prose``."""

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


def write_corpus(folder: Path, seed: int = 1) -> None:
    """Write the corpus, shuffled and in :data:`SHARDS` files, and one evaluation set per kind of text.

    Some modules and help topics have paragraphs in common. A held-out text is not used if the corpus has one of its paragraphs.
    """
    training: list[dict] = []
    held_out: dict[str, list[dict]] = {"code": [], "prose": []}
    for kind, is_evaluation, record in documents():
        (held_out[kind] if is_evaluation else training).append(record)
    random.Random(seed).shuffle(training)
    for number in range(SHARDS):
        write_records(folder / f"corpus-{number}.jsonl.xz", training[number::SHARDS])
    known = {paragraph for record in training for paragraph in long_paragraphs(record)}
    for kind, records in held_out.items():
        random.Random(seed).shuffle(records)
        kept: list[dict] = []
        while records and characters_of(kept) < EVALUATION_CHARACTERS:
            record = records.pop()
            if known.isdisjoint(long_paragraphs(record)):
                kept.append(record | {"text": record["text"][:MAX_EVALUATION_CHARACTERS]})
        write_records(folder / f"{kind}.jsonl.xz", kept)


def long_paragraphs(record: dict) -> list[str]:
    """The paragraphs of a text that have more than 100 characters."""
    return [paragraph for paragraph in record["text"].split("\n\n") if len(paragraph) > 100]


def characters_of(records: list[dict]) -> int:
    """Number of characters of the texts of records."""
    return sum(len(record["text"]) for record in records)


def write_records(path: Path, records: list[dict]) -> None:
    """Write one JSON object per line, compressed, and print the number of records."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path}: {len(records)} records, {len(lines)} characters, {path.stat().st_size} bytes")


def natural_questions(module: Module) -> Iterator[dict]:
    """Questions about a passage that a sentence of it answers (like Natural Questions: document, question, answers)."""
    text = module.documentation()
    for match in re.finditer(r"^(\w+)\n\n([A-Z][^\n]{20,120}\.)$", text, re.MULTILINE):
        yield {
            "document": text[max(0, match.start() - 250) : match.end() + 150],
            "question": f"what does {match[1]} in {module.name} do",
            "short_answers": [match[2]],
            "long_answer": match[0],
        }


def programming_tasks(module: Module) -> Iterator[dict]:
    """Programming tasks with their solutions (like Evol-Instruct: instruction, output)."""
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            task = f"Write the Python function {node.name} of {module.name}. {docstring.splitlines()[0]}"
            yield {"instruction": task, "output": module.source(node, node)}


def summaries(module: Module) -> Iterator[dict]:
    """Chapters with their summaries (like BookSum: chapter, summary_text).

    The chapter is the body of a function or class; the summary is the first line of its docstring.
    """
    for node in module.definitions():
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1:
            yield {"chapter": module.source(node.body[1], node), "summary_text": docstring.splitlines()[0]}


def long_questions(module: Module) -> Iterator[dict]:
    """Questions about a text that is part of the instruction (like LongAlpaca: instruction, output)."""
    for node in module.tree.body:
        methods = [part.name for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)]
        if methods and isinstance(node, ast.ClassDef):
            text = module.source(node, node)
            before = f"Below is a class of {module.name}. Read it and answer my question after it.\nThe class begins.\n"
            question = f"{before}{text}\nNow the class ends. Which methods does {node.name} define?"
            yield {"instruction": question, "output": ", ".join(methods)}


def write_instructions(folder: Path, seed: int = 1) -> None:
    """Write one file per kind of instruction record, sampled from those of the modules that are not held out."""
    modules = [module for module in library_modules() if not module.held_out]
    for generate in (natural_questions, programming_tasks, summaries, long_questions):
        records = [record for module in modules for record in generate(module)]
        sample = random.Random(seed).sample(records, min(len(records), MAX_INSTRUCTIONS))
        write_records(folder / "instructions" / f"{generate.__name__}.jsonl.xz", sample)


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
    write_instructions(Path(sys.argv[1]))
