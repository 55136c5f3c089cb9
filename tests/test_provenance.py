import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from longqlora.provenance import code_of, digest_of_values


def test_imports_are_followed_through_modules_and_into_functions(tmp_path):
    package = tmp_path / "longqlora"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from longqlora.b import x\n")
    (package / "b.py").write_text("def f():\n    import longqlora.c\n")
    (package / "c.py").write_text("import longqlora.a\n")  # a circle
    (package / "d.py").write_text("import os\n")
    (package / "unused.py").touch()
    script = tmp_path / "script.py"
    script.write_text("from longqlora.a import x\nfrom longqlora import d\nimport json\n")
    expected = ["longqlora/a.py", "longqlora/b.py", "longqlora/c.py", "longqlora/d.py", "script.py"]
    assert code_of(script, tmp_path) == expected


def test_stages_depend_on_what_they_use_and_on_nothing_else(root):
    def modules(script):
        files = code_of(root / f"workflow/scripts/{script}.py", root)
        assert f"workflow/scripts/{script}.py" in files
        return {Path(file).stem for file in files if file.startswith("longqlora/")}

    shown = {"ablations", "estimates", "joblog", "protocols", "tables"}
    assert modules("render_table") == shown
    for script in ("plot_perplexity", "plot_loss_by_position", "report_retrieval", "report_ablation"):
        assert modules(script) == shown | {"figures", "plots"}
    evaluation = {"attention", "evaluated_model", "joblog", "models", "positions", "provenance", "tokens"}
    evaluation |= {"estimates", "perplexity", "protocols"}
    assert modules("evaluate_perplexity") == evaluation | {"launching"}
    assert modules("evaluate_retrieval") == evaluation | {"needles", "retrieval"}
    assert not modules("train") & {"perplexity", "protocols", "estimates", "retrieval"}
    assert {"attention", "compatibility", "merging"} <= modules("train")
    assert modules("plot_loss") == {"figures", "joblog", "loss_curves"}


def test_tables_plots_and_sampling_import_no_torch(root):
    modules = "longqlora.tables, longqlora.plots, longqlora.loss_curves, longqlora.sampling, longqlora.experiment"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_digests_depend_on_values_alone():
    assert digest_of_values({"a": 1, "b": 2}) == digest_of_values({"b": 2, "a": 1})
    assert digest_of_values({"a": 1}) != digest_of_values({"a": 2})


def test_the_conda_environment_has_the_pins_of_the_package(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip == [dependency.split(";")[0] for dependency in project["dependencies"]]  # conda's Python is below 3.14


def test_every_rule_that_runs_a_script_names_the_environment_and_a_log(root):
    for path in (root / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"(?m)^rule ", path.read_text())[1:]:
            if "script:" in rule:
                assert '"../../environment.yml"' in rule, rule.split(":")[0]
                assert "log:" in rule
                assert "code=code_of(" in rule
