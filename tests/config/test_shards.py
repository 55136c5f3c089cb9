"""The jobs that read a corpus."""

import re

import pytest

from longqlora.config.settings import CorpusSettings, CorpusSource
from longqlora.config.shards import SHARD_NAME, corpus_shards, sample_shares


def source(paths, name="x", **options) -> CorpusSource:
    return CorpusSource(name=name, paths=paths, **options)


def paths_of(shards) -> list[list[str]]:
    return [shard.source.paths for shard in shards.values()]


@pytest.mark.parametrize(
    ("options", "jobs"), [({}, 256), ({"jobs": 1}, 1), ({"jobs": 7}, 7), ({"jobs": 300}, 300), ({"jobs": 400}, 300)]
)
def test_every_file_of_a_corpus_is_in_exactly_one_shard(options, jobs):
    files = [f"data/{number:03}.jsonl.gz" for number in range(300)]
    shards = corpus_shards([source(files, **options)])
    assert sorted(path for paths in paths_of(shards) for path in paths) == files
    assert len(shards) == jobs
    assert all(re.fullmatch(SHARD_NAME, name) for name in shards)


@pytest.mark.parametrize("new", ["data/0.jsonl", "data/5.jsonl"])
def test_a_shard_of_one_file_stays_as_it_is_when_a_file_is_added(new):
    files = [f"data/{number}.jsonl" for number in range(1, 5)]
    before, after = corpus_shards([source(files)]), corpus_shards([source(sorted([*files, new]))])
    assert [name.rsplit("-", 1)[0] for name in before] == ["1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]
    assert before.items() <= after.items()  # Snakemake reruns a job whose params change
    assert len(after) == 5


def test_files_of_the_same_name_are_different_shards():
    assert len(corpus_shards([source(["a/0.jsonl", "b/0.jsonl"])])) == 2
    shards = corpus_shards([source(["data/0.jsonl"], name) for name in ("a", "b")])
    assert [shard.source.name for shard in shards.values()] == ["a", "b"]


def test_the_same_file_read_by_other_fields_is_another_shard():
    shards = corpus_shards([source(["data/0.jsonl"], text_field="question"), source(["data/0.jsonl"], text_field="answer")])
    assert [shard.source.text_field for shard in shards.values()] == ["question", "answer"]


@pytest.mark.parametrize("path", ["a b.jsonl", "https://x.org/{lang}.jsonl", "b[1].jsonl", "é.jsonl"])
def test_every_shard_has_a_name_that_a_file_can_have(path):
    (name,) = corpus_shards([source([path])])
    assert re.fullmatch(r"[\w.-]+", name)
    assert re.fullmatch(SHARD_NAME, name)
    assert not re.fullmatch(SHARD_NAME, f"{name}.priorities")  # another file of the same job


def test_text_files_are_read_by_one_job_unless_more_are_asked_for():
    files = [f"books/{number}.txt" for number in range(50)]
    assert paths_of(corpus_shards([source(files)])) == [files]
    assert len(corpus_shards([source(files, jobs=4)])) == 4


def test_what_a_remote_pattern_matches_is_split_by_jobs():
    pattern, file = "hf://datasets/owner/name/*.jsonl.zst", "hf://datasets/owner/name/one.jsonl"
    (single,) = corpus_shards([source([pattern])]).values()
    assert (single.source.paths, single.part) == ([pattern], (0, 1))
    shards = corpus_shards([source([pattern, file], jobs=3)])
    assert [shard.part for shard in shards.values()] == [(0, 3), (1, 3), (2, 3)]
    assert paths_of(shards) == [[file, pattern], [pattern], [pattern]]
    assert all(name.startswith(f"part-{number}-of-3-") for number, name in enumerate(shards))


@pytest.mark.parametrize(
    ("shares", "section", "expected"),
    [([None, None], None, None), ([0.3, 0.7], None, {"a": 0.3, "b": 0.7}), ([None, None], {"C4": 1.0}, {"C4": 1.0})],
)
def test_shares_of_a_sample_come_from_the_sources_or_the_section(shares, section, expected):
    sources = [source(["x.jsonl"], name, share=share) for name, share in zip("ab", shares, strict=True)]
    corpus = CorpusSettings(sources=sources, shares=section, num_texts=1, min_tokens=1, max_tokens=1)
    assert sample_shares(corpus) == expected
