"""The project's metadata: dependencies, the conda environment, tested versions, and what every rule declares."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def imported_packages(path: Path) -> set[str]:
    """Top-level names of what a Python file or a Snakefile imports, without the standard library."""
    if path.suffix == ".py":
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    else:
        names = set(re.findall(r"(?m)^\s*(?:import|from) ([\w.]+)", path.read_text()))
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"compression"}  # standard from Python 3.14 on


def test_every_imported_package_is_a_declared_dependency(root, project):
    paths = [root / "workflow/Snakefile", *(root / "workflow/rules").glob("*.smk")]
    paths += [path for folder in ("longqlora", "workflow/scripts", "benchmarks") for path in (root / folder).rglob("*.py")]
    own = {"longqlora", *(path.stem for path in (root / "benchmarks").glob("*.py"))}
    own |= {"conversion", "gguf", "gradio", "llama_cpp_py_sync", "lm_eval"}  # of extras; imported only where they are asked for
    own.add("vllm")  # has an environment of its own
    distributions = packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    for path in paths:
        for package in imported_packages(path) - own:
            assert {canonicalize_name(name) for name in distributions.get(package, [])} & declared, f"{path} imports {package}"


def test_the_conda_environment_has_the_dependencies_of_the_package(root, project):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip == [dependency.split(";")[0] for dependency in project["dependencies"]]  # its Python is older than 3.14


def test_the_conda_environment_names_one_channel(root):
    """From 26.7 on, conda takes the keyword nodefaults for the name of a channel, and fails."""
    environment = yaml.safe_load((root / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    assert environment.keys() == {"name", "channels", "dependencies"}
    plain = [part for part in environment["dependencies"] if isinstance(part, str)]
    assert all(re.fullmatch(r"[a-z0-9._-]+([<>=!,.0-9]+)?", part) for part in plain)


def test_the_tested_versions_include_every_dependency_within_its_bounds(root, project):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = dict(line.split("==") for line in lines)
    assert list(tested) == sorted({canonicalize_name(name) for name in tested})
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), text


@pytest.mark.process
def test_the_container_has_the_python_and_the_files_that_its_packages_are_installed_from(root, project):
    instructions = (root / "Dockerfile").read_text().replace("\\\n", " ")
    python = re.search(r"(?m)^FROM python:([\d.]+)-slim", instructions)[1]
    assert f"Python {python}," in (root / "constraints.txt").read_text().splitlines()[0]  # where these versions were tested
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (conda,) = [Requirement(part) for part in environment["dependencies"] if str(part).startswith("python")]
    assert conda.specifier.contains(f"{python}.1")
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.1")
    copied = [name for files in re.findall(r"(?m)^COPY (.*) \.$", instructions) for name in files.split()]
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert ignored == ["*", *(f"!{name}" for name in copied)]
    installs = re.findall(r"pip install [^&\n]*", instructions)
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    (list_dependencies,) = re.findall(r"python -c '(.*?)'", instructions)
    listed = subprocess.run([sys.executable, "-c", list_dependencies], cwd=root, capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == project["dependencies"]


def test_the_catalog_of_workflows_finds_what_it_reads(root):
    """What its README asks of a workflow that others deploy by it: https://github.com/snakemake/snakemake-workflow-catalog."""
    usage = yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["software-stack-deployment"]["conda"] is usage["report"] is True
    assert usage["mandatory-flags"].keys() == {"desc", "flags"}
    assert (root / "workflow/Snakefile").is_file()
    assert (root / "config/README.md").is_file()
    assert {"snakemake", "workflow"} <= set(re.findall(r"\w+", (root / "README.md").read_text().lower()))


def test_every_rule_that_runs_a_script_names_the_environment_its_code_a_log_and_what_it_does(root):
    for path in (root / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"(?m)^ *rule ", path.read_text())[1:]:
            script = re.search(r'script:\n +"../scripts/(\w+).py"', rule)
            if script:
                assert '"../../environment.yml"' in rule, rule.split(":")[0]
                assert "message:" in rule, f"{rule.split(':')[0]}: the terminal shows the message of each rule"
                assert "log:" in rule
                assert f'*code_of("{script[1]}")' in rule


def texts_in_the_encoding_of_the_locale(path: Path) -> list[str]:
    """The calls in a Python file that read or write text and name no encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in ("os.open", "fsspec.open"):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        is_text = name in ("read_text", "write_text") or (name == "open" and not any("b" in str(mode) for mode in modes))
        if is_text and not any(keyword.arg == "encoding" for keyword in node.keywords):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["longqlora", "workflow/scripts"])
def test_texts_are_utf_8_whatever_the_locale_of_the_machine(root, folder):
    """With LC_ALL=C, Python may read and write ASCII: a label or text with other characters would stop a job at its end."""
    assert [call for path in sorted((root / folder).rglob("*.py")) for call in texts_in_the_encoding_of_the_locale(path)] == []
