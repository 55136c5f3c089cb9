"""Tasks of lm-evaluation-harness with data of this test, against plain transformers.

The tests are not unit tests, because the harness starts processes to describe its environment.
"""

import importlib.util
import json
import math

import numpy
import pytest
import torch
from conftest import evaluated_model, save_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from longqlora.config.settings import EvaluatedModel, HarnessSection, HarnessSettings, RopeExtension
from longqlora.evaluation.evaluated_model import load_evaluated_model
from longqlora.evaluation.harness_tasks import task_problems

needs_harness = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval (the extra harness)")

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""
CONTINUED = """
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answers.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
LONG = """
task: long
dataset_path: ""
custom_dataset: !function long_texts.make
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
process_results: !function long_texts.score
generation_kwargs: {until: ["</s>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: "4096", aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
LONG_TEXTS = """
import datasets
from transformers import AutoTokenizer

def make(tokenizer, max_seq_lengths, **_):
    encode, decode = AutoTokenizer.from_pretrained(tokenizer).encode, AutoTokenizer.from_pretrained(tokenizer).decode
    ids = encode("a text that is as long as it has to be " * 50, add_special_tokens=False)
    texts = [decode(ids[:length - 4 - number]) for length in max_seq_lengths for number in range(4)]
    return {"test": datasets.Dataset.from_list([{"text": text, "number": n} for n, text in enumerate(texts)])}

def score(document, answers):
    return {"4096": -1.0, "96": document["number"] / 4}  # as RULER: -1 for a length that the document does not have
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = numpy.random.default_rng(0)
    words = ["sampling", "tokens", "model", "adapter", "window", "training", "perplexity", "attention", "scaling", "rope"]
    with open(folder / "choices.jsonl", "w") as file:
        for _ in range(40):
            *text, one, other, third = rng.permutation(words).tolist()
            document = {"text": " ".join(text), "choices": [one, f"{other} {third}", third], "label": int(rng.integers(3))}
            file.write(json.dumps(document) + "\n")
    for name, text in {"choices": CHOICES, "continued": CONTINUED, "long": LONG}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    (folder / "long_texts.py").write_text(LONG_TEXTS)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    return save_base(tmp_path_factory.mktemp("base") / "base", tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def measure(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(task: str, model: EvaluatedModel, length: int | None = None, **settings) -> dict:
        from longqlora.evaluation.harness import evaluate_harness  # imports lm_eval

        usual = {"num_fewshot": None, "limit": None, "chat_template": False, "batch_size": 3, "include_path": str(folder)}
        return evaluate_harness(
            model=model,
            tokenizer=model.path,
            is_trained_to_answer=False,
            task=task,
            length=length,
            settings=HarnessSettings(**{**usual, **settings}),
            device="cpu",
        )

    return run


def documents(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]


def likeliest(model, tokenizer, text: str, choices: list[str]) -> int:
    """The choice with the largest sum of log-probabilities."""
    sums = []
    for choice in choices:
        context, whole = tokenizer.encode(text), tokenizer.encode(f"{text} {choice}")
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole))))
    return int(numpy.argmax(sums))


@needs_harness
@pytest.mark.process
@pytest.mark.parametrize("changes", [{}, {"extension": RopeExtension(target_context=512)}, {"adapter": True}])
def test_the_accuracy_of_a_task_is_that_of_plain_transformers(measure, base, adapter, folder, tokenizer, changes):
    model = evaluated_model(base, **{key: adapter if key == "adapter" else value for key, value in changes.items()})
    result = measure("choices", model)
    plain = load_evaluated_model(model, "cpu", 512)
    right = [float(likeliest(plain, tokenizer, one["text"], one["choices"]) == one["label"]) for one in documents(folder)]
    (accuracy,) = result["results"]
    assert accuracy["scores"] == right
    assert accuracy["value"] == pytest.approx(sum(right) / 40)
    assert 0 < sum(right) < 40  # otherwise it would say little
    assert accuracy["standard_error"] == pytest.approx(numpy.std(right, ddof=1) / math.sqrt(40))
    assert (accuracy["task"], accuracy["metric"], accuracy["task_version"], accuracy["num_fewshot"]) == ("choices", "acc", 3, 0)
    assert (accuracy["num_documents"], accuracy["num_truncated"], accuracy["higher_is_better"]) == (40, 0, True)
    assert result["max_length"] == (512 if "extension" in changes else 64)


@needs_harness
@pytest.mark.process
def test_generated_answers_are_those_of_plain_transformers(measure, base, folder, tokenizer):
    plain, right = load_evaluated_model(evaluated_model(base), "cpu", 64), []
    with open(folder / "answers.jsonl", "w") as file:
        for number, one in enumerate(documents(folder)):
            ids = torch.tensor([tokenizer.encode(one["text"])])
            new = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            answer = tokenizer.decode(new, skip_special_tokens=True) if number % 4 else "another answer"
            file.write(json.dumps({"text": one["text"], "answer": answer}) + "\n")
            right.append(float(number % 4 > 0))
    (match,) = measure("continued", evaluated_model(base), limit=30)["results"]
    assert (match["metric"], match["scores"]) == ("exact_match", right[:30])


@needs_harness
@pytest.mark.process
def test_a_long_task_gets_its_length_and_tells_which_prompts_do_not_fit(measure, base):
    inside = measure("long", evaluated_model(base, extension=RopeExtension(target_context=96)), 96)
    (score,) = inside["results"]  # none for the other length
    assert (score["metric"], score["eval_length"], score["value"], score["scores"]) == (
        "score",
        96,
        0.375,
        [0, 0.25, 0.5, 0.75],
    )
    assert score["standard_error"] == pytest.approx(numpy.std(score["scores"], ddof=1) / 2)  # the harness has none for RULER
    assert score["num_truncated"] == 0
    (score,) = measure("long", evaluated_model(base), 96)["results"]
    assert score["num_truncated"] == 4


@needs_harness
@pytest.mark.process
@pytest.mark.parametrize("has_template", [True, False])
def test_a_chat_template_is_used_where_there_is_one(measure, tmp_path, tokenizer, has_template):
    path = save_base(tmp_path / "chat", tokenizer)
    if has_template:
        (tmp_path / "chat/chat_template.jinja").write_text("{% for each in messages %}Q {{ each['content'] }} A {% endfor %}")
    assert measure("choices", evaluated_model(path), chat_template=True, limit=2)["chat_template"] == has_template


@needs_harness
def test_unknown_tasks_are_named(folder):
    harness = HarnessSection(tasks=["choices", "arc_esy"], long_tasks=["long", "continued"], include_path=str(folder))
    assert list(task_problems(harness)) == [
        "evaluation.harness.tasks: lm-evaluation-harness has no task 'arc_esy'; did you mean arc_easy? (all: lm-eval ls tasks)",
        "evaluation.harness.long_tasks: 'continued' makes no texts of a given length; move it to tasks",
    ]


def test_a_harness_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("longqlora.evaluation.harness_tasks.find_spec", lambda name: None)
    (problem,) = task_problems(HarnessSection(tasks=["arc_easy"]))
    assert problem.startswith("evaluation.harness: needs lm-evaluation-harness, which is not installed: pip install")
