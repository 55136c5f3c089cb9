import pytest
from conftest import CHATML, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longqlora.data.chat_template import (
    CHAT_TEMPLATE,
    VICUNA_SYSTEM,
    count_conversation_tokens,
    end_of_answer,
    plain_template,
    tokenize_conversation,
    tokenize_conversations,
    tokenize_question,
    with_chat_template,
)
from longqlora.data.instruction_schemas import Conversation
from longqlora.data.token_files import encode, tokenize_documents


def with_or_without_bos(tokenizer, has_bos: bool):
    """A tokenizer with the same vocabulary and the chat template; the session's tokenizer is left without."""
    names = ("unk_token", "eos_token", "pad_token", *["bos_token"] * has_bos)
    special = {name: str(getattr(tokenizer, name)) for name in names}
    return with_chat_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special))


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "</s>" not in text and "<s>" not in text and "<unk>" not in text
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, system=st.just("") | TEXT, has_bos=st.booleans())
def test_exactly_the_answers_and_their_ends_are_learned(tokenizer, turns, system, has_bos):
    chat = with_or_without_bos(tokenizer, has_bos)
    tokens, labels = tokenize_conversation(chat, Conversation(turns, system=system).messages())
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == "".join(f" {answer}</s>" for _, answer in turns)
    assert learned.count(tokenizer.eos_token_id) == len(turns)
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    said = "".join(f" USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    assert tokenizer.decode(tokens) == ("<s>" if has_bos else "") + (system or VICUNA_SYSTEM) + said
    assert (tokens[0] == tokenizer.bos_token_id) == has_bos


@settings(max_examples=50, deadline=None)
@given(turns=TURNS, data=st.data())
def test_an_answer_that_is_only_context_is_not_learned(tokenizer, turns, data):
    not_learned = data.draw(st.frozensets(st.integers(0, len(turns) - 1)))
    chat = with_or_without_bos(tokenizer, True)
    tokens, labels = tokenize_conversation(chat, Conversation(turns, not_learned=not_learned).messages())
    assert tokens == tokenize_conversation(chat, Conversation(turns).messages())[0]
    answers = [f" {answer}</s>" for number, (_, answer) in enumerate(turns) if number not in not_learned]
    assert tokenizer.decode([label for label in labels if label != -100]) == "".join(answers)


@settings(max_examples=50, deadline=None)
@given(conversations=st.lists(TURNS, max_size=4), spelled_out=st.sampled_from(["", "</s>", "<s>"]))
def test_conversations_are_encoded_and_counted_together_as_each_alone(tokenizer, conversations, spelled_out):
    chat = with_or_without_bos(tokenizer, True)
    messages = [
        Conversation([(question + spelled_out, answer) for question, answer in turns]).messages() for turns in conversations
    ]
    alone = [tokenize_conversation(chat, each) for each in messages]
    assert tokenize_conversations(chat, messages) == alone
    assert count_conversation_tokens(chat, messages) == [len(ids) for ids, _ in alone]


def test_a_template_that_marks_answers_as_one_cannot_leave_one_out(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    chat.chat_template = "{% generation %}{% for message in messages %}{{ message['content'] }}{% endfor %}{% endgeneration %}"
    conversation = Conversation([("?", "!"), ("And?", "So.")], not_learned=frozenset({0}))
    with pytest.raises(ValueError, match="the chat template marks 1 answers of 2"):
        tokenize_conversation(chat, conversation.messages())


def test_the_end_token_is_learned_by_a_tokenizer_that_has_encoded_a_corpus(tmp_path, tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    tokenize_documents(["It spells </s> out."], chat, str(tmp_path / "x.bin"))  # there, special tokens are text
    _, labels = tokenize_conversation(chat, Conversation([("?", "!")]).messages())
    assert labels[-1] == tokenizer.eos_token_id


def test_a_template_that_marks_no_answers_is_replaced(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    assert chat.chat_template == CHAT_TEMPLATE
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert with_chat_template(chat).chat_template == CHAT_TEMPLATE
    own = "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
    chat.chat_template = own
    assert with_chat_template(chat).chat_template == own


# --- special tokens that a message spells out ------------------------------------------------------------------------------


METASPACE = pre_tokenizers.Metaspace
PRE_TOKENIZERS = {
    "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),  # Llama 3, Qwen
    "space before the first": METASPACE(prepend_scheme="first"),
    "space before each": METASPACE(prepend_scheme="always"),
}


@pytest.fixture(scope="module")
def tokenizers(texts) -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers of every kind that LLaMA models have, with Vicuna's template or another."""

    def train(pre_tokenizer, normalizer=None, template=CHAT_TEMPLATE, **flags):
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizer
        special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
        backend.train_from_iterator(texts[:3], trainer)
        if normalizer:
            backend.normalizer, backend.pre_tokenizer = normalizer, None
        backend.add_special_tokens([AddedToken(token, **flags) for token in special])
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)

    legacy = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # the first LLaMA
    made = {name: train(pre_tokenizer) for name, pre_tokenizer in PRE_TOKENIZERS.items()}
    return made | {
        "the demo's": with_chat_template(AutoTokenizer.from_pretrained(ROOT / "demo/model")),
        "a normalizer": train(METASPACE(), legacy),
        "stripped whitespace": train(METASPACE(), lstrip=True, rstrip=True),
        "another template": train(PRE_TOKENIZERS["byte level"], template=CHATML),
    }


KINDS = [*PRE_TOKENIZERS, "the demo's", "a normalizer", "stripped whitespace", "another template"]
PLAIN = st.lists(st.sampled_from(["a", " ", "\n", "rome ", "naïve", "雪が", "</", "s>", "<|", ". "]), max_size=9).map("".join)
SPELLED = st.lists(st.sampled_from([" a", " ", "b", "</s>", "<s>", "<|im_end|>", "\U000f0001"]), max_size=9).map("".join)


def conversations(text):
    """Messages with these texts."""
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)
    return st.builds(lambda turns, system: Conversation(turns, system=system).messages(), turns, st.just("") | text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(messages=conversations(PLAIN), ends_with_a_question=st.booleans())
def test_other_conversations_have_the_ids_that_transformers_gives_them(tokenizers, kind, messages, ends_with_a_question):
    chat = tokenizers[kind]
    if any("</s>" in message["content"] for message in messages):
        return
    messages = messages[: len(messages) - ends_with_a_question]
    found = tokenize_conversation(chat, messages, add_generation_prompt=ends_with_a_question)
    expected = chat.apply_chat_template(
        messages, add_generation_prompt=ends_with_a_question, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, masks = expected["input_ids"], expected["assistant_masks"]
    assert found == (ids, [token if mask else -100 for token, mask in zip(ids, masks, strict=True)])


def control_ids(chat, ids: list[int]) -> list[int]:
    special = {id_ for id_, token in chat.added_tokens_decoder.items() if token.special and token.content != "<unk>"}
    return [token for token in ids if token in special]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(messages=conversations(SPELLED))
def test_special_tokens_in_a_message_are_text(tokenizers, kind, messages):
    chat = tokenizers[kind]
    ids, labels = tokenize_conversation(chat, messages)
    harmless = [message | {"content": "a"} for message in messages]
    expected = tuple(control_ids(chat, part) for part in tokenize_conversation(chat, harmless))
    assert (control_ids(chat, ids), control_ids(chat, labels)) == expected  # those of the template alone
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_an_answer_with_the_end_token_is_learned_as_the_text_that_it_is(tokenizers):
    chat = tokenizers["the demo's"]
    answer = "Close it with </s> and <s>start</s> again."
    ids, labels = tokenize_conversation(chat, Conversation([("What is <s>?", answer)], system="No </s>.").messages())
    (expected,) = encode(chat, [f" {answer}"])
    assert [label for label in labels if label != -100] == [*expected, chat.eos_token_id]
    (expected,) = encode(chat, [f"No </s>. USER: What is <s>? ASSISTANT: {answer}"])
    assert ids == [chat.bos_token_id, *expected, chat.eos_token_id]


def test_of_two_answers_in_a_row_one_can_be_context(tokenizers):
    chat = tokenizers["the demo's"]
    answers = [{"role": "assistant", "content": "An </s>.", "learned": False}, {"role": "assistant", "content": "A <s>."}]
    _, labels = tokenize_conversation(chat, [{"role": "user", "content": "?"}, *answers])
    (expected,) = encode(chat, [" A <s>."])
    assert [label for label in labels if label != -100] == [*expected, chat.eos_token_id]


def test_the_template_ends_answers_where_the_tokenizer_overlooks_the_end_token(texts):
    """The first LLaMA: its special tokens are searched for in normalized text, as ``▁</s>``."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = METASPACE()
    backend.train_from_iterator(texts[:1], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(token, normalized=True) for token in ("<unk>", "<s>", "</s>")])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    chat = with_chat_template(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    ids, labels = tokenize_conversation(chat, Conversation([("a", "b"), ("c", "d")]).messages())
    assert (ids[0], labels[-1], labels.count(2)) == (1, 2, 2)


# --- the published template ------------------------------------------------------------------------------------------------

OWN = (
    "{%- for message in messages %}\n"
    "    {%- if message['role'] == 'assistant' %}\n"
    "        <|im_start|>assistant\n  {%- generation -%}\n  {{ message['content'] + '<|im_end|>' }}  \n\n{%- endgeneration %}\n"
    "    {%- else %} \n {{ '<|im_start|>user' + message['content'] }}\n{%- endif %}\n"
    "{%- endfor %}\n  {%- if add_generation_prompt %}<|im_start|>assistant{% endif %}\n"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, OWN, OWN.replace("-", ""), OWN.replace("%}\n", "%}")])
@pytest.mark.parametrize("ends_with_a_question", [False, True])
def test_the_published_template_is_standard_jinja_and_writes_the_same(tokenizer, template, ends_with_a_question):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, **names)
    messages = Conversation([("Is <s> so?", " Yes.\n"), ("?", "!")]).messages()[: 4 - ends_with_a_question]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # those of transformers
    published = environment.from_string(plain_template(template))
    written = published.render(messages=messages, add_generation_prompt=ends_with_a_question, **names)
    assert written == chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=ends_with_a_question)


def test_training_continues_with_a_published_template(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    for template in (CHAT_TEMPLATE, CHATML, OWN):
        chat.chat_template = plain_template(template)
        ids = tokenize_conversation(with_chat_template(chat), Conversation([("?", "!")]).messages())
        chat.chat_template = template
        assert tokenize_conversation(with_chat_template(chat), Conversation([("?", "!")]).messages()) == ids
        assert any(label != -100 for label in ids[1])


def test_templates_by_name_are_told_by_the_default_one(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    chat.chat_template = {"default": CHATML, "tools": "{{ tools }}"}
    assert with_chat_template(chat).chat_template == CHATML


@settings(max_examples=50, deadline=None)
@given(turns=TURNS)
def test_what_a_model_answers_to_is_what_its_training_had_before_the_answer(tokenizer, turns):
    chat = with_or_without_bos(tokenizer, True)
    messages = Conversation(turns).messages()
    ids, labels = tokenize_conversation(chat, messages)
    prompt, _ = tokenize_conversation(chat, messages[:-1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode([label for label in labels[len(prompt) :] if label != -100]) == f" {turns[-1][1]}</s>"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "</s>"),
        (CHATML, "<|im_end|>"),
        (CHATML.replace("+ '<|im_end|>' }}{% endg", "}}{% endg").replace("{{ '\n' }}", "{{ '<|im_end|>\n' }}"), "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "###"), None),
        ("{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}", None),  # marks no answers
        ({"default": CHATML}, None),
    ],
)
def test_the_end_of_an_answer_is_the_token_that_the_template_writes_after_it(tokenizers, template, end):
    chat = tokenizers["another template"]
    other = PreTrainedTokenizerFast(tokenizer_object=chat.backend_tokenizer, eos_token="</s>", chat_template=template)
    assert end_of_answer(other) == (chat.convert_tokens_to_ids(end) if end else None)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML])
def test_a_question_around_a_text_is_written_as_transformers_writes_it(tokenizer, template):
    chat = with_or_without_bos(tokenizer, True)
    chat.chat_template = template
    before, after = tokenize_question(chat, "Read </s> this:\n", "\nWhat is it?", "It is")
    messages = [
        {"role": "user", "content": "Read </s> this:\nTEXT\nWhat is it?"}, {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    expected = chat.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert f"{chat.decode(before)}TEXT{chat.decode(after)}" == expected
    assert chat.eos_token_id not in before  # it is part of the question


def test_a_template_that_leaves_out_the_answer_is_refused(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    chat.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"does not write a question and the begin of its answer; retrieval\.chat_template"):
        tokenize_question(chat, "Read this: ", " What is it?", "It is")
