import json
import shutil
from pathlib import Path

import numpy
import pytest
from conftest import ROOT
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard, constants, utils
from safetensors.numpy import save_file

from longqlora.cli import main

SENT = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "merge_report.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "report.html",
}  # fmt: skip
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# Extended to 256

`{base}` with its context extended.

```python
model = AutoModelForCausalLM.from_pretrained("<this folder>")
```

## Training

Made with longqlora.
"""


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_system(results: Path, name: str, base: str) -> None:
    """Write what the workflow leaves of a trained system, and files that are not to be published."""
    model, adapter = results / "models" / name, results / "adapters" / name
    model.mkdir(parents=True)
    adapter.mkdir(parents=True)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo/model" / file, model)
    save_file({"weight": numpy.arange(1000.0)}, model / "model.safetensors")
    save_file({"a": numpy.arange(100.0)}, adapter / "adapter_model.safetensors")
    (model / "README.md").write_text(CARD.format(base=base))
    write_json(model / "merge_report.json", {"sample": {"path": str(results / "tokens/corpus.bin")}})
    write_json(adapter / "adapter_config.json", {"r": 16, "base_model_name_or_path": base})
    write_json(results / "training" / f"{name}.json", {"base_model": base})
    for file in (".snakemake_timestamp", "optimizer.pt", "notes.txt"):
        (model / file).write_text("not to be sent")
    for file in ("README.md", "trainer_state.json"):
        (adapter / file).write_text("not to be sent")


@pytest.fixture
def results(tmp_path) -> Path:
    """The folder of an experiment with one trained system, ``extended``, from a base model in a local folder."""
    base = tmp_path / "home/anna/models/tiny-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    folder = tmp_path / "results/mine"
    write_system(folder, "extended", str(base))
    (folder / "report.html").write_text(f"<p>text from {base.parent}/texts.jsonl</p>")
    (folder / "tables").mkdir()
    (folder / "tables/perplexity.csv").write_text("system,dataset,dataset_label,eval_length\nextended,prose,Prose,256\n")
    (folder / "tables/perplexity.md").write_text("| system | 256 |\n|:--|--:|\n| Extended to 256 | 16.88 |\n")
    record = {"eval_length": 256, "perplexity": 16.87539}
    write_json(folder / "perplexity/extended/prose/256.json", record)
    (folder / "checkpoints/extended").mkdir(parents=True)
    (folder / "checkpoints/extended/model.safetensors").write_text("not to be sent")
    return folder


@pytest.fixture
def hub(hub, monkeypatch) -> FakeHub:
    """A hub on this machine that takes large files by Git LFS; a request that fails is tried again at once."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(utils._http.time, "sleep", lambda _: None)
    return hub


@pytest.fixture
def publish(results, capsys):
    """A function that runs the command; it returns the exit status and what was printed, with that of stderr at the end."""

    def run(*more: str, system: str = "extended", repo: str = "me/mine") -> tuple[int, str]:
        try:
            main(["publish", str(results), "--system", system, "--repo", repo, *more])
            status, message = 0, ""
        except SystemExit as end:  # with a message, which Python prints and whose status is 1
            status, message = (end.code, "") if isinstance(end.code, int) else (1, str(end.code))
        return status, "".join(capsys.readouterr()) + message

    return run


