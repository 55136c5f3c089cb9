"""The command ``longqlora``: messages for what cannot be used, in a script, and in a pseudo terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from chat.chat_models import save_chat_model
from conftest import save_base

from longqlora.cli import main


@pytest.fixture
def chat_model(tmp_path, tokenizer) -> str:
    """A model with a chat template that never stops by itself."""
    folder = save_chat_model(tmp_path / "model", tokenizer, max_position_embeddings=100_000)
    settings = {"eos_token_id": 511, "pad_token_id": 0}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def refusal(capsys, *arguments) -> str:
    """The message that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return f"{ended.value.code}{capsys.readouterr().err}"


@pytest.fixture
def _keep_signals():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_keep_signals")
def test_what_is_no_model_is_refused_with_what_to_do(capsys, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base", tokenizer)
    save_base(tmp_path / "weights/long", tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "weights/long" / file).unlink()
    (tmp_path / "models/long").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(b"\0\1")
    for given, message in {
        ("nowhere/to/be/found",): "there is no folder nowhere/to/be/found on this machine, and it is not a hub id",
        ("models/lang",): "did you mean models/long?",
        ("file",): "file is a file; give the folder of a model",
        (".",): "is not the folder of a model: it holds no config.json",
        ("weights/long",): "holds no tokenizer (tokenizer.json); the published model is in models/long",
        ("adapter",): "adapter is an adapter, not a model; name its base as the model: my/base --adapter adapter",
        ("base", "--adapter", "base"): "it is a model: longqlora chat base",
        ("base", "--adapter", "nowhere"): "there is no folder nowhere",
        ("base",): "base has no chat template, so it is a base model, which continues texts: longqlora generate base",
        ("base", "--file", "binary"): "binary: is a binary file",
        ("base", "--max-new-tokens", "0"): "--max-new-tokens: must be a whole number from 1 on, not 0",
        ("base", "--temperature", "-1"): "--temperature: must be a number from 0 on, not -1",
        ("base", "--temperature", "hot"): "--temperature: must be a number from 0 on, not hot",
    }.items():
        assert message in refusal(capsys, "chat", *given)
    assert base


@pytest.mark.usefixtures("_keep_signals")
def test_a_file_beyond_the_context_says_by_how_much(capsys, tmp_path, tokenizer):
    model = save_chat_model(tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text("A sentence. " * 1000, encoding="utf-8")
    message = refusal(capsys, "chat", model, "--file", tmp_path / "book.txt")
    number, more = re.search(
        r"book.txt: ([\d,]+) tokens .* are ([\d,]+) more than the model's context of 512", message
    ).groups()
    assert int(number.replace(",", "")) + 1 - int(more.replace(",", "")) == 512
    assert "--truncate" in message
    assert "more than the model's context of 512" in refusal(capsys, "generate", model, "--prompt-file", tmp_path / "book.txt")


def run(*arguments, stdin: str, **variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "longqlora", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, env=os.environ | variables)


@pytest.mark.process
def test_help_imports_nothing_heavy():
    code = "import sys, longqlora.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "chat" in shown
    assert "generate" in shown
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(re.findall(r"'([\w.]+)'", shown))


@pytest.mark.process
def test_a_script_gets_only_the_answer_on_the_standard_output(chat_model, tmp_path):
    (tmp_path / "book.txt").write_text("A text about a house. " * 10, encoding="utf-8")
    options = ("--max-new-tokens", 5, "--file", tmp_path / "book.txt")
    ended = run("chat", chat_model, *options, stdin="Who?\nAnd why?\n")
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(r"\[\d+ of 100,000 tokens used, .*; wrote 5 in .* s; cut off by --max-new-tokens\]\n", ended.stderr)
    assert run("chat", chat_model, *options, stdin="Who?\nAnd why?\n").stdout == ended.stdout
    assert "\033" not in ended.stdout + ended.stderr


@pytest.mark.process
def test_a_text_from_the_standard_input_is_continued(chat_model):
    ended = run("generate", chat_model, "--prompt-file", "-", "--max-new-tokens", 5, "--truncate", stdin="Once upon a time")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
    assert "wrote 5" in ended.stderr


class Typing:
    """A chat in a pseudo terminal."""

    def __init__(self, *arguments, **variables):
        pid, self.terminal = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell script ignores it for what it starts in the background
            command = [sys.executable, "-m", "longqlora", *map(str, arguments)]
            os.execve(sys.executable, command, os.environ | {"TERM": "xterm"} | variables)
        self.pid, self.shown = pid, ""

    def write(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """What is shown until a pattern matches; what follows stays for the next call."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, f"{pattern} is not in {self.shown!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                self.shown += os.read(self.terminal, 65536).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def press_until_it_ends(self, key: str) -> int:
        """Press a key once a second, because one may come while the prompt is set up; the status of the process."""
        for _ in range(30):
            self.write(key)
            time.sleep(1)
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"{key!r} does not end the chat")


@pytest.mark.process
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(chat_model):
    typing = Typing("chat", chat_model, "--max-new-tokens", 90_000, NO_COLOR="1")
    typing.wait_for("> ")
    typing.write("Who?\n")
    typing.wait_for(r"(?s)2004l.{80}")  # the answer streams
    typing.write("\x03")
    typing.wait_for("Ctrl-C again leaves")
    typing.wait_for("> ")
    typing.write("/clear\n")
    assert "\033[2m" not in typing.wait_for("A new conversation")
    typing.write("Why?\n")
    typing.wait_for(r"(?s)2004l.{80}")
    typing.write("\x03")
    typing.wait_for("Ctrl-C again leaves")
    assert typing.press_until_it_ends("\x03") == 130


@pytest.mark.process
def test_a_pasted_text_of_several_lines_is_one_message(chat_model):
    typing = Typing("chat", chat_model, "--max-new-tokens", 3)
    typing.wait_for("> ")
    typing.write("\033[200~line one\nline two\nline three\033[201~\n")
    typing.wait_for("wrote 3")
    typing.wait_for("> ")
    typing.write('"""typed one\ntyped two"""\n')
    typing.wait_for("wrote 3")
    typing.wait_for("> ")
    assert "wrote" not in typing.shown
    assert typing.press_until_it_ends("\x04") == 0


def test_a_plan_is_told_for_a_gpu_with_the_config_json_of_a_folder(capsys, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    arguments = ["plan", "config/measure.yaml", "--model", "data/models/my-model=demo/model"]
    main([*arguments, "--gpu", "v100-32gb"])
    told = capsys.readouterr().out
    assert "measure on V100-32GB" in told
    assert "untrained-linear" in told
    main([*arguments, "--gpu-memory", "24GB", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == {"name": "GPU with 24 GB", "kind": "cuda", "memory": 24 * 2**30, "compute": "bfloat16"}
    assert {job["stage"] for job in plan["jobs"]} == {"perplexity", "retrieval"}


def test_what_cannot_be_planned_is_told_before_anything_is_traced(capsys, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    twice, broken, misspelled = (tmp_path / name for name in ("twice.yaml", "broken.yaml", "misspelled.yaml"))
    twice.write_text("seed: 1\nseed: 2\n")
    broken.write_text("seed: [1\n")
    misspelled.write_text("training: {rnk: 8}\n")
    for given, message in {
        ("config/config.yaml", "--gpu", "V200"): "known are V100-16GB, V100-32GB, T4",
        ("config/config.yaml", "--gpu-memory", "much"): "'much' is no memory of a GPU: write it in GB, such as 24GB",
        ("config/config.yaml", misspelled): "training: unknown key 'rnk'; did you mean 'rank'",
        (twice,): "seed: occurs twice",
        (broken,): "is not YAML",
        ("config/none.yaml",): "config/none.yaml",
        ("demo/texts/prose.jsonl.xz",): "is no text file; a configuration is YAML",
        ("config/measure.yaml", "--gpu", "V100"): "did you mean V100-16GB or V100-32GB?",
        ("config/measure.yaml", "--gpu", "4090"): "did you mean RTX-4090?",
        ("config/measure.yaml", "--model", "data/models/mymodel=demo/model"): "no such model; it has data/models/my-model",
        ("config/config.yaml", "--model", "demo/model"): "must be MODEL=FOLDER",
        ("config/measure.yaml", "--gpu", "T4"): "give a folder that holds it, --model data/models/my-model=FOLDER",
    }.items():
        assert message in refusal(capsys, "plan", *given), given
