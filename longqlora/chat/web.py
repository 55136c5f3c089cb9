"""A page to talk to a model, on this machine only, with Gradio (the extra ``web``). It sends nothing to other machines."""

import os
import socket
from collections.abc import Generator
from importlib.util import find_spec
from itertools import pairwise
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from longqlora.chat.conversation import Conversation
from longqlora.chat.documents import Document, read_document, truncate_documents, with_documents
from longqlora.chat.generation import TextGenerator
from longqlora.chat.terminal import account, progress

HOST = "127.0.0.1"  # reachable from this machine only
REFUSED = "Not answered"  # title of what is shown in the place of an answer


def check_page(port: int) -> None:
    """Check that a page can be served.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if the port cannot be used.
    """
    if find_spec("gradio") is None:
        raise ImportError('--web needs Gradio, which is not installed: pip install -e ".[web]" -c constraints.txt')
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that was closed just now is no hindrance
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} of {HOST} cannot be used ({error}); choose another one with --port") from None


def serve(generator: TextGenerator, documents: list[Document], port: int, *, is_truncated: bool) -> None:
    """Serve the page until Ctrl-C.

    Args:
        generator: generates the answers.
        documents: precede the first question of each conversation.
        port: of the page.
        is_truncated: whether uploaded texts are cut so that they fit.
    """
    with TemporaryDirectory(prefix="longqlora-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}  # read when gradio is imported
        page = make_page(generator, documents, is_truncated)
        print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        page.launch(server_name=HOST, server_port=port, share=False, quiet=True, ssr_mode=False, footer_links=[])


def make_page(generator: TextGenerator, documents: list[Document], is_truncated: bool):
    """The page, as a Gradio app: a conversation, a field for messages and text files, and the tokens used and left."""
    import gradio

    tokenizer, context = generator.chat_model.tokenizer, generator.chat_model.context
    one_at_a_time = Lock()  # also if the page is open twice

    def message_of(content: list[dict[str, Any]]) -> str:
        """The text of a message, after the text files that were uploaded with it."""
        files = [read_document(part["file"]["path"]) for part in content if part["type"] == "file"]
        files = truncate_documents(files, tokenizer, context) if is_truncated else files
        text = "\n\n".join(part["text"] for part in content if part["type"] == "text")
        return with_documents(files, [{"role": "user", "content": text}])[0]["content"]

    def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> Generator[tuple[Any, str]]:
        """Yield the answer so far, and a line about tokens."""
        question: list[dict[str, Any]] = [{"type": "file", "file": {"path": path}} for path in message["files"]]
        question.append({"type": "text", "text": message["text"]})
        conversation = Conversation(generator, documents)
        text = ""
        with one_at_a_time:
            try:
                conversation.messages = [turn | {"content": message_of(turn["content"])} for turn in answered(history)]
                for piece in conversation.ask(message_of(question)):
                    text += piece if isinstance(piece, str) else ""
                    yield text, "writing" if isinstance(piece, str) else progress(piece)
                yield text, account(generator.statistics, context)
            except (ValueError, MemoryError) as error:
                yield {"role": "assistant", "content": str(error), "metadata": {"title": REFUSED}}, REFUSED

    with gradio.Blocks(title="longqlora", fill_height=True) as page:
        names = "".join(f", {document.name}" for document in documents)
        status = gradio.Markdown(f"{generator.chat_model.source.path}{names}: a context of {context:,} tokens", render=False)
        field = gradio.MultimodalTextbox(
            file_count="multiple", placeholder="Message; text files can be added", stop_btn=True, render=False
        )
        answers = gradio.Chatbot(
            show_label=False,
            scale=1,
            buttons=["copy", "copy_all"],  # none that shares a conversation on the internet
            render_markdown=False,  # an image in an answer would be loaded from another machine
            render=False,
        )
        gradio.ChatInterface(answer, multimodal=True, chatbot=answers, textbox=field, additional_outputs=[status])
        status.render()
        field.stop(lambda: "stopped", None, status, api_visibility="undocumented")
    return page


def answered(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Role and content of the questions that were answered, at least in part, and of their answers."""
    kept = []
    for question, answer in pairwise(history):
        is_refused = (answer.get("metadata") or {}).get("title") == REFUSED
        has_text = any(part["type"] == "text" and part["text"] for part in answer["content"])
        if (question["role"], answer["role"]) == ("user", "assistant") and has_text and not is_refused:
            kept += [{"role": turn["role"], "content": turn["content"]} for turn in (question, answer)]
    return kept
