import pytest

from longqlora.publishing.hub_files import without_base_path, without_local_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("paths: [/home/anna/texts/*.jsonl.zst]", "paths: […/*.jsonl.zst]"),
        ('"path": "/scratch/p1/tokens/corpus.bin"', '"path": "…/corpus.bin"'),
        ("`/data/models/llama-2-7b/`", "`…/llama-2-7b/`"),
        ("file:///mnt/disk/a.txt", "file://…/a.txt"),
        ("&lt;/home/anna/a&gt;", "&lt;…/a&gt;"),
    ],
)
def test_absolute_paths_lose_their_folders(text, expected):
    content, found = without_local_paths(text.encode())
    assert content.decode() == expected
    assert len(found) == 1


@pytest.mark.parametrize(
    "text",
    [
        "results/home/anna/a",  # relative
        "../data/models/a",
        "https://huggingface.co/home/anna",
        "#!/usr/bin/env python",  # the same on all machines
        "1/2/3 and/or/both /x/y",
        "<p>a</p></div>/b/c",
        "</data/a/b",  # a tag
        "/home",
        "data:image/png;base64,/" + "m+TE9YnieDmMggJjKIiQxiIoOY" * 20 + "/a+/tmp/a/b",  # too long for the name of a folder
    ],
)
def test_other_text_stays(text):
    assert without_local_paths(text.encode()) == (text.encode(), {})


def test_a_folder_at_the_root_of_this_machine_is_known(tmp_path, monkeypatch):
    first = tmp_path.parts[1]
    monkeypatch.setattr("longqlora.publishing.hub_files.USERS_FOLDERS", ())
    assert without_local_paths(f"/{first}/a/b".encode())[0] == "…/b".encode()


def test_a_file_without_paths_is_sent_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert without_local_paths(tmp_path / "config.json") == (tmp_path / "config.json", {})


def test_only_the_whole_path_of_the_base_model_is_replaced():
    assert without_base_path("`demo/model`, results/demo/models/a", "demo/model", "model") == "`model`, results/demo/models/a"
