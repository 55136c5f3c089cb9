import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from longqlora.config.experiment import load_experiment
from longqlora.data.decontamination import EvaluationNgrams, hash_ngrams, words_of
from longqlora.data.instruction_schemas import read_conversations
from longqlora.data.readers import find_files, read_documents
from longqlora.data.sampling import text_id
from longqlora.planning import traced_jobs
from longqlora.planning.peak_memory import Memory
from longqlora.training.adapters import BaseDtypes

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # older transformers know the old name alone


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")  # a child process imports it by its name
    return importlib.import_module("training")


@pytest.fixture
def cases(benchmark):
    return importlib.import_module("training_cases")


@pytest.fixture
def measuring(benchmark):
    return importlib.import_module("measuring")


def test_every_script_finds_what_it_imports(root, benchmark):
    names = {path.stem for path in (root / "benchmarks").glob("*.py")} - {"serving"}  # needs the extra gguf
    assert {"data", "gpu_check"} < names
    for name in names:
        importlib.import_module(name)


def test_the_page_on_large_runs_has_the_tables_that_are_calculated(root, benchmark, tmp_path):
    scale = importlib.import_module("scale")
    page = (root / "docs/scale.md").read_text(encoding="utf-8")
    for title, text in scale.tables().items():
        assert text in page, f"{title}: python benchmarks/scale.py prints another table"
    scale.write_experiments(tmp_path)
    for name in ("70b-32k", "8b-1m"):
        planned = load_experiment(yaml.safe_load((tmp_path / f"{name}.yaml").read_text(encoding="utf-8")))
        assert (tmp_path / planned.base_model / "config.json").is_file()


@pytest.mark.process
def test_the_script_measures_every_case_and_writes_json_and_markdown(root, tmp_path):
    output = tmp_path / "results.json"
    options = ["--shape", "toy", "--lengths", "64", "128", "--repetitions", "1", "--cases", "ours", "published"]
    command = [sys.executable, "benchmarks/training.py", *options, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    rows = {(row["tokens"], row["case"]): row for row in results["steps"]}
    assert set(rows) == {(64, "ours"), (64, "published"), (128, "ours"), (128, "published")}
    for row in rows.values():
        assert "failure" not in row
        assert len(row["seconds"]) == 1
        assert row["peak_bytes"] > row["loaded_bytes"]
        assert row["first_loss"] == pytest.approx(math.log(512), rel=0.01)  # nothing is known of random tokens
    assert results["ceiling"]["matmul_flops"] > 0
    assert "--lengths 64 128" in done.stdout
    for tokens, case in rows:
        assert f"| toy | {tokens} | {case} |" in done.stdout


def naive_published_attention(query, key, value, group):
    """Attention of the published definition by a mask of n × n for each head; ``[b, h, n, d]`` each."""
    heads, tokens, width = query.shape[1:]
    place = torch.arange(tokens)
    visible = []
    for head in range(heads):
        rolled = place if head < heads // 2 else (place - group // 2) % tokens
        same_group = rolled[:, None] // group == rolled[None] // group
        visible.append(same_group & (rolled[None] <= rolled[:, None]))
    scores = (query @ key.transpose(2, 3) / width**0.5).masked_fill(~torch.stack(visible), -torch.inf)
    return scores.softmax(-1) @ value


def test_published_attention_is_its_definition_by_a_mask(cases):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 32, 8, dtype=torch.float64)
    mask = cases.published_mask(q_length=32, device="cpu", dtype=torch.float64)
    out, _ = cases.published_attention(None, query, key, value, mask)
    expected = naive_published_attention(query, key, value, group=8).transpose(1, 2)  # [b, n, h, d]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # its softmax is in float32


def test_the_first_tokens_of_the_published_attention_see_the_last(cases):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 32, 8)
    mask = cases.published_mask(q_length=32, device="cpu")
    before, _ = cases.published_attention(None, query, key, value, mask)
    value[:, :, -1] += 1
    after, _ = cases.published_attention(None, query, key, value, mask)
    changed = (before != after).any(-1)[0]  # [n, h]
    assert changed[:, :2].nonzero()[:, 0].unique().tolist() == [31]
    assert changed[:, 2:].nonzero()[:, 0].unique().tolist() == [0, 1, 2, 3, 31]


