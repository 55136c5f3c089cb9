"""The documentation says what is true: its configurations load, its links and paths lead to files, and every key is shown."""

import ast
import copy
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from longqlora.config.experiment import load_experiment
from longqlora.config.settings import Configuration

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
YAML_BLOCK = re.compile(r"(?:<!-- config: (\S+) -->\s*)?^( *)```yaml\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(
    r"^(?:longqlora|workflow|config|demo|tests|docs|benchmarks|profiles|\.ci)/[\w./-]*$"
    r"|^(?:Snakefile|constraints\.txt|environment\.yml|[\w-]+\.toml|[A-Z]+\.(?:md|cff))$"
)
MODULE = re.compile(r"^\s*(?:from (longqlora[\w.]*) import|import (longqlora[\w.]*))", re.MULTILINE)
FORMER = {"longqlora.packing"}  # the changelog names where it was
FOREIGN = {
    "FileNotFoundError",
    "No such file",
    "LockException",
    "Directory cannot",
    "401",
    "gated repo",
    "Access to model",
    "is restricted",
}
"""Beginnings of messages on the page of troubleshooting that are not this project's."""


def yaml_blocks() -> list:
    """(page, shipped config that the block changes, block) of every YAML example."""
    return [
        pytest.param(name, block, indent, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (name, indent, block) in enumerate(YAML_BLOCK.findall(page.read_text(encoding="utf-8")), start=1)
    ]


def overlay(base: dict, changes: dict) -> dict:
    """A configuration with other values; sections are merged, everything else is replaced."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both_are_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both_are_sections else value
    return merged


@pytest.mark.parametrize(("name", "block", "indent"), yaml_blocks())
def test_every_example_of_a_configuration_loads(name, block, indent):
    assert name, "an example needs a line <!-- config: NAME --> that says which shipped config it changes"
    changes = yaml.safe_load(re.sub(f"^{indent}", "", block, flags=re.MULTILINE))
    load_experiment(overlay(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()), changes))


def keys_of(model: type[BaseModel]) -> set[str]:
    """All keys of a section and of the sections in it."""
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(field.alias or name)
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys |= keys_of(annotation)
            else:
                pending += get_args(annotation)
    return keys


def keys_in(value: object) -> set[str]:
    """All keys of nested dictionaries and lists."""
    if isinstance(value, dict):
        return {str(key) for key in value} | {key for item in value.values() for key in keys_in(item)}
    return {key for item in value for key in keys_in(item)} if isinstance(value, list) else set()


def test_every_key_is_in_a_shipped_config_or_in_an_example():
    used = {key for path in CONFIGS for key in keys_in(yaml.safe_load(path.read_text()))}
    for _, block, indent in (parameter.values for parameter in yaml_blocks()):
        used |= keys_in(yaml.safe_load(re.sub(f"^{indent}", "", block, flags=re.MULTILINE)))
    assert keys_of(Configuration) - used == set()


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors_of(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_of_the_repository_exists(page):
    for name in CODE_SPAN.findall(page.read_text(encoding="utf-8")):
        if FILE.match(name):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_module_of_the_package_exists(page):
    text = page.read_text(encoding="utf-8")
    names = {name for pair in MODULE.findall(text) for name in pair if name}
    names |= {name for name in CODE_SPAN.findall(text) if re.match(r"longqlora(\.\w+)+$", name)}
    for name in names - FORMER:
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def texts_of_the_code() -> str:
    """All constant texts of the package and the rules; what an f-string fills in separates them."""
    paths = [*(ROOT / "longqlora").rglob("*.py"), *(ROOT / "workflow/scripts").glob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\0".join(texts + [path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk")])


def test_the_messages_of_the_page_on_troubleshooting_are_those_of_the_code():
    """The page leaves out, as …, what differs from case to case."""
    page, code = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), texts_of_the_code()
    quoted = [span for bold in re.findall(r"^\*\*(.+?)\*\*", page, re.MULTILINE) for span in CODE_SPAN.findall(bold)]
    parts = [part.strip(" :") for span in quoted for part in span.split("…")]
    own = [part for part in parts if part and not part.startswith(tuple(FOREIGN))]
    assert len(own) > 15
    assert [part for part in own if part not in code] == []


def test_the_rule_graph_has_the_rules_of_the_workflow():
    (graph,) = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.DOTALL)
    graph = re.sub(r"^ *(?:subgraph|graph|end).*$", "", graph, flags=re.MULTILINE)
    shown = set(re.findall(r"\w+", graph))
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    named = set(re.findall(r"^ *(?:rule|use rule \w+ as) (\w+)", rules, re.MULTILINE))
    targets = {"data", "train", "evaluate", "answers", "ablations", "perplexity_report", "gguf"}
    elsewhere = {"retokenize_evaluation_set", "report_ablation", "pretrain_model", "choose_scaling", "find_key_tokens"}
    elsewhere |= {"evaluate_harness", "report_harness", "convert_gguf", "check_gguf", "report_serving"}
    assert shown == named - targets - elsewhere


def test_the_readme_is_short_and_says_workflow():
    """Catalogs of workflows list a repository by this word; CI reads the test command two lines below its mark."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Snakemake workflow" in readme
    assert len(readme.splitlines()) <= 120
    lines = readme.splitlines()
    assert lines[lines.index("<!-- tests -->") + 2].endswith("&& pytest")