@pytest.fixture
def login(monkeypatch) -> None:
    """The token of somebody who may write to the repositories of ``me``."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def files_of(hub: FakeHub, name: str = "me/mine") -> dict[str, bytes]:
    """The files of a repository."""
    repository = hub.repositories[f"models/{name}"]
    return {file: content for file, content in repository.commits[repository.refs["main"]].items() if file != ".gitattributes"}


def writes(hub: FakeHub) -> list[str]:
    """The requests that change something."""
    return [request for request in hub.requests if request.startswith("PUT") or "/commit/" in request or "/create" in request]


def test_the_dry_run_lists_what_would_be_sent_and_sends_nothing(publish, hub, login):
    status, printed = publish()
    assert status == 0
    listed = printed.split("files, in bytes:\n")[1].split("\n  total")[0]
    assert {line.split()[0] for line in listed.splitlines()} == SENT
    assert "me/mine would be created, public" in printed
    assert "license: apache-2.0" in printed
    assert "result: perplexity at 256 tokens, Prose: 16.8754" in printed
    assert "Nothing was sent. Add --really to publish." in printed
    assert writes(hub) == []


def test_without_a_network_the_dry_run_says_that_the_hub_could_not_be_asked(publish, hub):
    hub.is_down = True
    status, printed = publish()
    assert status == 0
    assert "would be created, public, unless it is there (the hub could not be asked: " in printed


def test_exactly_the_listed_files_arrive_in_one_commit(publish, hub, login, results):
    status, printed = publish("--really", "--private")
    assert status == 0
    assert f"Published: {hub.address}/me/mine" in printed
    assert set(files_of(hub)) == SENT
    assert files_of(hub)["model.safetensors"] == (results / "models/extended/model.safetensors").read_bytes()
    assert hub.repositories["models/me/mine"].private
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_the_model_card_that_arrives_has_the_results_and_the_license(publish, hub, login):
    publish("--really")
    card = ModelCard(files_of(hub)["README.md"].decode())
    assert card.data.license == "apache-2.0"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Prose", "perplexity", 16.8754)
    assert result.metric_args == {"context_length": 256}
    assert "| Extended to 256 | 16.88 |" in card.text
    assert "[report.html](report.html)" in card.text
    assert 'from_pretrained("me/mine")' in card.text


def test_no_path_of_this_machine_is_sent(publish, hub, login, tmp_path):
    _, printed = publish("--really")
    for name, content in files_of(hub).items():
        assert str(tmp_path).encode() not in content, name
    assert json.loads(files_of(hub)["adapter/adapter_config.json"]) == {"r": 16, "base_model_name_or_path": "tiny-base"}
    assert b"`tiny-base` with its context" in files_of(hub)["README.md"]
    assert files_of(hub)["report.html"] == "<p>text from …/texts.jsonl</p>".encode()
    assert f"note: report.html: {tmp_path}/home/anna/models/texts.jsonl is sent as …/texts.jsonl" in printed


def test_the_hub_id_of_a_local_base_model_can_be_given(publish, hub, login):
    hub.add("models/them/base", {"README.md": b"---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"})
    publish("--really", "--base", "them/base")
    data = ModelCard(files_of(hub)["README.md"].decode()).data
    assert (data.base_model, data.license, data.license_name) == ("them/base", "other", "own")
    assert data.license_link == f"{hub.address}/them/base/blob/main/LICENSE"
    assert json.loads(files_of(hub)["adapter/adapter_config.json"])["base_model_name_or_path"] == "them/base"


def test_the_adapter_of_a_later_stage_names_the_model_of_the_stage_before(publish, hub, login, results):
    write_system(results, "chat", str(results / "weights/extended"))
    _, printed = publish("--really", "--base", "them/base", "--license", "llama2", system="chat")
    assert json.loads(files_of(hub)["adapter/adapter_config.json"])["base_model_name_or_path"] == "extended"
    assert "the base model in adapter/adapter_config.json is 'extended', which is no hub id" in printed


def test_a_second_upload_makes_no_commit_if_nothing_has_changed(publish, hub, login):
    publish("--really")
    hub.requests.clear()
    status, printed = publish("--really")
    assert status == 0
    assert "Nothing has changed since the last upload" in printed
    assert writes(hub) == []


def test_old_weights_are_deleted_and_files_of_others_stay(publish, hub, login):
    there = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "LICENSE": b"x", "a.gguf": b"x"}
    hub.add("models/me/mine", there)
    _, printed = publish()
    assert "me/mine is there, public, with 4 files" in printed
    assert "model.safetensors.index.json is deleted" in printed
    publish("--really")
    assert set(files_of(hub)) == {*SENT, "LICENSE", "a.gguf"}


def test_without_a_login_it_says_how_to_log_in(publish, hub):
    status, printed = publish("--really")
    assert status == 1
    assert (
        "publishing needs a login: log in on this machine with a token that may write (hf auth login, or set HF_TOKEN)"
        in printed
    )
    assert writes(hub) == []


def test_an_invalid_token(publish, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, printed = publish("--really")
    assert status == 1
    assert "the hub does not accept the token of this machine" in printed


def test_a_repository_of_somebody_else(publish, hub, login):
    status, printed = publish("--really", repo="them/mine")
    assert status == 1
    assert "the token of this machine may not write to them (You don't have the rights" in printed


def test_an_upload_that_is_cut_off_is_finished_by_the_next_one(publish, hub, login):
    hub.refused = {"PUT /lfs/": 0}
    status, printed = publish("--really")
    assert status == 1
    assert "me/mine was not published, the connection failed (" in printed
    assert "run the same command again" in printed
    assert files_of(hub) == {}
    hub.refused = {}
    assert publish("--really")[0] == 0
    assert set(files_of(hub)) == SENT


def test_large_files_that_have_arrived_are_not_sent_again(publish, hub, login):
    hub.refused = {"POST /api/models/me/mine/commit": 0}
    assert publish("--really")[0] == 1
    hub.refused = {}
    hub.requests.clear()
    assert publish("--really")[0] == 0
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert set(files_of(hub)) == SENT


@pytest.mark.parametrize("status", [409, 412])
def test_a_repository_that_changes_during_the_upload(publish, hub, login, status):
    hub.refused = {"POST /api/models/me/mine/commit": status}
    ended, printed = publish("--really")
    assert ended == 1
    assert "me/mine has changed during the upload (said the test); run the same command again" in printed
    hub.refused = {}
    assert publish("--really")[0] == 0


def test_a_license_that_the_hub_does_not_know(publish, hub, login):
    status, printed = publish("--license", "apache")
    assert status == 1
    assert "problem: the hub does not accept the metadata of the model card: license apache is unknown" in printed
    assert publish("--license", "apache", "--really")[0] == 1
    assert writes(hub) == []


def test_an_unknown_license_must_be_given(publish, hub, login, tmp_path):
    (tmp_path / "home/anna/models/tiny-base/README.md").unlink()
    status, printed = publish()
    assert status == 1
    assert "problem: the license of tiny-base is not known: give it with --license, such as apache-2.0" in printed
    assert publish("--really")[0] == 1
    assert writes(hub) == []
    assert publish("--license", "llama2")[0] == 0


def test_a_public_repository_is_not_taken_for_a_private_one(publish, hub, login):
    hub.add("models/me/mine", {"LICENSE": b"x"})
    status, printed = publish("--really", "--private")
    assert status == 1
    assert "me/mine is there and public" in printed
    assert writes(hub) == []


@pytest.mark.parametrize("repo", ["mine", "me/mine/too", "me/-mine", "me/my model"])
def test_an_illegal_name(publish, hub, repo):
    status, printed = publish(repo=repo)
    assert status == 1
    assert f"--repo {repo}: " in printed


@pytest.mark.parametrize("system", ["extende", "extended/", ""])
def test_a_system_that_is_not_there(publish, hub, results, system):
    status, printed = publish(system=system)
    assert status == 1
    assert "trained systems there: extended" in printed


@pytest.mark.parametrize("file", ["models/extended/model.safetensors", "adapters/extended/adapter_model.safetensors"])
def test_damaged_weights(publish, hub, results, file):
    damaged = results / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    status, printed = publish()
    assert status == 1
    assert f"{damaged}: has" in printed


@pytest.mark.parametrize(
    "file", ["models/extended/config.json", "training/extended.json", "adapters/extended/adapter_config.json"]
)
def test_a_file_that_a_crash_left_empty_is_named(publish, hub, results, file):
    (results / file).write_text("")
    status, printed = publish()
    assert status == 1
    assert f"{results / file}: is not JSON" in printed


def test_a_model_card_whose_metadata_are_broken_is_named(publish, hub, results, tmp_path):
    base = tmp_path / "home/anna/models/tiny-base/README.md"
    for file in (base, results / "models/extended/README.md"):
        file.write_text("---\nlicense: [mit\n---\n")
        status, printed = publish()
        assert status == 1
        assert f"{file}: the metadata" in printed


def test_a_training_card_that_does_not_name_the_base(publish, hub, results):
    (results / "training/extended.json").write_text("{}")
    status, printed = publish()
    assert status == 1
    assert "extended.json: does not say what the model was trained on" in printed


@pytest.mark.parametrize("file", ["models/extended/tokenizer.json", "models/extended/README.md", "training/extended.json"])
def test_a_missing_file(publish, hub, results, file):
    (results / file).unlink()
    status, printed = publish()
    assert status == 1
    assert Path(file).name in printed
    assert "run the workflow again" in printed
