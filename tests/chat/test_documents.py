"""Reading texts, and cutting those that do not fit."""

from copy import deepcopy

import pytest
from conftest import CHATML

from longqlora.chat.documents import (
    Document,
    chat_prompt,
    count_tokens,
    read_document,
    truncate,
    truncate_documents,
    with_documents,
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.7\n\xe2\xe3", "not a text in UTF-8"),
        (b"\xff\xfea\x00b", "not a text in UTF-16"),
        (b"text\0text", "a binary file"),
        (b" \n", "is empty"),
        (None, "cannot be read .No such file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path, content, message):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"book.txt.*{message}"):
        read_document(str(file))


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_a_text(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_document(str(tmp_path / "book.txt")) == Document("book.txt", "a\nb")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_text_in_utf_16_is_read(tmp_path, encoding):
    (tmp_path / "book.txt").write_bytes("\ufeffGrüße\r\n".encode(encoding))
    assert read_document(str(tmp_path / "book.txt")).text == "Grüße"


def test_a_large_file_is_announced_before_its_tokens_are_counted(tmp_path, caplog):
    (tmp_path / "book.txt").write_text("a word " * 1_000_000)
    read_document(str(tmp_path / "book.txt"))
    assert "book.txt: has 7 MB" in caplog.text


def test_a_text_is_cut_at_the_end_of_a_sentence(tokenizer):
    text = "The first sentence. " * 20
    for num_tokens in range(20, 60):
        cut = truncate(text, tokenizer, num_tokens)
        assert text.startswith(cut)
        assert cut.endswith("sentence.")
        assert count_tokens(tokenizer, cut) <= num_tokens < count_tokens(tokenizer, cut + " The first sentence.") + 2


def test_a_text_without_sentences_is_cut_at_a_token(tokenizer):
    assert count_tokens(tokenizer, truncate("word " * 100, tokenizer, 30)) == 30


@pytest.fixture
def chat_tokenizer(tokenizer):
    """A tokenizer whose chat template adds nothing."""
    chat = deepcopy(tokenizer)
    chat.chat_template = "{{ messages[0].content }}"
    return chat


def test_several_documents_keep_the_same_share_and_leave_room_for_the_conversation(chat_tokenizer):
    tokenizer = chat_tokenizer
    documents = [Document("a", "One sentence. " * 200), Document("b", "One sentence. " * 100)]
    first, second = (count_tokens(tokenizer, document.text) for document in truncate_documents(documents, tokenizer, 400))
    assert 280 < first + second <= 300
    assert abs(first - 2 * second) < 15
    assert truncate_documents(documents, tokenizer, 10**6) == documents


def test_truncated_documents_fit_in_a_chat_template_with_a_long_system_message(chat_tokenizer):
    chat_tokenizer.chat_template = "You answer questions about texts, and you are brief. " * 3 + CHATML
    documents = truncate_documents([Document("a", "One sentence. " * 200)], chat_tokenizer, 256)
    assert len(chat_prompt(chat_tokenizer, documents, [{"role": "user", "content": "Why?"}])) < 256


def test_documents_come_before_the_first_question_with_their_names_if_there_are_several():
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    one, two = Document("a.txt", "A"), Document("b.txt", "B")
    assert with_documents([one], messages) == [{"role": "user", "content": "A\n\nWhy?"}, messages[1]]
    assert with_documents([one, two], messages)[0]["content"] == "a.txt:\n\nA\n\nb.txt:\n\nB\n\nWhy?"
    assert with_documents([], messages) == messages
