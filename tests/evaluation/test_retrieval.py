import re

import numpy
import pytest
import torch
from conftest import evaluated_model, save_base
from transformers import MptConfig, MptForCausalLM

from longqlora.config.settings import RetrievalSettings
from longqlora.data.token_files import tokenize_documents
from longqlora.evaluation import retrieval
from longqlora.evaluation.evaluated_model import load_evaluated_model
from longqlora.evaluation.retrieval import answer, evaluate_retrieval, score_repetitions
from longqlora.evaluation.retrieval_tasks import NUM_CANDIDATES, PASSAGE_TOKENS, UNSCORED_TOKENS, Prompt, make_prompts
from longqlora.evaluation.token_losses import NonFiniteLogits

TASKS = ("passkey", "single_needle", "multi_key", "multi_value")


class Reader:
    """Replaces a model: it looks up in the prompt what the question at its end asks for."""

    def __init__(self, model, tokenizer, share: float = 1):
        self.model, self.tokenizer, self.share = model, tokenizer, share
        self.config, self.get_input_embeddings, self.batches = model.config, model.get_input_embeddings, []

    def continue_prompt(self, ids: list[int]) -> list[int]:
        text = self.tokenizer.decode(ids)
        if keys := re.findall(r"The pass key is (\d+)\.", text):
            found = keys
        else:
            words = re.findall(r"special magic numbers? for (\w+) mentioned", text)
            found = re.findall(rf"magic numbers for {words[-1]} is: (\d+)", text)
        return self.tokenizer(" " + ", ".join(found[: round(self.share * len(found))]), add_special_tokens=False)["input_ids"]

    def generate(self, ids, attention_mask, generation_config):
        assert attention_mask.shape == ids.shape
        self.batches.append(len(ids))
        rows = [self.continue_prompt(row) for row in ids.tolist()]
        longest = max(map(len, rows))
        assert longest <= generation_config.max_new_tokens
        filled = [row + [generation_config.pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([ids, torch.tensor(filled)], dim=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    return save_base(tmp_path_factory.mktemp("base") / "base", tokenizer, max_position_embeddings=800)


@pytest.fixture
def ask(base, corpus):
    def run(model=None, filler=corpus, length=600, **settings):
        usual = {"tasks": list(TASKS), "depths": [0.0, 1.0], "samples": 3, "seed": 1}
        return evaluate_retrieval(
            model=model or evaluated_model(base),
            tokenizer=base,
            filler=filler,
            length=length,
            settings=RetrievalSettings(**{**usual, **settings}),
            device="cpu",
        )

    return run


@pytest.fixture
def reading(monkeypatch, tokenizer):
    """Replace every model that is loaded by a Reader."""

    def replace(**options):
        def load(*given):
            return Reader(load_evaluated_model(*given), tokenizer, **options)

        monkeypatch.setattr(retrieval, "load_evaluated_model", load)

    return replace


def test_a_model_that_reads_the_prompt_finds_everything(ask, reading):
    reading()
    record = ask()
    assert [(cell["task"], cell["depth"]) for cell in record["cells"]] == [(task, depth) for task in TASKS for depth in (0, 1)]
    assert {cell["accuracy"] for cell in record["cells"]} == {record["accuracy"]} == {1.0}
    assert {cell["samples"] for cell in record["cells"]} == {3}


def test_an_answer_with_half_of_several_numbers_scores_one_half(ask, reading):
    reading(share=0.5)
    assert ask(tasks=["multi_value"])["accuracy"] == 0.5


def test_an_untrained_model_finds_next_to_nothing(ask):
    record = ask(tasks=["passkey", "multi_value"], samples=4, length=500)
    assert record["accuracy"] < 0.1
    assert record["accuracy"] == ask(tasks=["passkey", "multi_value"], samples=4, length=500)["accuracy"]


def test_a_record_says_how_it_was_measured(ask, base):
    record = ask(tasks=["induction"], length=64, samples=1, model=evaluated_model(base, precision="bfloat16"))
    stamp = {"precision": "bfloat16", "attention": "full", "model": base, "seed": 1, "is_within_context": True}
    assert stamp.items() <= record.items()
    assert ask(tasks=["induction"], length=900, samples=1, depths=[0.0])["is_within_context"] is False


def test_prompts_are_answered_in_batches_and_each_gets_its_own_score(model, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(retrieval, "TOKENS_PER_BATCH", 800)
    filler = numpy.fromfile(corpus, "<u2")
    prompts, budget = make_prompts("passkey", length=400, depth=0.5, samples=5, filler=filler, tokenizer=tokenizer, seed=1)
    prompts[3] = Prompt(prompts[3].ids, ["7"])  # which is not in it
    reader = Reader(model, tokenizer)
    assert answer(reader, tokenizer, prompts, budget) == [1, 1, 1, 0, 1]
    assert reader.batches == [2, 2, 1]


def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor(ids)[None], use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
def test_a_model_continues_greedily_with_the_configured_attention(base, tokenizer, attention, monkeypatch):
    """The answers are what the model says token by token."""
    model = load_evaluated_model(evaluated_model(base, attention=attention), "cpu", 64)
    texts = []
    monkeypatch.setattr(retrieval, "score_answer", lambda prompt, text: texts.append(text) or 0)
    prompts = [Prompt(numpy.random.default_rng(seed).integers(3, 512, 60).tolist(), ["1"]) for seed in range(3)]
    answer(model, tokenizer, prompts, 4)
    assert texts == [tokenizer.decode(greedy(model, prompt.ids, 4), skip_special_tokens=True) for prompt in prompts]


def losses_by_hand(model, text: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor(text)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
    return losses[UNSCORED_TOKENS - PASSAGE_TOKENS :].double().sum().item()


def test_a_passage_is_found_where_it_is_likelier_after_itself_than_after_any_other(model, monkeypatch):
    monkeypatch.setattr(retrieval, "TOKENS_PER_BATCH", 3 * 60)
    repetitions = numpy.random.default_rng(0).integers(3, 512, (12, NUM_CANDIDATES, 60))
    repetitions[:, :, -PASSAGE_TOKENS:] = repetitions[:, :1, -PASSAGE_TOKENS:]
    expected = []
    for candidates in repetitions.tolist():
        losses = [losses_by_hand(model, text) for text in candidates]
        expected.append(float(losses[0] < min(losses[1:])))
    assert score_repetitions(model, repetitions.tolist()) == expected
    assert 0 < sum(expected) < 12  # by chance


def test_a_model_that_does_not_see_the_passage_has_not_found_it(model):
    same = numpy.tile(numpy.random.default_rng(0).integers(3, 512, 60), (1, NUM_CANDIDATES, 1)).tolist()
    assert score_repetitions(model, same) == [0]


def test_a_loss_that_is_not_a_number_is_an_error_and_no_miss(model):
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    repetitions = numpy.random.default_rng(0).integers(3, 512, (1, NUM_CANDIDATES, 60)).tolist()
    with pytest.raises(NonFiniteLogits, match="the loss of a repeated passage is not a number"):
        score_repetitions(model, repetitions)


def test_a_model_without_rotary_positions_can_be_asked(tmp_path, ask):
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=512)
    MptForCausalLM(config).save_pretrained(tmp_path / "mpt")
    model = evaluated_model(tmp_path / "mpt")
    assert 0 <= ask(model=model, tasks=["induction"], length=64)["accuracy"] <= 1


def test_a_length_that_is_too_short_is_refused_before_the_model_is_loaded(ask, monkeypatch):
    monkeypatch.setattr(retrieval, "load_evaluated_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="64 tokens are too short for the task passkey"):
        ask(length=64)


def test_filler_shorter_than_a_prompt_will_do(ask, reading, tmp_path, tokenizer):
    reading()
    tokenize_documents(["A short text of a few words."], tokenizer, str(tmp_path / "short.bin"))
    assert ask(filler=str(tmp_path / "short.bin"), tasks=["single_needle"])["accuracy"] == 1


def test_a_filler_with_more_tokens_than_the_model_has_is_told_before_weights_are_loaded(ask, tmp_path, tokenizer):
    small = save_base(tmp_path / "small", tokenizer, vocab_size=300)
    (tmp_path / "small/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"corpus\.bin: holds token id \d+, but the vocabulary of .*small ends at 299"):
        ask(model=evaluated_model(small))
