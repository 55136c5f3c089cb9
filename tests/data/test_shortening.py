from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data import shortening
from longqlora.data.chat_template import with_chat_template
from longqlora.data.instruction_schemas import Conversation, about_document


@pytest.fixture(scope="module")
def chat(tokenizer):
    return with_chat_template(deepcopy(tokenizer))


def count_tokens(chat, conversation: Conversation) -> int:
    (number,) = shortening.count_tokens(chat, [conversation])
    return number


def shorten(conversation: Conversation, chat, max_tokens: int) -> tuple[Conversation, int] | None:
    (result,) = shortening.shorten_all([conversation], chat, max_tokens)
    return result


QUESTION, ANSWER = "What does it say?", "It says a lot."
WORDS = ["rome", "old", "founded", "def", "return", "naïve", "雪が", "12.5", "U.S", "x" * 20, "<s></s>"]
SENTENCES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join),
        st.sampled_from([". ", "! ", '?" ', ".\n", "。 ", "\n\n", "...) "]),
    ).map("".join),
    min_size=1,
    max_size=30,
)


def shortened_document(conversation: Conversation) -> str:
    """What is left of a document before the question; question and answer must be whole."""
    (question, answer), *_ = conversation.turns
    assert answer == ANSWER
    assert question.endswith(f"\n\n{QUESTION}")
    return question.removesuffix(f"\n\n{QUESTION}")


def sentence_spans(sentences: list[str]) -> dict[str, tuple[int, int]]:
    """All that may be left of a document: consecutive sentences as text, with the first number and the one after the last."""
    return {
        "".join(sentences[first:last]).strip(): (first, last)
        for first in range(len(sentences))
        for last in range(first + 1, len(sentences) + 1)
    }


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, share=st.floats(0, 1.1), others=st.booleans())
def test_a_shortened_document_is_whole_sentences_from_its_beginning(chat, sentences, share, others):
    turns = [(QUESTION, ANSWER), *[("And more?", "No.")] * others]
    conversation = about_document("".join(sentences), turns)
    least, most = count_tokens(chat, about_document("", turns)), count_tokens(chat, conversation)
    max_tokens = round(least + share * (most - least))
    result = shorten(conversation, chat, max_tokens)
    if most <= max_tokens:
        assert result == (conversation, most)
    elif result is None:  # not even the first sentence fits, give or take the tokens at the seam
        assert count_tokens(chat, about_document(sentences[0], turns)) >= max_tokens - 3
    else:
        used, num_tokens = result
        assert num_tokens == count_tokens(chat, used) <= max_tokens
        assert used.turns[1:] == turns[1:]
        beginnings = ["".join(sentences[:number]) for number in range(1, len(sentences) + 1)]
        number = [beginning.strip() for beginning in beginnings].index(shortened_document(used))
        assert count_tokens(chat, about_document(beginnings[number + 1], turns)) >= max_tokens - 3  # no more would fit


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, share=st.floats(0, 1), data=st.data())
def test_the_evidence_is_kept_wherever_the_document_is_cut(chat, sentences, share, data):
    place = data.draw(st.integers(0, len(sentences) - 1))
    parts = [*sentences[:place], "The answer is forty-two, they say. ", *sentences[place:]]
    document = "".join(parts)
    conversation = about_document(document, [(QUESTION, ANSWER)], evidence="forty-two")  # in the middle of its sentence
    least, most = count_tokens(chat, about_document("", [(QUESTION, ANSWER)])), count_tokens(chat, conversation)
    max_tokens = round(least + share * (most - least))
    result = shorten(conversation, chat, max_tokens)
    if result is None:
        assert count_tokens(chat, about_document(parts[place], [(QUESTION, ANSWER)])) >= max_tokens - 3
    else:
        left = shortened_document(result[0])
        assert "forty-two" in left
        assert left == document or left in sentence_spans(parts)
        assert result[1] == count_tokens(chat, result[0]) <= max_tokens


