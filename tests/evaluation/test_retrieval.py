import re

import numpy
import pytest
import torch
from conftest import CHATML, evaluated_model, save_base
from transformers import AutoTokenizer, GenerationConfig, MptConfig, MptForCausalLM

from longqlora.config.settings import RetrievalSettings
from longqlora.data.chat_template import VICUNA_SYSTEM
from longqlora.data.token_files import tokenize_documents
from longqlora.evaluation import retrieval
from longqlora.evaluation.evaluated_model import load_evaluated_model
from longqlora.evaluation.retrieval import answer, evaluate_retrieval, measure_cell, score_repetitions
from longqlora.evaluation.retrieval_tasks import NUM_CANDIDATES, PASSAGE_TOKENS, UNSCORED_TOKENS, Prompt, make_prompts
from longqlora.evaluation.token_losses import NonFiniteLogits

TASKS = ("passkey", "single_needle", "multi_key", "multi_value")


class Reader:
    """Replaces a model: it looks up in the prompt what the question at its end asks for."""

    def __init__(self, model, tokenizer, share: float = 1):
        self.model, self.tokenizer, self.share = model, tokenizer, share
        self.config, self.get_input_embeddings, self.batches = model.config, model.get_input_embeddings, []
        self.prompts: list[list[int]] = []
        self.stop: list[int] = []

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
        self.prompts += ids.tolist()
        self.stop = generation_config.eos_token_id
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
    def run(model=None, filler=corpus, length=600, tokenizer=base, untrained=base, is_trained_to_answer=False, **settings):
        usual = {"tasks": list(TASKS), "depths": [0.0, 1.0], "samples": 3, "seed": 1}
        return evaluate_retrieval(
            model=model or evaluated_model(base),
            untrained=untrained,
            tokenizer=tokenizer,
            is_trained_to_answer=is_trained_to_answer,
            filler=filler,
            length=length,
            settings=RetrievalSettings(**{**usual, **settings}),
            device="cpu",
        )

    return run


@pytest.fixture
def reading(monkeypatch, tokenizer):
    """Replace every model that is loaded by a Reader; the list of them."""

    def replace(**options) -> list[Reader]:
        readers: list[Reader] = []

        def load(*given):
            readers.append(Reader(load_evaluated_model(*given), tokenizer, **options))
            return readers[-1]

        monkeypatch.setattr(retrieval, "load_evaluated_model", load)
        return readers

    return replace


def test_a_model_that_reads_the_prompt_finds_everything(ask, reading):
    reading()
    record = ask()
    assert [(cell["task"], cell["depth"]) for cell in record["cells"]] == [(task, depth) for task in TASKS for depth in (0, 1)]
    assert {cell["accuracy"] for cell in record["cells"]} == {record["accuracy"]} == {1.0}
    assert {cell["samples"] for cell in record["cells"]} == {3}


@pytest.fixture
def chat_tokenizer(base, tmp_path):
    """The tokenizer of a chat model, whose turns end with another token than texts."""
    chat = AutoTokenizer.from_pretrained(base)
    chat.chat_template = CHATML
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.save_pretrained(tmp_path / "chat")
    return chat


def test_a_chat_model_is_asked_in_its_chat_template(ask, reading, chat_tokenizer, corpus, tmp_path):
    readers = reading()
    record = ask(tasks=["passkey"], depths=[1.0], tokenizer=str(tmp_path / "chat"))
    assert (record["chat_template"], record["accuracy"]) == (True, 1)
    end = chat_tokenizer.eos_token_id
    assert end in numpy.fromfile(corpus, "<u2")
    start, turn_end = chat_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for ids in readers[0].prompts:
        text = chat_tokenizer.decode(ids)
        assert text.startswith("<|im_start|>user\nThere is an important info hidden")
        assert text.endswith("\nWhat is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is")
        assert [token for token in ids if token in (start, turn_end, end)] == [start, turn_end, start]
        assert len(ids) == len(readers[0].prompts[0]) < 600
    plain = ask(tasks=["passkey"], depths=[1.0], tokenizer=str(tmp_path / "chat"), chat_template=False)
    assert (plain["chat_template"], plain["accuracy"]) == (False, 1)
    assert chat_tokenizer.decode(readers[1].prompts[0]).endswith("What is the pass key? The pass key is")
    assert len(readers[1].prompts[0]) == len(readers[0].prompts[0])