def test_published_attention_names_a_length_that_its_groups_do_not_divide(cases):
    query = torch.randn(1, 4, 30, 8)
    with pytest.raises(ValueError, match="30 tokens are no multiple of the group of 7"):
        cases.published_attention(None, query, query, query, cases.published_mask(q_length=30, device="cpu"))


@pytest.fixture
def ids():
    return torch.randint(512, (1, 128), generator=torch.Generator().manual_seed(5))


def losses_of_two_steps(cases, name, precision, ids):
    model = cases.prepare_case(cases.CASES[name], "toy", precision, ids.shape[1], CPU)
    step = cases.training_step(model, ids)
    return [step(), step()]


@pytest.mark.parametrize("precision", ["nf4", "auto"])
def test_ours_with_full_attention_and_the_plain_path_train_alike(cases, ids, precision):
    ours, plain = (losses_of_two_steps(cases, name, precision, ids) for name in ("ours_full", "plain"))
    assert ours == pytest.approx(plain, abs=1e-4)
    assert ours[0] != ours[1]


def test_the_published_loss_is_the_plain_one_under_its_own_attention(cases, ids):
    case = cases.CASES["published"]
    model = cases.prepare_case(case, "toy", "nf4", ids.shape[1], CPU)
    plain = cases.prepare_case(cases.Case("published", "plain", reentrant=False), "toy", "nf4", ids.shape[1], CPU)
    assert cases.training_step(model, ids)() == pytest.approx(cases.training_step(plain, ids)(), abs=1e-4)


def test_the_base_is_quantized_and_its_embeddings_are_not(cases):
    model = cases.build_model("toy", "nf4", 128, CPU, "sdpa")
    kinds = {name: type(weight).__name__ for name, weight in model.named_parameters()}
    quantized = {name for name, kind in kinds.items() if kind == "Params4bit"}
    assert quantized == {name for name in kinds if "_proj" in name}
    assert not any(weight.is_meta for weight in [*model.parameters(), *model.buffers()])
    assert model.config.rope_parameters["factor"] == 2  # 128 tokens on a context of 64


@pytest.mark.parametrize(
    ("name", "embeddings"), [("ours", torch.bfloat16), ("plain", torch.float32), ("published", torch.float32)]
)
def test_only_ours_trains_with_the_base_in_16_bit(cases, monkeypatch, name, embeddings):
    monkeypatch.setattr(cases, "base_dtypes", lambda device: BaseDtypes(torch.bfloat16, torch.bfloat16))  # of a GPU
    model = cases.prepare_case(cases.CASES[name], "toy", "nf4", 128, CPU)
    assert model.get_input_embeddings().weight.dtype is embeddings


def test_the_evaluation_scores_the_whole_window(cases, ids):
    model = cases.prepare_case(cases.CASES["perplexity"], "toy", "nf4", 127, CPU)
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits.flatten(0, 1)
    assert cases.evaluation_step(model, ids)() == pytest.approx(cross_entropy(logits, ids[0, 1:]).item(), abs=1e-4)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_stand_in_for_the_chunked_loss_gives_its_values_and_gradients(cases, reduction):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(1500, 16), torch.randn(50, 16), torch.randint(50, (1500,))
    targets[7] = -100
    found = []
    stand_in = cases.stand_ins.checkpointed_cross_entropy
    for loss in (stand_in, lambda h, w, t, reduction: cross_entropy(h @ w.T, t, reduction=reduction)):
        leaf = hidden.clone().requires_grad_()
        losses = loss(leaf, weight, targets, reduction)
        losses.sum().backward()
        found.append((losses, leaf.grad))
    torch.testing.assert_close(*found)


@pytest.mark.process
def test_a_process_over_its_time_limit_is_ended(measuring):
    child = measuring.Child(time.sleep, 600, time_limit=0.2)
    assert child.answer() == {"failure": "over the time limit of 0.2 s"}
    child.stop()
    assert not child.process.is_alive()