def test_the_beginning_is_kept_or_a_part_around_evidence_that_is_far_behind(chat):
    sentences = [f"This is the sentence of number {number}. " for number in range(100)]
    conversation = about_document("".join(sentences), [(QUESTION, ANSWER)])
    room = count_tokens(chat, about_document("".join(sentences[:20]), [(QUESTION, ANSWER)]))
    for evidence, numbers in {"": (0, 20), sentences[3].strip(): (0, 20), "sentence of number 50": (40, 60)}.items():
        used, num_tokens = shorten(replace(conversation, evidence=evidence), chat, room)
        first, last = sentence_spans(sentences)[shortened_document(used)]
        assert abs(first - numbers[0]) <= (2 if first else 0)
        assert abs(last - numbers[1]) <= 2
        assert num_tokens <= room
    end = about_document("".join(sentences), [(QUESTION, ANSWER)], evidence=sentences[-1].strip())
    assert shortened_document(shorten(end, chat, room)[0]).endswith("number 99.")


@pytest.mark.parametrize("num_sentences", [1, 12, 18])
def test_evidence_that_needs_most_of_the_tokens_is_kept_whole(chat, num_sentences):
    sentences = [f"This is the sentence of number {number}. " for number in range(100)]
    room = count_tokens(chat, about_document("".join(sentences[40:60]), [(QUESTION, ANSWER)]))
    evidence = "".join(sentences[50 : 50 + num_sentences]).strip()
    used, _ = shorten(about_document("".join(sentences), [(QUESTION, ANSWER)], evidence), chat, room)
    assert evidence in shortened_document(used)


def test_where_nothing_fits_there_is_no_record_and_never_a_cut_answer(chat):
    whole = Conversation([("Say much.", "Much is said here. " * 20)])
    num_tokens = count_tokens(chat, whole)
    assert shorten(whole, chat, num_tokens) == (whole, num_tokens)
    assert shorten(whole, chat, num_tokens - 1) is None  # it has no document
    long_answer = about_document("Short. Text.", [("Say much.", "Much is said here. " * 20)])
    assert shorten(long_answer, chat, num_tokens - 20) is None
    one_sentence = about_document("rome " * 100, [(QUESTION, ANSWER)])
    assert shorten(one_sentence, chat, count_tokens(chat, one_sentence) - 1) is None
    # nothing but the blank lines before the sentence would be left
    blank = about_document("\n\n" + "rome " * 100, [(QUESTION, ANSWER)])
    assert shorten(blank, chat, count_tokens(chat, blank) - 1) is None


def test_text_before_and_after_the_document_in_a_question_is_kept(chat):
    question = "Below is a paper. One here. Two here. Three here. Now the paper ends. What is it?"
    begin, end = question.index("One"), question.index(" Now")
    conversation = Conversation([(question, ANSWER)], ((begin, end),), system="Be brief.")
    used, _ = shorten(conversation, chat, count_tokens(chat, conversation) - 1)
    assert used.turns == [("Below is a paper. One here. Two here. Now the paper ends. What is it?", ANSWER)]
    assert used.messages()[0] == {"role": "system", "content": "Be brief."}


def test_two_documents_keep_the_same_share(chat):
    first = [f"This is the sentence of number {number}. " for number in range(60)]
    second = [f"That is a sentence of number {number}. " for number in range(20)]
    texts = ["".join(first).strip(), "".join(second).strip()]
    question = f"The first begins. {texts[0]} The second begins. {texts[1]} Compare them."
    spans = tuple((question.index(text), question.index(text) + len(text)) for text in texts)
    conversation = Conversation([(question, ANSWER)], spans)
    most = count_tokens(chat, conversation)
    for share in (0.9, 0.5, 0.25):
        used, num_tokens = shorten(conversation, chat, round(share * most))
        assert share * most * 0.8 < num_tokens == count_tokens(chat, used) <= share * most
        ((shortened, answer),) = used.turns
        begin, _, rest = shortened.partition("The first begins. ")
        kept_first, _, rest = rest.partition(" The second begins. ")
        kept_second, end, rest = rest.partition(" Compare them.")
        assert (begin, end, rest, answer) == ("", " Compare them.", "", ANSWER)
        numbers = [sentence_spans(sentences)[kept] for sentences, kept in ((first, kept_first), (second, kept_second))]
        assert [begin for begin, _ in numbers] == [0, 0]
        assert abs(numbers[0][1] / 60 - numbers[1][1] / 20) < 0.1
    assert shorten(conversation, chat, count_tokens(chat, Conversation([(question[spans[1][1] :], ANSWER)]))) is None
    used, _ = shorten(replace(conversation, evidence="a sentence of number 19"), chat, most // 2)
    assert "a sentence of number 19" in used.turns[0][0]
    assert "the sentence of number 0." in used.turns[0][0]