def test_a_model_that_is_trained_to_answer_is_asked_in_the_template_of_its_training(ask, reading, base):
    readers = reading()
    assert ask(tasks=["multi_value"], is_trained_to_answer=True)["chat_template"] is True
    text = AutoTokenizer.from_pretrained(base).decode(readers[0].prompts[0])
    assert text.startswith(f"<s>{VICUNA_SYSTEM} USER: Some special magic numbers are hidden")
    assert re.search(r"mentioned in the provided text\? ASSISTANT: The special magic numbers for \w+ mentioned .* are$", text)
    assert ask(tasks=["multi_value"])["chat_template"] is False  # the base has no template


def test_induction_asks_nothing_and_so_needs_no_template(ask):
    record = ask(tasks=["induction"], length=64, samples=1, depths=[0.0], is_trained_to_answer=True)
    assert record["chat_template"] is False
    assert "answers" not in record["cells"][0]


def test_answers_end_where_the_model_does(ask, reading, chat_tokenizer, base, tmp_path):
    readers = reading()
    model = save_base(tmp_path / "model", chat_tokenizer, vocab_size=len(chat_tokenizer))
    ends = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(model)
    ask(model=evaluated_model(model), untrained=model, tokenizer=model, tasks=["passkey"])
    assert sorted(readers[0].stop) == sorted(ends)


def test_the_penalties_of_a_model_for_repeating_do_not_count(ask, base, tmp_path, tokenizer):
    model = save_base(tmp_path / "model", tokenizer, max_position_embeddings=800)
    free = ask(model=evaluated_model(model), tasks=["passkey"])
    GenerationConfig(repetition_penalty=50.0).save_pretrained(model)
    assert ask(model=evaluated_model(model), tasks=["passkey"])["cells"] == free["cells"]


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
    filler = numpy.fromfile(corpus, "<u2")
    questions = make_prompts("passkey", length=400, depth=0.5, samples=5, filler=filler, tokenizer=tokenizer, seed=1)
    questions[0][3] = Prompt(questions[0][3].ids, ["7"])  # which is not in it
    reader = Reader(model, tokenizer)
    config = model.config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a token
    monkeypatch.setattr(retrieval, "CACHE_BYTES", 2.5 * 400 * 4 * keys_and_values)
    cell = measure_cell(reader, tokenizer, "passkey", questions, [tokenizer.eos_token_id])
    assert [one["score"] for one in cell["answers"]] == [1, 1, 1, 0, 1]
    assert [one["expected"] for one in cell["answers"]] == [prompt.answers for prompt in questions[0]]
    assert [one["answer"] for one in cell["answers"]][:3] == [prompt.answers[0] for prompt in questions[0][:3]]
    assert (cell["accuracy"], cell["samples"]) == (0.8, 5)
    assert reader.batches == [2, 2, 1]


def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor(ids)[None], use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
def test_a_model_continues_greedily_with_the_configured_attention(base, tokenizer, attention):
    """The answers are what the model says token by token."""
    model = load_evaluated_model(evaluated_model(base, attention=attention), "cpu", 64)
    prompts = [Prompt(numpy.random.default_rng(seed).integers(3, 512, 60).tolist(), ["1"]) for seed in range(3)]
    texts = answer(model, tokenizer, prompts, 4, [tokenizer.eos_token_id])
    assert texts == [tokenizer.decode(greedy(model, prompt.ids, 4), skip_special_tokens=True) for prompt in prompts]


def test_a_prompt_is_read_once_and_only_its_last_position_has_logits(model, tokenizer):
    read, scored = [], []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda _, args: scored.append(args[0].shape[1]))
    answer(model, tokenizer, [Prompt(list(range(3, 63)), ["1"])] * 2, 4, [512])
    assert read == [60, 1, 1, 1]
    assert scored == [1, 1, 1, 1]


def test_an_answer_ends_at_any_of_the_stop_tokens(model, tokenizer):
    ids = list(range(3, 63))
    said = greedy(model, ids, 4)
    texts = answer(model, tokenizer, [Prompt(ids, ["1"])], 4, [511, said[1]])
    assert texts == [tokenizer.decode(said[: said.index(said[1]) + 1], skip_special_tokens=True)]


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
