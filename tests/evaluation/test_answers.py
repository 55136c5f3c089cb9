import numpy
import pytest
import torch
from conftest import evaluated_model, save_base, tiny_llama
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from longqlora.config.settings import RopeExtension
from longqlora.data.chat_template import tokenize_conversation, with_chat_template
from longqlora.data.instruction_set import RECORDS
from longqlora.data.readers import write_parquet
from longqlora.evaluation import answers, token_losses
from longqlora.evaluation.answers import answer, evaluate_answers, nll_of_answers
from longqlora.evaluation.token_losses import NonFiniteLogits
from longqlora.modeling.loading import load_model
from longqlora.training.pretraining import train_tokenizer

TO_512 = RopeExtension(target_context=512)


def record(number: int, turns: int = 1) -> dict:
    roles = [(role, f"{role} {number}-{turn}" * (1 + number)) for turn in range(turns) for role in ("user", "assistant")]
    messages = [{"role": role, "content": text} for role, text in roles]
    return {"source": f"source {number}", "id": str(number), "num_tokens": 9, "shortened": False, "messages": messages}


@pytest.fixture
def chat(tokenizer):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return with_chat_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens))


def reference_loss(model, ids: list[int], labels: list[int]) -> float:
    """transformers' own loss: the mean over the tokens with a label."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 8192])
def test_the_loss_on_the_answers_is_that_of_transformers_whatever_the_batches(model, chat, monkeypatch, tokens_per_batch):
    monkeypatch.setattr(token_losses, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(token_losses, "POSITIONS_PER_CHUNK", 16)
    conversations = [
        tokenize_conversation(chat, record(number, turns)["messages"]) for number, turns in enumerate([3, 1, 2, 1])
    ]
    losses = nll_of_answers(model, conversations)
    counts = [sum(label != -100 for label in labels) for _, labels in conversations]
    expected = [reference_loss(model, *conversation) for conversation in conversations]
    numpy.testing.assert_allclose(losses / counts, expected, rtol=1e-5)


def test_a_loss_that_is_not_a_number_names_the_conversation(model, chat):
    conversations = [tokenize_conversation(chat, record(number)["messages"]) for number in range(3)]
    ids, labels = conversations[1]
    model.get_input_embeddings().weight.data[511] = float("nan")
    conversations[1] = ([*ids[:-1], 511, ids[-1]], [*labels[:-1], 511, labels[-1]])
    with pytest.raises(NonFiniteLogits, match="held-out conversation 1 of 3: the loss is not a number"):
        nll_of_answers(model, conversations)


@pytest.fixture
def evaluate(tmp_path, tokenizer, monkeypatch):
    """Evaluate the answers of ten records, with a base of 64 tokens and other weights at eight times that context."""
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    base = save_base(tmp_path / "base", tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    trained = save_base(tmp_path / "trained", tokenizer, max_position_embeddings=512, initializer_range=0.05)
    records = str(tmp_path / "sft.parquet")
    write_parquet(records, RECORDS, [record(number, 1 + number % 2) for number in range(10)])

    def run(held_out: int, **changes) -> dict:
        models = {"untrained": evaluated_model(base, extension=TO_512), "trained": evaluated_model(trained)}
        given = models | {"base_model": base, "tokenizer": base}
        return evaluate_answers(**(given | changes), records=records, held_out=held_out, device="cpu")

    return run


@pytest.mark.parametrize("held_out", [1, 7, 20])
def test_the_last_records_are_measured_and_the_first_of_them_answered(evaluate, held_out):
    result = evaluate(held_out)
    expected = [record(number, 1 + number % 2) for number in range(10)][10 - min(held_out, 10) :]
    assert [row["id"] for row in result["conversations"]] == [row["id"] for row in expected]
    samples, expected = result["samples"], expected[: answers.NUM_SAMPLES]
    assert [row["source"] for row in samples] == [row["source"] for row in expected]
    assert [row["messages"] for row in samples] == [row["messages"][:-1] for row in expected]
    assert [row["reference"] for row in samples] == [row["messages"][-1]["content"] for row in expected]
    assert all(isinstance(row["answer"], str) for row in samples)


def test_before_is_the_base_with_the_positions_of_the_trained_system(evaluate, tmp_path):
    result, device = evaluate(3), torch.device("cpu")
    chat = with_chat_template(AutoTokenizer.from_pretrained(tmp_path / "base"))
    models = {
        "nll_before": load_model(str(tmp_path / "base"), device=device, extension=TO_512).eval(),
        "nll_after": load_model(str(tmp_path / "trained"), device=device).eval(),
    }
    for row, number in zip(result["conversations"], (7, 8, 9), strict=True):
        ids, labels = tokenize_conversation(chat, record(number, 1 + number % 2)["messages"])
        assert row["num_tokens"] == sum(label != -100 for label in labels)
        for name, model in models.items():
            assert row[name] / row["num_tokens"] == pytest.approx(reference_loss(model, ids, labels), rel=1e-5)
    assert result["conversations"][0]["nll_before"] != pytest.approx(result["conversations"][0]["nll_after"], rel=1e-3)
    assert (result["precision"], result["model"]) == ("float32", str(tmp_path / "trained"))


def test_an_answer_ends_where_the_base_model_stops_whatever_was_trained_on_it_in_between(evaluate, tmp_path):
    first = evaluate(1)["samples"][0]["answer"]
    chat = AutoTokenizer.from_pretrained(tmp_path / "base")
    token = chat(first, add_special_tokens=False)["input_ids"][0]
    chat.add_tokens(chat.convert_ids_to_tokens(token), special_tokens=True)
    chat.save_pretrained(tmp_path / "chat")
    GenerationConfig(eos_token_id=[2, token]).save_pretrained(tmp_path / "original")
    models = {"base": str(tmp_path / "base"), "original": str(tmp_path / "original")}
    found = {
        name: evaluate(1, base_model=path, tokenizer=str(tmp_path / "chat"))["samples"][0] for name, path in models.items()
    }
    assert len(found["original"]["answer"]) < len(found["base"]["answer"])


def test_a_system_with_s2_attention_is_measured_and_answers(evaluate, tmp_path):
    sparse = evaluated_model(tmp_path / "base", extension=TO_512, attention="shifted_sparse", group_ratio=0.01)
    full, other = evaluate(2)["conversations"], evaluate(2, untrained=sparse, trained=sparse)
    assert len(other["samples"]) == 2
    for row, same in zip(other["conversations"], full, strict=True):
        assert row["nll_before"] == row["nll_after"] != pytest.approx(same["nll_before"], rel=1e-6)


def test_an_answer_is_the_most_likely_continuation_of_the_prompt(chat):
    model = tiny_llama(max_position_embeddings=512)
    model.generation_config.update(do_sample=True, temperature=5.0)  # the generation settings of the base are ignored
    messages = record(1)["messages"][:-1]
    first, again = (answer(model, chat, messages, [2]) for _ in range(2))
    assert first == again
    ids = chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    most_likely = model(ids).logits[0, -1].argmax()
    assert first.startswith(chat.decode(most_likely).strip())


def test_an_answer_ends_where_the_published_model_stops(chat):
    model = tiny_llama(max_position_embeddings=512)
    messages = record(1)["messages"][:-1]
    ids, _ = tokenize_conversation(chat, messages, add_generation_prompt=True)
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert answer(model, chat, messages, [2, first]) == chat.decode(first).strip()
    assert len(answer(model, chat, messages, [2])) > len(chat.decode(first))


def test_a_question_with_the_end_token_is_text(chat, monkeypatch):
    model, given = tiny_llama(max_position_embeddings=512), []
    monkeypatch.setattr(model, "generate", lambda ids, **_: given.append(ids[0].tolist()) or ids)
    answer(model, chat, [{"role": "user", "content": "What does </s> mean, and <s>?"}], [2])
    assert (given[0].count(1), given[0].count(2)) == (1, 0)


def test_the_tokenizer_that_was_trained_with_reads_the_conversations(evaluate, texts, tmp_path):
    expected = evaluate(3)["conversations"]
    for name in ("base", "trained"):  # whose own tokenizers are not looked at
        train_tokenizer(texts[:1], vocab_size=300).save_pretrained(tmp_path / name)
    found = evaluate(3, tokenizer=str(tmp_path / "tokenizer"))
    assert found["conversations"] == expected


def test_a_lack_of_memory_names_the_settings_that_take_less(evaluate, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(answers, "nll_of_answers", fail)
    with pytest.raises(MemoryError, match=r"conversations of up to \d+ tokens .* A smaller evaluation\.precision"):
        evaluate(2)


def test_answers_with_more_tokens_than_the_model_has_are_told_before_weights_are_loaded(evaluate, tmp_path, tokenizer):
    small = save_base(tmp_path / "small", tokenizer, vocab_size=300)
    (tmp_path / "small/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sft\.parquet: holds token id \d+, but the vocabulary of .*small ends at 299"):
        evaluate(2, trained=evaluated_model(small))
