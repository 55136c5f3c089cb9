import ast
import json

from make_texts import (
    MAX_EVALUATION_CHARACTERS,
    Module,
    is_held_out,
    long_questions,
    natural_questions,
    programming_tasks,
    summaries,
    write_corpus,
    write_json_lines,
)

from longqlora.data.instruction_schemas import SCHEMAS

SOURCE = '''"""About shapes."""


def area(radius):
    """Return the area of a circle of the given radius."""
    square = radius * radius
    return 3.14159 * square


class Circle:
    """A circle."""

    def scaled(self, factor):
        """Return a larger circle with the same center."""
        return Circle(self.radius * factor)
'''
MODULE = Module("shapes.py", SOURCE.splitlines(), ast.parse(SOURCE))


def read_json_lines(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_documentation_is_every_docstring_below_its_name():
    assert MODULE.documentation().split("\n\n")[:3] == [
        "About shapes.",
        "area",
        "Return the area of a circle of the given radius.",
    ]


def test_records_are_of_the_schemas_that_they_imitate():
    generators = {
        "natural_questions": natural_questions,
        "alpaca": programming_tasks,
        "booksum": summaries,
        "long_alpaca": long_questions,
    }
    for schema, generate in generators.items():
        records = list(generate(MODULE))
        assert records, schema
        for record in records:
            conversation = SCHEMAS[schema](record)
            assert (conversation.document is None) == (schema == "alpaca")
    (question,) = long_questions(MODULE)
    assert question["output"] == "scaled"


def test_one_name_in_ten_is_held_out():
    assert 60 < sum(is_held_out(f"module{number}.py") for number in range(1000)) < 140  # expected 100, standard deviation 9.5


def test_equal_records_are_equal_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_json_lines(str(tmp_path / name), [{"text": "é"}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_no_document_is_in_both_the_corpus_and_an_evaluation_set(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(60):
        (library / f"module{number}.py").write_text(SOURCE)
    (library / "template.py").write_text("class {name}:")  # not Python
    monkeypatch.setattr("make_texts.sysconfig.get_path", lambda name: str(library))
    shards = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    sets = {kind: str(tmp_path / f"{kind}.jsonl") for kind in ("code", "prose")}
    counts = write_corpus(shards, sets, evaluation_characters=800, seed=1)
    training = [record for shard in shards for record in read_json_lines(shard)]
    assert counts["corpus"] == {"documents": len(training), "characters": sum(len(record["text"]) for record in training)}
    names = {record["meta"]["name"] for record in training}
    for kind, path in sets.items():
        held_out = read_json_lines(path)
        assert sum(len(record["text"]) for record in held_out) == counts[kind]["characters"] >= 800
        assert max(len(record["text"]) for record in held_out) <= MAX_EVALUATION_CHARACTERS
        assert {record["meta"]["source"] for record in held_out} == {kind}
        assert not names & {record["meta"]["name"] for record in held_out}
