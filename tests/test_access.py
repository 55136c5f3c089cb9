import re

import pytest
from conftest import ROOT
from fake_hub import TOKEN
from huggingface_hub import constants, snapshot_download

from longqlora.access import REQUESTS, access_problems
from longqlora.config.experiment import load_experiment

MODEL = {"config.json": (ROOT / "demo/model/config.json").read_bytes(), "model.safetensors": b"x", "tokenizer.json": b"{}"}
TEXTS = {"a/1.jsonl": b"{}", "a/2.jsonl": b"{}", "new/prose.jsonl.gz": b"x", "code.jsonl": b"{}"}


@pytest.fixture
def find(demo):
    """A function that finds problems of the demo, with another model, and its corpus or evaluation set somewhere else."""

    def run(*, model="demo/model", tokenizer=None, corpus=None, prose=None, used=None) -> list[str]:
        demo["base_model"] = {"path": model} | ({"tokenizer": tokenizer} if tokenizer else {})
        if corpus:
            demo["corpus"]["sources"] = [{"paths": corpus if isinstance(corpus, list) else [corpus]}]
        if prose:
            demo["evaluation"]["datasets"]["prose"]["paths"] = [prose]
        experiment = load_experiment(demo)
        everything = [{"paths": corpus if isinstance(corpus, list) else [corpus]}, (model, [tokenizer, prose])]
        return access_problems(experiment, everything if used is None else used)

    return run


def test_what_can_be_read_is_no_problem(find, hub):
    hub.add("models/owner/name", MODEL, "v1")
    hub.add("datasets/owner/texts", TEXTS)
    hub.add("datasets/owner/texts", TEXTS, "refs/convert/parquet")
    pattern = "hf://datasets/owner/texts@refs%2Fconvert%2Fparquet/**/*.jsonl"
    assert find(model="owner/name@v1", corpus=pattern, prose="hf://datasets/owner/texts/new/prose.jsonl.gz") == []


def test_files_of_this_machine_need_no_hub(find, hub):
    assert find() == []
    assert hub.requests == []


def test_a_store_of_checkpoints_is_written_to_if_a_training_needs_it(demo, tmp_path):
    (tmp_path / "file").touch()
    for address, problem in [
        ((tmp_path / "store").as_uri(), None),
        ((tmp_path / "file").as_uri(), "cannot be written to (FileExistsError: "),
        ("nowhere://a", "cannot be written to (ValueError: Protocol not known: nowhere)"),
    ]:
        demo["training"]["checkpoint_store"] = address
        experiment = load_experiment(demo)
        assert access_problems(experiment, [{"checkpoint_store": None}]) == []
        found = access_problems(experiment, [{"checkpoint_store": address}])
        assert len(found) == (problem is not None)
        assert all(line.startswith(f"training.checkpoint_store: {address}: {problem}") for line in found)
    assert list((tmp_path / "store").iterdir()) == []


def test_what_no_job_needs_is_not_looked_up(find, hub):
    assert find(model="owner/nowhere", corpus="hf://datasets/owner/nowhere/*.jsonl", used=[["demo"], {"seed": 1}]) == []
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, "accept its license at {page}, then log in on this machine (hf auth login, or set HF_TOKEN)"),
        (TOKEN, "accept its license at {page} with the account of this machine's token"),
    ],
)
def test_a_gated_repository_says_where_its_license_is_accepted(find, hub, monkeypatch, token, expected):
    hub.add("models/owner/name", MODEL, gated=True)
    hub.add("datasets/owner/texts", TEXTS, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    files = [f"hf://datasets/owner/texts/a/{number}.jsonl" for number in (1, 2)]
    model, data = find(model="owner/name", corpus=files)  # both files of the data set are one problem
    pages = [f"{hub.address}/{name}" for name in ("owner/name", "datasets/owner/texts")]
    assert model == f"base_model.path: model owner/name: is gated; {expected.format(page=pages[0])}"
    assert data == f"corpus.sources[0].paths: dataset owner/texts: is gated; {expected.format(page=pages[1])}"


def test_a_missing_or_private_repository(find, hub, monkeypatch):
    hub.add("models/owner/private", MODEL, private=True)
    for name in ("private", "nowhere"):
        (problem,) = find(model=f"owner/{name}")
        assert problem.endswith(
            f"model owner/{name}: is not at {hub.address}/owner/{name}, or is private; if so, log in on this machine "
            "(hf auth login, or set HF_TOKEN)"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find(model="owner/private") == []
    (problem,) = find(model="owner/nowhere")
    assert problem.endswith("or the account of this machine's token may not read it")


@pytest.mark.parametrize("from_variable", [True, False])
def test_a_wrong_token_says_where_it_is_from_and_is_not_shown(find, hub, monkeypatch, tmp_path, from_variable):
    hub.add("models/owner/name", MODEL)
    if from_variable:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    else:
        (tmp_path / "token").write_text("hf_wrong")
    (problem,) = find(model="owner/name")
    assert "the hub does not accept the token of this machine, from " in problem
    assert ("the variable HF_TOKEN" in problem) is from_variable
    assert "hf_wrong" not in problem


def test_a_revision_that_is_not_there_names_those_that_are(find, hub):
    for revision in ("main", "v1"):
        hub.add("models/owner/name", MODEL, revision)
        hub.add("datasets/owner/texts", TEXTS, revision)
    model, data = find(model="owner/name@v2", corpus="hf://datasets/owner/texts@v3/a/*.jsonl")
    assert "model owner/name at revision v2: has no such revision; branches and tags: main, v1" in model
    assert "dataset owner/texts at revision v3: has no such revision; branches and tags: main, v1" in data


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("prose.jsonl.gz", "has no file prose.jsonl.gz; similar: new/prose.jsonl.gz"),
        ("code.json", "has no file code.json; similar: code.jsonl"),
        ("b/*.parquet", r"has no file b/*.parquet"),
    ],
)
def test_a_file_that_has_moved_names_similar_ones(find, hub, path, expected):
    hub.add("datasets/owner/texts", TEXTS)
    assert find(corpus=f"hf://datasets/owner/texts/{path}") == [f"corpus.sources[0].paths: dataset owner/texts: {expected}"]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", r"base_model\.path: model owner/name: holds no config\.json"),
        (
            "model.safetensors",
            r"base_model\.path: model owner/name: holds no weights \(model.safetensors or pytorch_model.bin\)",
        ),
        ("tokenizer.json", r"base_model\.tokenizer: model owner/name: holds no tokenizer \(tokenizer.json\)"),
    ],
)
def test_a_repository_without_a_model_or_tokenizer(find, hub, missing, expected):
    hub.add("models/owner/name", {name: content for name, content in MODEL.items() if name != missing})
    (problem,) = find(model="owner/name")
    assert re.match(expected, problem)


