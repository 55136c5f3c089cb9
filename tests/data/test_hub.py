import pytest

from longqlora.data.hub import is_hub_id, pinned_file, pinned_model, split_revision
from longqlora.data.readers import find_files, read_documents


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", True),
        ("owner/Name-7b_v1.5", True),
        ("owner/name@main", True),
        ("owner/name@refs/pr/3", True),
        ("owner/name@", False),
        ("owner/name@a b", False),
        ("name", False),
        ("name@main", False),
        ("owner/name/x", False),
        ("./owner", False),
        ("../owner/name", False),
        ("/owner/name", False),
    ],
)
def test_a_hub_id_has_an_owner_a_name_and_perhaps_a_revision(path, expected):
    assert is_hub_id(path) is expected


def test_a_folder_of_this_machine_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("owner/name", "owner/name@old"):
        (tmp_path / folder).mkdir(parents=True)
        assert not is_hub_id(folder)
        assert split_revision(folder) == (folder, "main")
        assert pinned_model(folder) == folder
    assert not is_hub_id("owner/name@main")  # transformers would read the folder, whatever the revision


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", ("owner/name", "main")),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@refs%2Fpr%2F3", ("owner/name", "refs/pr/3")),
    ],
)
def test_the_revision_follows_an_at_sign(path, expected):
    assert split_revision(path) == expected


def test_a_job_reads_the_commit_that_a_revision_has_now(hub):
    main = hub.add("models/owner/name", {"config.json": b"{}"})
    version = hub.add("models/owner/name", {"config.json": b"{}\n"}, "v1")
    assert pinned_model("owner/name") == f"owner/name@{main}"
    assert pinned_model("owner/name@v1") == f"owner/name@{version}"
    assert pinned_model(f"owner/name@{version[:40]}") == f"owner/name@{version}"
    assert main != version


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs/convert/parquet", "@refs%2Fconvert%2Fparquet"])
def test_files_of_a_data_set_are_read_and_recorded_at_a_commit(hub, revision):
    commits = {}
    for name in ("main", "v1", "refs/convert/parquet"):
        text = f'{{"text": "of {name}"}}\n'.encode()
        commits[name] = hub.add("datasets/owner/texts", {"a/1.jsonl": text, "a/2.jsonl": text}, name)
    commit = commits[revision.removeprefix("@").replace("%2F", "/") or "main"]
    files = find_files(f"hf://datasets/owner/texts{revision}/a/*.jsonl")
    assert files == [f"hf://datasets/owner/texts@{commit}/a/{number}.jsonl" for number in (1, 2)]
    (document,) = read_documents(files[0])
    assert commits[document.text.removeprefix("of ")] == commit
    assert find_files(f"hf://datasets/owner/texts{revision}/a/2.jsonl") == files[1:]


def test_other_paths_have_no_revision():
    for path in ("data/a.jsonl", "owner/name", "s3://bucket/a@b/c.jsonl", "hf://buckets/owner/name/a.jsonl"):
        assert pinned_file(path) == path
