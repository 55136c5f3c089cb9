"""Which code a rule's result depends on, and which edits of it change its digest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longqlora.jobs.code import WITHOUT_EFFECT, Code, describe_code
from longqlora.jobs.digests import FileFacts, digest_of_values, stamp

SOURCE = """
import json
from longqlora.b import x

@decorator(1)
class A(Base):
    value: int = 3

    def method(self, a, *b, c=(1, 2), **d) -> str:
        if a and not b:
            return f"{a!r:>{c}} of {{b}} {d=}" "and more"
        return 'text with é and \U0001fae8'
"""


def digest(folder: Path, text: str) -> str:
    path = folder / "module.py"
    path.write_text(text, encoding="utf-8")
    return describe_code(path)["digest"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# a comment\n" + text,
        lambda text: '"""A docstring of the module."""\n' + text,
        lambda text: text.replace("    value", '    """Of the class."""\n\n    value'),
        lambda text: text.replace("= 3\n", '= 3\n    """Of a constant."""\n'),
        lambda text: text.replace("        if a", '        """Of a function."""\n        if a'),
        lambda text: text.replace(
            "c=(1, 2), **d", "\n        c=(\n            1,\n            2,\n        ),\n        **d,\n    "
        ),
        lambda text: text.replace("'text", '"text').replace("\U0001fae8'", '\U0001fae8"'),
        lambda text: text.replace("not b", "(not b)").replace("\n", "\n\n").replace("= 3", "= 0x3"),
    ],
)
def test_comments_docstrings_and_formatting_do_not_change_the_digest(tmp_path, change):
    assert change(SOURCE) != SOURCE
    assert digest(tmp_path, change(SOURCE)) == digest(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 3", "= 4"), ("= 3", "= 3.0"), ("= 3", "= True"), ("a and not b", "a or not b"), ("!r", "!s"), (">{c}", "<{c}"),
        ("Base", "Other"), ("import json", "import x"), ("é", "e"), ("return 'text", "'text"), ("(1)", "(2)"),
        ("def method", "async def method"), ("c=(1, 2)", "c=[1, 2]"), ("int", "str"), ("*b", "b"), ("{{b}}", "{b}"),
    ],
)  # fmt: skip
def test_every_other_edit_changes_the_digest(tmp_path, old, new):
    assert digest(tmp_path, SOURCE.replace(old, new)) != digest(tmp_path, SOURCE)


SYNTAX = r'''
from __future__ import annotations

import asyncio as a, os.path
from longqlora.data import packing
from . import sibling

CONSTANT: int = 0x1F + 1_000 + 10**30
"""Of a constant."""
text = u"é \U0001fae8 \x7f" "joined" + f"{a!r:>{CONSTANT}} {{x}} {os=}" f"" "end" + rf"\d{1:{2}.{3}}" + f"{'a' 'b'}"
data, number, *rest = b"\xff", 1j, ..., None, -1.5e-300, float("inf")


@a.decorator(1, key=[*rest], **{})
class A(Base, metaclass=Meta):
    value: dict[str, int | None] = {"a": 1, **other}

    async def method(self, x, /, y: int = 3, *z, k=(1, 2), **d) -> "str":
        """A docstring."""
        global g
        async with x as (p, q), y:
            await z
        async for i in k:
            yield i
        else:
            pass
        try:
            raise ValueError from None
        except* (TypeError, OSError) as error:
            del error
        finally:
            assert x, f"{x}"

    def branches(self, n):
        nonlocal_ = lambda *a, b=1: (yield from a)
        while (m := n[1:2, ::3]) and not m or n < 1 <= 2 != 3 is not None:
            n @= 1 if m else 2
            continue
        return [i async for i in n if i], {i for i in n}, {i: i for i in n}, (i for i in n)


match CONSTANT:
    case {"a": [1, *_], **kw} | A(x=1, y=None) if kw:
        ...
    case (1 | -2) as z:
        pass
    case _:
        pass
'''


def test_every_python_computes_the_same_digests(tmp_path):
    """A job may run on another Python than the workflow. If digests are computed in another way, every rule runs again: then
    the changelog must say so."""
    assert digest(tmp_path, SOURCE) == "47351ad31d17"
    assert digest(tmp_path, SYNTAX) == "bd46cab599d9"


@pytest.fixture
def package(tmp_path) -> Path:
    """A package whose modules import each other."""
    files = {
        "longqlora/__init__.py": "",
        "longqlora/a.py": "from longqlora.b import x\n",
        "longqlora/b.py": "import longqlora.config.settings\ndef f():\n    import longqlora.c, longqlora.jobs.log\n",
        "longqlora/c.py": "import longqlora.a\nimport longqlora.modeling.compatibility\n",  # a cycle
        "longqlora/d.py": "import os\n",
        "longqlora/unused.py": "",
        "longqlora/modeling/compatibility.py": "",
        "longqlora/config/__init__.py": "",
        "longqlora/config/settings.py": "",
        "longqlora/jobs/__init__.py": "",
        "longqlora/jobs/log.py": "",
        "script.py": "from longqlora.a import x\nfrom longqlora import d\nimport json\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def code_of(root: Path) -> Code:
    return Code(root, FileFacts(root / "facts.json"))


def test_imports_are_followed_through_modules_and_into_functions(package):
    expected = ["longqlora/a.py", "longqlora/b.py", "longqlora/c.py", "longqlora/d.py", "script.py"]
    assert code_of(package).files_behind("script.py") == expected
    assert [param.split()[0] for param in code_of(package).params("script.py")] == expected


def test_an_edit_changes_the_param_of_its_file_alone(package):
    before = code_of(package).params("script.py")
    (package / "longqlora/c.py").write_text("import longqlora.a\nimport longqlora.modeling.compatibility\nvalue = 1\n")
    after = code_of(package).params("script.py")
    assert [new.split()[0] for old, new in zip(before, after, strict=True) if old != new] == ["longqlora/c.py"]


def test_an_import_that_is_new_is_followed(package):
    code_of(package).params("script.py")
    (package / "longqlora/d.py").write_text("import longqlora.unused\n")
    assert "longqlora/unused.py" in code_of(package).files_behind("script.py")


def test_what_only_code_without_an_effect_imports_does_not_count(package):
    """An estimate of the memory imports the code of all stages; an edit of one must not rerun the others."""
    (package / "longqlora/planning").mkdir()
    (package / "longqlora/planning/peak_memory.py").write_text("import longqlora.unused\n")
    (package / "longqlora/d.py").write_text("import longqlora.planning.peak_memory\n")
    files = code_of(package).files_behind("script.py")
    assert "longqlora/d.py" in files
    assert not {"longqlora/planning/peak_memory.py", "longqlora/unused.py"} & set(files)


# --- the scripts of this project -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def code(root) -> Code:
    return Code(root, FileFacts())


@pytest.fixture(scope="session")
def scripts(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / "workflow/scripts").glob("*.py"))


def rooms_behind(code: Code, name: str) -> set[str]:
    """The rooms of the package whose files a script depends on."""
    files = code.files_behind(f"workflow/scripts/{name}.py")
    assert f"workflow/scripts/{name}.py" in files
    return {file.split("/")[1] for file in files if file.startswith("longqlora/")}


@pytest.mark.parametrize(
    ("names", "independent_of"),
    [
        (["sample_corpus", "sample_shard", "build_sft_set"], {"modeling", "training", "publishing", "evaluation", "reporting"}),
        (["tokenize_corpus", "tokenize_sft"], {"modeling", "training", "publishing", "evaluation", "reporting"}),
        (["train", "pretrain_model"], {"publishing", "evaluation", "reporting"}),
        (["merge_adapter", "publish_model"], {"training", "evaluation", "reporting"}),
        (["evaluate_perplexity", "evaluate_retrieval"], {"training", "publishing", "reporting"}),
        (["render_table", "plot_perplexity", "report_retrieval", "report_ablation"], {"modeling", "training", "publishing"}),
    ],
)
def test_an_edit_in_a_room_does_not_rerun_scripts_that_are_independent_of_it(code, names, independent_of):
    for name in names:
        assert not rooms_behind(code, name) & independent_of


def test_each_stage_depends_on_its_own_modules(code):
    for name, module in {
        "pretrain_model": "training/pretraining", "train": "training/trainer",
        "merge_adapter": "publishing/merging", "publish_model": "publishing/model_card",
        "evaluate_perplexity": "evaluation/perplexity", "evaluate_retrieval": "evaluation/retrieval_tasks",
        "render_table": "reporting/tables", "plot_loss": "reporting/loss_curves", "sample_corpus": "data/corpus",
        "tokenize_sft": "data/token_files",
    }.items():  # fmt: skip
        assert f"longqlora/{module}.py" in code.files_behind(f"workflow/scripts/{name}.py")


def test_logging_processes_and_settings_change_no_result(code, scripts):
    """Their edits rerun nothing; values of settings reach a job as params."""
    for script in scripts:
        assert not [file for file in code.files_behind(script) if file.startswith(WITHOUT_EFFECT)]


def test_what_reruns_nothing_imports_nothing_that_does(root, code):
    """Otherwise an edit of a module that only they import would not be noticed. An estimate imports what it is of, and
    hands nothing of it to a result."""
    for path in (root / "longqlora").rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(WITHOUT_EFFECT) and not name.startswith("longqlora/planning/"):
            assert code.files_behind(name) == [], name


def test_results_depend_on_no_part_of_the_configuration_but_the_types_of_settings(code, scripts):
    """Other modules of ``config`` compute values, and their edits rerun nothing."""
    for script in scripts:
        for file in code.files_behind(script):
            imported = {module for module in code.describe(file)["imports"] if module.startswith("longqlora.config.")}
            assert all(module.startswith("longqlora.config.settings") for module in imported), file


def test_packages_have_no_code_of_their_own(root):
    """Imports are followed to modules, not to the ``__init__.py`` of their packages."""
    assert all(not path.read_text() for path in (root / "longqlora").rglob("__init__.py"))


@pytest.mark.process
def test_scripts_that_render_import_no_torch(root, code):
    """Importing it takes seconds, and a table or plot is rendered again more often than anything else."""
    names = ("render_table", "plot_perplexity", "plot_loss", "report_retrieval", "report_ablation", "plot_text_lengths")
    files = {file for name in names for file in code.files_behind(f"workflow/scripts/{name}.py")}
    modules = sorted(file.removesuffix(".py").replace("/", ".") for file in files if file.startswith("longqlora/"))
    run = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", run], cwd=root).returncode == 0


def test_digests_of_values_do_not_depend_on_the_order_of_keys():
    assert digest_of_values({"a": 1, "b": 2}) == digest_of_values({"b": 2, "a": 1})
    assert digest_of_values({"a": 1}) != digest_of_values({"a": 2})


def test_a_record_has_separate_digests_of_code_and_configuration():
    from snakemake.iocontainers import Params

    def params(code: list[str], **configured) -> Params:
        made = Params(code)
        for name, value in configured.items():
            made.append(value)
            made._add_name(name)
        return made

    first = stamp(params(["a.py 1", "b.py 2"], seed=1, settings={"rank": 4}))
    other_code = stamp(params(["a.py 1", "b.py 3"], seed=1, settings={"rank": 4}))
    other_config = stamp(params(["a.py 1", "b.py 2"], seed=1, settings={"rank": 8}))
    assert first["code_digest"] == other_config["code_digest"] != other_code["code_digest"]
    assert first["config_digest"] == other_code["config_digest"] != other_config["config_digest"]


# --- files that the user keeps ---------------------------------------------------------------------------------------------


def test_a_file_is_read_again_only_if_its_size_or_date_has_changed(tmp_path):
    file, store, read = tmp_path / "weights", tmp_path / "facts.json", []
    file.write_bytes(b"1234")

    def length(path):
        read.append(path)
        return len(path.read_bytes())

    assert FileFacts(store).find("length", [file], length) == [4]
    assert FileFacts(store).find("length", [str(file)], length) == [4]
    assert len(read) == 1
    os.utime(file, ns=(1, 1))
    assert FileFacts(store).find("length", [file], length) == [4]
    assert len(read) == 2
    file.write_bytes(b"12345")
    assert FileFacts(store).find("length", [file], length) == [5]


def test_a_fingerprint_names_files_and_depends_on_their_contents_not_their_dates(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c", "d")]
    for file in files:
        file.write_text(file.name)
    facts = FileFacts(tmp_path / "facts.json")
    before = facts.fingerprint(files)
    assert before.startswith(f"{files[0]}, {files[1]}, {files[2]} and 1 more ")
    os.utime(files[3], ns=(1, 1))
    assert facts.fingerprint(files) == before
    files[3].write_text("D")
    assert facts.fingerprint(files) != before


@pytest.mark.parametrize("damage", [lambda store: store.write_text("{"), lambda store: (store.unlink(), store.mkdir())])
def test_with_a_damaged_store_facts_are_computed_again(tmp_path, damage):
    file, store = tmp_path / "file", tmp_path / "facts.json"
    file.write_text("x")
    before = FileFacts(store).fingerprint([file])
    damage(store)
    assert FileFacts(store).fingerprint([file]) == before