class Actor:
    """Stands in for a child process: ``published`` never answers in time, ``plain`` has no memory for its third step."""

    def __init__(self, case, time_limit):
        self.case, self.steps = case, 0

    def answer(self):
        return {"failure": "over the time limit of 1 s"} if self.case == "published" else {"loaded_bytes": 2**30}

    def take_step(self):
        self.steps += 1
        if self.case == "plain" and self.steps == 3:
            return {"failure": "out of memory"}
        return {"seconds": float(self.steps), "cpu_seconds": 1.0, "loss": 6.0, "peak_bytes": 2**31}

    def stop(self):
        pass


@pytest.fixture
def results(measuring, monkeypatch):
    """Of a run in which one case was over its limit and another failed at its second timed step."""
    monkeypatch.setattr(measuring, "Child", Actor)
    rows = [{"shape": "small", "tokens": 2048, "case": case} for case in ("ours", "plain", "published")]
    measuring.measure_together(rows, set_up_of=lambda row: (row["case"],), repetitions=3, time_limit=1, save=lambda: None)
    where = {"cores": 2, "processor": "a processor", "system": "a system"}
    return {
        "date": "2026-01-01", "command": "python benchmarks/training.py", "machine": where, "versions": {"torch": "2"},
        "precision": "nf4", "repetitions": 3, "ceiling": {}, "steps": rows,
    }  # fmt: skip


def test_a_case_over_its_time_limit_is_reported_and_the_others_are_measured(benchmark, results):
    ours, plain, published = results["steps"]
    assert ours["seconds"] == [2, 3, 4]  # the first step is not timed
    assert plain["seconds"] == [2]
    assert published["seconds"] == []
    lines = benchmark.report_markdown(results).splitlines()
    (line,) = (line for line in lines if line.startswith("| small | 2048 | ours |"))
    assert "| 683 | 3 (2 to 4) | 1 | 1024 | 2.00 |" in line
    (line,) = (line for line in lines if line.startswith("| small | 2048 | plain | 1024 |"))
    assert line.endswith("| out of memory |")
    (line,) = (line for line in lines if line.startswith("| small | 2048 | published |  |  |  |"))
    assert line.endswith("| over the time limit of 1 s |")


def test_goals_are_judged_by_what_was_measured(benchmark, results):
    results["steps"].append(results["steps"][0] | {"case": "ours_linear_outputs"})
    results["steps"][2].update(loaded_bytes=2**30, peak_bytes=4 * 2**30, seconds=[3.0])
    lines = benchmark.goal_table(results["steps"], {})
    assert lines[2].endswith("| ≥ 1.2 | 1.00 | **not met** |")
    assert lines[4].endswith("| ≤ 0.6 | 0.33 | met |")
    assert lines[7].endswith("| ≤ 4.4 |  | not measured |")


def test_a_step_of_the_7b_shape_costs_what_is_known_of_it(cases):
    tokens = 8192
    attention = cases.step_flops("7b", "ours_full", tokens) - cases.step_flops("7b", "ours", tokens)
    assert attention == pytest.approx(0.75 * 4.5 * 32 * 2 * tokens**2 * 4096)
    evaluated = cases.step_flops("7b", "perplexity", 2)
    assert evaluated / 2 == pytest.approx(2 * 6.6e9, rel=0.01)  # 2 operations a weight; the embeddings are only looked up


@pytest.fixture
def memory(benchmark):
    return importlib.import_module("memory")


def test_the_steps_that_are_traced_are_those_of_a_gpu(memory):
    dtypes = {form: traced_jobs.dtypes_of(memory.step_of("toy", 512, form, "bfloat16", "full")) for form in memory.FORMS}
    assert dtypes == {"float32": (torch.float32,) * 2, "current": (torch.bfloat16,) * 2, "offloaded": (torch.bfloat16,) * 2}
    assert traced_jobs.dtypes_of(memory.step_of("toy", 512, "current", "float16", "full")) == (torch.float32, torch.float16)