def test_a_model_that_cannot_be_extended(find, hub):
    hub.add("models/owner/name", MODEL | {"config.json": b'{"model_type": "gemma3_text", "max_position_embeddings": 128}'})
    hub.add("models/owner/name", MODEL | {"config.json": b"{"}, "broken")
    problems = find(model="owner/name")
    assert any(re.match(r"systems\.interpolated: owner/name: is a 'gemma3_text' model", problem) for problem in problems)
    assert not any(problem.startswith("systems.base:") for problem in problems)
    problems = find(model="owner/name@broken")
    assert re.search(r"config\.json: not valid JSON", problems[0])


@pytest.mark.parametrize("how", ["offline", "unreachable", "broken"])
def test_without_the_hub_a_model_in_its_cache_is_enough(find, hub, monkeypatch, tmp_path, how):
    for name in ("cached", "elsewhere"):
        hub.add(f"models/owner/{name}", MODEL)
        hub.add(f"models/owner/{name}", MODEL | {"x": b""}, "v1")
    snapshot_download("owner/cached", revision="v1")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.is_down = True
    assert find(model="owner/cached@v1") == []
    for model, command in (("owner/cached", "owner/cached"), ("owner/elsewhere@v1", "owner/elsewhere --revision v1")):
        (problem,) = find(model=model)
        assert re.search(rf"is not in the hub's cache .*/cache\), and the hub .*: hf download {command}$", problem)
    (problem,) = find(corpus="hf://datasets/owner/texts/code.jsonl")
    assert "download the file on a machine with a network, and give its local path" in problem


def test_an_interrupted_download_is_not_enough(find, hub, monkeypatch):
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = MODEL | {"model.safetensors.index.json": index, "model-1.safetensors": b"x", "model-2.safetensors": b"x"}
    hub.add("models/owner/name", {name: content for name, content in files.items() if name != "model.safetensors"})
    snapshot_download("owner/name", ignore_patterns=["model-2.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (problem,) = find(model="owner/name")
    assert "owner/name is not in the hub's cache" in problem


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("memory://nowhere.jsonl", "there is no such file"),
        ("memory://nowhere/*.jsonl", "no file matches"),
        ("nosuch://x/y.jsonl", "cannot be read (ValueError: Protocol not known: nosuch)"),
        ("hf://datasets/texts", "Invalid HF URI 'hf://datasets/texts'"),
    ],
)
def test_other_addresses_are_looked_up_too(find, hub, address, expected):
    (problem,) = find(corpus=address)
    assert problem.startswith(f"corpus.sources[0].paths: {address}: {expected}")


def test_a_data_set_of_many_files_is_looked_up_once(find, hub):
    names = [f"{number}.jsonl" for number in range(40)]
    hub.add("datasets/owner/texts", dict.fromkeys(names, b"{}"))
    assert find(corpus=[f"hf://datasets/owner/texts/{name}" for name in names]) == []
    asked = [request for request in hub.requests if "/api/datasets" in request]
    assert len(asked) <= REQUESTS  # those that begin before the first answer


def test_a_damaged_configuration_is_told_once_with_its_key(find, hub):
    hub.add("models/owner/name", MODEL | {"config.json": b"{"})
    (problem,) = find(model="owner/name")
    assert re.match(r"base_model\.path: .*/config\.json: not valid JSON", problem)
