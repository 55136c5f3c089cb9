"""What the demo runs on: the script that makes its texts, the shipped texts, and the shipped model."""

import ast
import hashlib
import importlib.util
import json
import lzma
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longqlora.config.experiment import load_experiment
from longqlora.data.instruction_schemas import SCHEMAS, read_conversations
from longqlora.data.readers import read_documents

DEMO = Path(__file__).resolve().parent.parent / "demo"
TEXTS = DEMO / "texts"
MADE_BY = "3.11.7"  # the Python whose standard library the texts are


def load_script(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_texts = load_script(DEMO / "make_texts.py")

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
MODULE = make_texts.Module("shapes.py", SOURCE.splitlines(), ast.parse(SOURCE))


def read_lines(path: Path) -> list[dict]:
    """The records of a file."""
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


# --- the script ------------------------------------------------------------------------------------------------------------


def test_documentation_is_every_docstring_below_its_name():
    assert MODULE.documentation().split("\n\n")[:3] == [
        "About shapes.",
        "area",
        "Return the area of a circle of the given radius.",
    ]


def test_records_are_of_the_schemas_that_they_imitate():
    generators = {
        "natural_questions": make_texts.natural_questions,
        "alpaca": make_texts.programming_tasks,
        "booksum": make_texts.summaries,
        "long_alpaca": make_texts.long_questions,
    }
    for schema, generate in generators.items():
        records = list(generate(MODULE))
        assert records, schema
        for record in records:
            conversation = SCHEMAS[schema](record)
            assert (not conversation.documents) == (schema == "alpaca")
    (question,) = make_texts.long_questions(MODULE)
    assert question["output"] == "scaled"


def test_one_name_in_ten_is_held_out():
    held_out = sum(make_texts.is_held_out(f"module{number}.py") for number in range(1000))
    assert 60 < held_out < 140  # expected 100, standard deviation 9.5


def test_equal_records_are_equal_bytes_that_the_readers_read(tmp_path):
    for name in ("a.jsonl.xz", "b.jsonl.xz"):
        make_texts.write_records(tmp_path / name, [{"text": "é"}])
    assert (tmp_path / "a.jsonl.xz").read_bytes() == (tmp_path / "b.jsonl.xz").read_bytes()
    assert [document.text for document in read_documents(str(tmp_path / "a.jsonl.xz"))] == ["é"]


def test_no_document_is_in_both_the_corpus_and_an_evaluation_set(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    names = [f"module{number}.py" for number in range(60)]
    for number, name in enumerate(names):
        (library / name).write_text(SOURCE.replace("radius", f"radius{number}"))
    (library / "template.py").write_text("class {name}:")  # not Python
    first, *_, last = [name for name in names if make_texts.is_held_out(name)]
    in_corpus = next(name for name in names if not make_texts.is_held_out(name))
    (library / last).write_text((library / in_corpus).read_text())
    monkeypatch.setattr(make_texts.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(make_texts, "EVALUATION_CHARACTERS", 800)
    make_texts.write_corpus(tmp_path)
    training = [record for number in range(2) for record in read_lines(tmp_path / f"corpus-{number}.jsonl.xz")]
    trained_on = {record["meta"]["name"] for record in training}
    assert in_corpus in trained_on
    assert first in {record["meta"]["name"] for record in read_lines(tmp_path / "code.jsonl.xz")}
    for kind in ("code", "prose"):
        held_out = read_lines(tmp_path / f"{kind}.jsonl.xz")
        assert sum(len(record["text"]) for record in held_out) >= 800
        assert max(len(record["text"]) for record in held_out) <= make_texts.MAX_EVALUATION_CHARACTERS
        assert {record["meta"]["source"] for record in held_out} == {kind}
        assert not trained_on & {record["meta"]["name"] for record in held_out}
    assert last not in {record["meta"]["name"] for record in read_lines(tmp_path / "code.jsonl.xz")}  # a copy


@pytest.mark.skipif(platform.python_version() != MADE_BY, reason=f"another standard library than that of Python {MADE_BY}")
def test_the_script_makes_the_shipped_records(tmp_path, monkeypatch):
    modules = list(make_texts.library_modules())  # parsed once
    monkeypatch.setattr(make_texts, "library_modules", lambda: iter(modules))
    written = {}
    monkeypatch.setattr(make_texts, "write_records", lambda path, records: written.update({path: records}))
    make_texts.write_corpus(TEXTS)
    make_texts.write_instructions(TEXTS)
    assert set(written) == set(TEXTS.rglob("*.xz"))
    for path, records in written.items():
        assert records == read_lines(path), path


# --- the texts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    """The records of every shipped file, by the file's name without its ending."""
    return {path.name.removesuffix(".jsonl.xz"): read_lines(path) for path in TEXTS.rglob("*.xz")}


@pytest.fixture(scope="module")
def corpus(shipped) -> list[dict]:
    return [record for name, records in shipped.items() if name.startswith("corpus-") for record in records]


@pytest.fixture(scope="module")
def held_out(shipped) -> list[dict]:
    return shipped["code"] + shipped["prose"]


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_clone_stays_small():
    assert size_of(DEMO) <= 10e6
    assert size_of(TEXTS) <= 4e6
    assert size_of(DEMO / "model") <= 6e6


def test_the_license_of_the_texts_is_with_them():
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (TEXTS / "LICENSE.txt").read_text()


def test_no_held_out_module_is_in_the_corpus(corpus, held_out):
    names = {record["meta"]["name"] for record in corpus}
    assert not names & {record["meta"]["name"] for record in held_out}
    assert not any(map(make_texts.is_held_out, names))
    assert all(make_texts.is_held_out(record["meta"]["name"]) for record in held_out)


def test_no_paragraph_of_a_held_out_text_is_in_the_corpus_or_in_the_instructions(corpus, held_out):
    """A paragraph of more than 100 characters; shorter ones may be the same by chance."""
    records = corpus + [record for path in (TEXTS / "instructions").iterdir() for record in read_lines(path)]
    texts = {text for record in records for text in record.values() if isinstance(text, str)}
    known = {paragraph for text in texts for paragraph in text.split("\n\n")}
    for record in held_out:
        assert record["text"] not in texts
        assert known.isdisjoint(make_texts.long_paragraphs(record)), record["meta"]


def test_both_kinds_of_text_are_in_the_corpus_and_one_kind_is_in_each_evaluation_set(corpus, shipped):
    assert {record["meta"]["source"] for record in corpus} == {"code", "prose"}
    for kind in ("code", "prose"):
        assert {record["meta"]["source"] for record in shipped[kind]} == {kind}


def test_every_file_that_the_demo_reads_is_readable(demo):
    experiment = load_experiment(demo)
    paths = [path for dataset in experiment.evaluation.datasets.values() for path in dataset.paths]
    paths += [path for source in experiment.corpus.sources for path in source.paths]
    for path in paths:
        assert all(document.text.strip() and document.source for document in read_documents(path)), path
    number = sum(1 for source in experiment.corpus.sources for path in source.paths for _ in read_documents(path))
    assert number > 2 * experiment.corpus.num_texts  # many are shorter or longer than a training text may be


def test_every_instruction_record_is_of_its_schema_and_there_are_enough(demo):
    sft = load_experiment(demo).sft
    for source in sft.sources:
        conversations = [found for path in source.paths for found in read_conversations(path, source.record_schema)]
        assert all(conversations), source.name  # None has no answer
        assert len(conversations) >= source.share * sft.num_records
    used = {path for source in sft.sources for path in source.paths}
    assert {Path(path).resolve() for path in used} == set((TEXTS / "instructions").iterdir())


# --- the model -------------------------------------------------------------------------------------------------------------


def test_the_card_of_the_model_has_the_digests_of_its_files_and_texts(demo_pretraining):
    card = (DEMO / "model/README.md").read_text()
    digests = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card, re.MULTILINE))
    files = [path for path in (DEMO / "model").iterdir() if path.name != "README.md"]
    files += map(Path, load_experiment(demo_pretraining).pretraining.paths)
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_model_is_the_one_that_the_config_makes(demo_pretraining, held_out):
    """The shape of the configuration, and a loss on held-out text that a trained model alone has."""
    settings = load_experiment(demo_pretraining).pretraining
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert settings.architecture.model_dump().items() <= model.config.to_dict().items()
    assert model.config.max_position_embeddings == settings.context
    assert model.config.vocab_size == len(tokenizer) == settings.vocab_size
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    windows = [
        tokenizer(record["text"], add_special_tokens=False, return_tensors="pt").input_ids[:, : settings.context]
        for record in held_out[:16]
    ]
    with torch.no_grad():
        losses = [model.float()(window, labels=window).loss.item() for window in windows]
    assert sum(losses) / len(losses) < 4.5  # 6.9 = ln 1024 for a model that knows nothing


def test_the_model_was_trained_on_the_corpus_and_is_evaluated_on_the_sets_of_the_demo(demo, demo_pretraining):
    base, extended = load_experiment(demo_pretraining), load_experiment(demo)
    assert base.pretraining.paths == [path for source in extended.corpus.sources for path in source.paths]
    assert base.evaluation.datasets == extended.evaluation.datasets
    assert (DEMO / "model").samefile(extended.base_model)
