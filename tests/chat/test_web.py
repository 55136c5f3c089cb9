"""The page, in a real browser: an answer streams, and nothing is asked of another machine."""

import shutil
import socket
import time
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
def generator(tmp_path_factory, tokenizer):
    """A tiny model with 512 tokens of context."""
    chat_model = find_chat_model(save_chat_model(tmp_path_factory.mktemp("model"), tokenizer))
    chat_model.load()
    return TextGenerator(chat_model, 12)


@pytest.fixture(scope="module")
def address(generator):
    """The page of the model."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (the extra web)")
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    arguments = (generator, [Document("notes", "A text.")], port)
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


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_stop_button_stops_the_model_and_the_next_question_is_answered(address, generator, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    model, forward = generator.chat_model.model, generator.chat_model.model.forward

    def slowly(*arguments, **keywords):
        time.sleep(0.05)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", slowly)
    monkeypatch.setattr(generator, "max_new_tokens", 400)
    monkeypatch.setattr(generator.chat_model.settings, "eos_token_id", [511])
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.goto(address)
        field = page.get_by_role("textbox").first
        field.fill("What is it about?")
        field.press("Enter")
        page.get_by_text("writing", exact=True).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped", exact=True).wait_for()
        while generator.is_working():
            page.wait_for_timeout(50)
        assert generator.statistics.end == "stopped"
        assert generator.statistics.generated < 300
        generator.max_new_tokens = 5
        field.fill("And this?")
        field.press("Enter")
        page.get_by_text("of 512 tokens used").wait_for()