def test_the_script_of_memory_prints_a_row_for_each_form(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--steps", "toy/128", "--forms", "float32", "current"])
    memory.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy/128 |")]
    assert [row.split(" | ")[1] for row in rows] == ["float32, layers float32", "bfloat16, layers bfloat16"]


def test_the_script_of_memory_prints_the_longest_contexts(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--contexts", "7b/64"])
    monkeypatch.setattr(
        memory, "memory_at", lambda shape, rank, tokens, attention: Memory({"all": 2**30 + tokens * 2**20}, "", 0)
    )
    memory.main()
    assert "| 7b/64 | 11,264 | 15,360 | 23,552 | 39,936 | 80,896 |" in capsys.readouterr().out


def test_losses_by_the_types_of_the_base_begin_alike_and_stay_close(benchmark, monkeypatch, capsys, model_folder, corpus):
    options = [
        "--base",
        model_folder,
        "--data",
        corpus,
        "--tokens",
        "128",
        "--steps",
        "20",
        "--rank",
        "4",
        "--learning-rate",
        "0.01",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/precision.py", *options, "--held-out", "4", "--runs", "2", "3"])
    importlib.import_module("precision").main()
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if ", seed " in line]
    rows = [[cell for cell in row[1:] if cell.strip()] for row in printed]
    reference, bfloat16, float16, other_seed, *_ = rows[:6]
    assert reference[0] == other_seed[0]  # an adapter begins with nothing
    for distance, largest, difference in (map(float, row[-3:]) for row in (bfloat16, float16)):
        assert 0 < distance <= largest < 2e-2
        assert abs(difference) <= distance
    assert float(reference[1]) < float(reference[0])
    for base, in_float32, *_ in rows[6:]:  # of the held-out windows
        assert float(in_float32) < float(base)
    for _, _, difference, _, _ in (rows[7], rows[8], rows[10], rows[11]):
        mean, error = map(float, difference.split(" ± "))
        assert abs(mean) < 1e-2
        assert error > 0


def test_held_out_windows_are_the_last_whole_ones_and_none_is_trained_on(benchmark, tmp_path):
    precision = importlib.import_module("precision")
    numpy.arange(10 * 16 + 5, dtype="uint16").tofile(tmp_path / "tokens.bin")
    arguments = argparse.Namespace(data=str(tmp_path / "tokens.bin"), tokens=16, held_out=3)
    trained_on, held_out = precision.load_windows(arguments)
    assert sorted(window[0].item() for window in trained_on) == list(range(0, 7 * 16, 16))
    assert [window.tolist() for window in held_out] == [list(range(start, start + 16)) for start in range(7 * 16, 160, 16)]


def test_the_paper_s_sets_at_a_thousandth_are_what_the_workflow_reads_with_what_is_planted(
    root, benchmark, tmp_path, monkeypatch
):
    full_size, data, scratch = importlib.import_module("full_size"), tmp_path / "data", tmp_path / "scratch"
    monkeypatch.setattr(full_size, "VOCABULARY", 1000)
    for folder, name in {"books": "prose", "corpus": "corpus-0", "stories": "code"}.items():
        (data / folder).mkdir(parents=True)
        source = root / f"demo/texts/{name}.jsonl.xz"
        if folder == "corpus":
            shutil.copy(source, data / folder)
        else:
            texts = [document.text for document in read_documents(str(source))]
            (data / folder / "all.txt").write_text("\n".join(texts))
    full_size.make(data, scratch, 0.001)
    experiment = load_experiment(yaml.safe_load((scratch / "experiment.yaml").read_text()))
    assert (experiment.corpus.num_texts, experiment.sft.num_records) == (54, 39)
    planted = json.loads((scratch / "facts.json").read_text())
    shards = [path for source in experiment.corpus.sources for pattern in source.paths for path in find_files(pattern)]
    texts = {text_id(document.text): document.text for path in shards for document in read_documents(path)}
    assert len(texts) == planted["corpus"]["texts"]
    ngrams = EvaluationNgrams(str(scratch / "ngrams.parquet"), 1)
    assert {key for key, text in texts.items() if ngrams.overlaps(text)} == set(planted["corpus"]["contaminated"])
    for copy, original in planted["corpus"]["near"].items():
        shingles = [set(hash_ngrams(words_of(texts[key]), 5).tolist()) for key in (copy, original)]
        assert 0.85 < len(set.intersection(*shingles)) / len(set.union(*shingles)) < 1
    for source in experiment.sft.sources:
        conversations = list(read_conversations(source.paths[0], source.record_schema))
        assert len(conversations) == planted["instructions"]["records"][source.name]
        assert all(conversation.documents for conversation in conversations) == (source.name != "alpaca")
