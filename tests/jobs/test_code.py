"""What of the code counts for a rerun: which files, and what they say."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from longqlora.jobs.code import Code, describe_code
from longqlora.jobs.digests import FileFacts, digest_of_values, stamp

SAID = """
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
def test_comments_docstrings_and_format_say_nothing(tmp_path, change):
    assert change(SAID) != SAID
    assert digest(tmp_path, change(SAID)) == digest(tmp_path, SAID)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 3", "= 4"), ("= 3", "= 3.0"), ("= 3", "= True"), ("a and not b", "a or not b"), ("!r", "!s"), (">{c}", "<{c}"),
        ("Base", "Other"), ("import json", "import x"), ("é", "e"), ("return 'text", "'text"), ("(1)", "(2)"),
        ("def method", "async def method"), ("c=(1, 2)", "c=[1, 2]"), ("int", "str"), ("*b", "b"), ("{{b}}", "{b}"),
    ],
)  # fmt: skip
def test_whatever_else_changes_does_count(tmp_path, old, new):
    assert digest(tmp_path, SAID.replace(old, new)) != digest(tmp_path, SAID)


def pythons() -> list[str]:
    """Other Pythons of this machine that are 3.11 or newer."""
    found = []
    for minor in range(11, 15):
        names = [shutil.which(f"python3.{minor}")]
        names += [
            str(path)
            for path in Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/3.{minor}.*/bin/python")
        ]
        for name in filter(None, names):
            asked = [name, "-c", "import sys; print(sys.version_info[1])"]
            answer = subprocess.run(asked, capture_output=True, text=True)
            if answer.stdout.strip() == str(minor) != str(sys.version_info[1]):
                found.append(name)
                break
    return found


def test_other_pythons_find_the_same_digests(root):
    others = pythons()
    if not others:
        pytest.skip("no other Python from 3.11 on is installed")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from longqlora.jobs.code import describe_code\n"
        "for path in sorted(path for name in ('longqlora', 'workflow', 'tests') for path in Path(name).rglob('*.py')):\n"
        "    print(path, describe_code(path)['digest'])\n"
    )
    expected = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert expected.count("\n") > 80
    for python in others:
        assert subprocess.run([python, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == expected


@pytest.fixture
def package(tmp_path) -> Path:
    """A package whose modules import each other."""
    files = {
        "longqlora/__init__.py": "",
        "longqlora/a.py": "from longqlora.b import x\n",
        "longqlora/b.py": "def f():\n    import longqlora.c\n    from longqlora.jobs import log\n",
        "longqlora/c.py": "import longqlora.a\nimport longqlora.modeling.compatibility\n",  # a circle
        "longqlora/d.py": "import os\n",
        "longqlora/unused.py": "",
        "longqlora/modeling/compatibility.py": "",
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


def modules_behind(root: Path, script: str) -> set[str]:
    files = Code(root, FileFacts()).files_behind(f"workflow/scripts/{script}.py")
    assert f"workflow/scripts/{script}.py" in files
    return {file.removeprefix("longqlora/").removesuffix(".py") for file in files if file.startswith("longqlora/")}


TOKENS = {"data/token_files", "data/token_descriptions"}
LOADING = {"modeling/loading", "modeling/devices", "modeling/rope"}


def test_training_depends_on_what_can_change_weights_and_on_nothing_else(root):
    base = {"data/packing", "modeling/chunked_loss"} | TOKENS | LOADING
    trained = {"modeling/attention", "training/adapters", "training/trainer", "training/train"}
    assert modules_behind(root, "train") == base | trained
    assert modules_behind(root, "merge_adapter") == base | {
        "modeling/model_files", "publishing/merge_report", "publishing/merging", "publishing/weights"
    }  # fmt: skip


def test_stages_depend_on_what_they_use_and_on_nothing_else(root):
    shown = {"config/ablations", "evaluation/statistics", "evaluation/protocols", "reporting/tables"}
    assert modules_behind(root, "render_table") == shown
    for script in ("plot_perplexity", "plot_loss_by_position", "report_retrieval", "report_ablation"):
        assert modules_behind(root, script) == shown | {"reporting/figures", "reporting/plots"}
    evaluation = {"evaluated_model", "statistics", "perplexity", "protocols"}
    evaluation = {f"evaluation/{name}" for name in evaluation} | TOKENS | LOADING | {"modeling/attention"}
    assert modules_behind(root, "evaluate_perplexity") == evaluation
    assert modules_behind(root, "evaluate_retrieval") == evaluation | {"evaluation/retrieval_tasks", "evaluation/retrieval"}
    assert modules_behind(root, "publish_model") == TOKENS | {
        "data/chat_template", "modeling/model_files", "publishing/model_card", "publishing/model_folder"
    }  # fmt: skip
    assert modules_behind(root, "plot_loss") == {"reporting/figures", "reporting/loss_curves"}


def test_what_does_not_count_imports_nothing_that_does(root):
    """Else an edit of such a module would go unnoticed."""
    code = Code(root, FileFacts())
    for path in [*(root / "longqlora/jobs").glob("*.py"), root / "longqlora/modeling/compatibility.py"]:
        assert code.files_behind(path.relative_to(root).as_posix()) == []


def test_packages_say_nothing_by_themselves(root):
    """Nobody follows an import to the __init__.py of a package."""
    assert all(not path.read_text() for path in (root / "longqlora").rglob("__init__.py"))


def test_tables_plots_and_sampling_import_no_torch(root):
    modules = ", ".join(
        f"longqlora.{name}"
        for name in ("reporting.tables", "reporting.plots", "reporting.loss_curves", "data.sampling", "config.experiment")
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_digests_depend_on_values_alone():
    assert digest_of_values({"a": 1, "b": 2}) == digest_of_values({"b": 2, "a": 1})
    assert digest_of_values({"a": 1}) != digest_of_values({"a": 2})


def test_a_record_is_stamped_with_code_and_configuration_apart():
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


def test_a_file_is_read_again_only_when_its_size_or_date_is_another(tmp_path):
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


def test_a_fingerprint_tells_contents_not_dates_and_names_the_files(tmp_path):
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
def test_a_damaged_store_costs_only_time(tmp_path, damage):
    file, store = tmp_path / "file", tmp_path / "facts.json"
    file.write_text("x")
    before = FileFacts(store).fingerprint([file])
    damage(store)
    assert FileFacts(store).fingerprint([file]) == before


# --- environments ----------------------------------------------------------------------------------------------------------


def test_the_conda_environment_has_the_pins_of_the_package(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip == [dependency.split(";")[0] for dependency in project["dependencies"]]  # conda's Python is below 3.14


def test_every_channel_of_the_conda_environment_is_one(root):
    """From 26.7 on conda takes the keyword nodefaults for the name of a channel, and fails."""
    environment = yaml.safe_load((root / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    assert environment.keys() == {"name", "channels", "dependencies"}
    plain = [part for part in environment["dependencies"] if isinstance(part, str)]
    assert all(re.fullmatch(r"[a-z0-9._-]+([<>=!,.0-9]+)?", part) for part in plain)


def test_every_rule_that_runs_a_script_names_the_environment_its_code_and_a_log(root):
    for path in (root / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"(?m)^rule ", path.read_text())[1:]:
            script = re.search(r'script:\n        "../scripts/(\w+).py"', rule)
            if script:
                assert '"../../environment.yml"' in rule, rule.split(":")[0]
                assert "log:" in rule
                assert f'*code_of("{script[1]}")' in rule
