"""Wildcards are expanded once, and a name with brackets is a name."""

import pytest

from longqlora.config.paths import expand

NAMES = ["a1.txt", "a[1].txt", "b?.txt", "bc.txt", "d1/x.txt", "d[1]/x.txt", "d[1]/sub/y[2].txt", "d[1]/sub/y2.txt"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("name", [*NAMES, "./a[1].txt", "d[1]/../a[1].txt"])
def test_a_file_that_exists_is_itself(folder, name):
    assert expand(name) == [name]
    assert expand(f"{folder}/{name}") == [f"{folder}/{name}"]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("a*.txt", ["a1.txt", "a[1].txt"]),
        ("a[0-9].txt", ["a1.txt"]),
        ("a[[]1].txt", ["a[1].txt"]),
        ("d*/*.txt", ["d1/x.txt", "d[1]/x.txt"]),
        ("d[1]/*.txt", ["d[1]/x.txt"]),
        ("d[12]/*.txt", ["d1/x.txt"]),
        ("d[1]/s*/y*.txt", ["d[1]/sub/y2.txt", "d[1]/sub/y[2].txt"]),
        ("./d[1]/sub/y[0-9].txt", ["./d[1]/sub/y2.txt"]),
        ("**/[xy]*.txt", ["d1/x.txt", "d[1]/sub/y2.txt", "d[1]/sub/y[2].txt", "d[1]/x.txt"]),
        ("d[1]/**/*.txt", ["d[1]/sub/y2.txt", "d[1]/sub/y[2].txt", "d[1]/x.txt"]),
        ("nowhere/a[1].txt", ["nowhere/a[1].txt"]),
        ("results/a*.txt", ["results/a*.txt"]),
        ("memory://a*.txt", ["memory://a*.txt"]),
        ("", [""]),
    ],
)
def test_a_pattern_matches_files_in_the_folders_that_it_names(folder, pattern, files):
    assert expand(pattern) == files
    if "://" not in pattern and not pattern.startswith("results/"):
        assert expand(f"{folder}/{pattern}") == [f"{folder}/{file}" for file in files]


def test_a_link_to_a_missing_file_is_itself(folder):
    (folder / "l[1].txt").symlink_to("nowhere")
    (folder / "l1.txt").touch()
    assert expand("l[1].txt") == ["l[1].txt"]
