"""The page, in a real browser: an answer streams, and nothing is asked of another machine."""

import shutil
import socket
from threading import Thread

import pytest
from chat_models import save_chat_model

from longqlora.chat.chat_model import find_chat_model
from longqlora.chat.documents import Document
from longqlora.chat.generation import TextGenerator
from longqlora.chat.web import HOST, REFUSED, answered, check_page, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def turn(role: str, text: str, **fields) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}], **fields}


def test_questions_without_an_answer_are_no_part_of_the_conversation():
    history = [turn("user", "1"), turn("assistant", "one", metadata=None)]
    history += [turn("user", "too long"), turn("assistant", "no", metadata={"title": REFUSED})]
    history += [
        turn("user", "stopped"),
        turn("assistant", ""),
        turn("user", "lost"),
        turn("user", "2"),
        turn("assistant", "two"),
    ]
    texts = [message["content"][0]["text"] for message in answered(history)]
    assert texts == ["1", "one", "2", "two"]


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("longqlora.chat.web.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed: pip install -e .\.\[web\]"):
        check_page(0)


def test_a_port_that_is_in_use_is_found_before_the_model_is_loaded():
    pytest.importorskip("gradio")
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="choose another one with --port"):
        check_page(taken.getsockname()[1])


@pytest.fixture(scope="module")
def address(tmp_path_factory, tokenizer):
    """The page of a tiny model with 512 tokens of context."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (the extra web)")
    chat_model = find_chat_model(save_chat_model(tmp_path_factory.mktemp("model"), tokenizer))
    chat_model.load()
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    arguments = (TextGenerator(chat_model, 12), [Document("notes", "A text.")], port)
    Thread(target=serve, args=arguments, kwargs={"is_truncated": False}, daemon=True).start()
    yield f"http://{HOST}:{port}"
    gradio.close_all()


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_an_answer_streams_in_a_browser_and_nothing_leaves_this_machine(address, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "long.txt").write_text("A sentence. " * 500, encoding="utf-8")
    requests, problems = [], []
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        field = page.get_by_role("textbox").first
        field.fill("What is it about? ![](https://example.org/image.png)")
        field.press("Enter")
        page.get_by_text("of 512 tokens used").wait_for()
        with page.expect_response(lambda response: "/upload" in response.url):
            page.set_input_files("input[type=file]", tmp_path / "long.txt")
        page.wait_for_timeout(500)  # until the page knows the answer
        field.fill("And this?")
        field.press("Enter")
        page.get_by_text("more than the model's context of 512").wait_for()
    hosts = {url.split("/")[2] for url in requests if url.startswith(("http", "ws"))}
    assert hosts == {address.removeprefix("http://")}
    assert not problems
