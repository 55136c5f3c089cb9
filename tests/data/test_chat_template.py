import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from longqlora.data.chat_template import CHAT_TEMPLATE, VICUNA_SYSTEM, tokenize_conversation, with_chat_template
from longqlora.data.instruction_schemas import Conversation
from longqlora.data.token_files import tokenize_documents


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
