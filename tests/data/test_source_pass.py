import hashlib
import json
from functools import partial

import pytest

from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.readers import Malformed, read_documents
from longqlora.data.sampling import priority, text_id
from longqlora.data.source_pass import FileCounts, RecordCounter, SourcePass, check_malformed_share


@pytest.fixture
def ngrams(tmp_path) -> EvaluationNgrams:
    index_evaluation_sets({"proof": ["the quick brown fox jumps"]}, 3, str(tmp_path / "ngrams.parquet"))
    return EvaluationNgrams(str(tmp_path / "ngrams.parquet"), threshold=2)


def test_every_file_has_its_digest_and_its_counts(tmp_path, ngrams):
    files = {"a.jsonl": b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n', "b.jsonl": b'{"text": "three"}\n', "c.jsonl": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    reading = SourcePass(seed=1, ngrams=ngrams)
    assert [document.source for document in reading.read_files(paths, partial(read_documents, name="web"))] == ["web"] * 3
    digests = [hashlib.sha256(data).hexdigest() for data in files.values()]
    counts = [(2, 1), (1, 0), (0, 0)]
    assert reading.files == [
        FileCounts(path, digest, *numbers) for path, digest, numbers in zip(paths, digests, counts, strict=True)
    ]
    assert (reading.counter.usable, reading.counter.malformed) == (3, 1)
    assert reading.counter.examples == [f"{paths[0]}, line 2: empty text"]


def test_files_of_another_format_are_an_error_at_the_end_too(tmp_path, ngrams):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ({"text": "a"}, {}, {})))
    with pytest.raises(ValueError, match="2 of 3 records are malformed: do the files have another format"):
        list(SourcePass(seed=1, ngrams=ngrams).read_files([str(tmp_path / "x.jsonl")], read_documents))


def test_a_record_is_identified_by_its_text_and_the_seed(ngrams):
    first, second = (SourcePass(seed, ngrams).identify("text") for seed in (1, 2))
    assert first == (priority(text_id("text"), 1), text_id("text"))
    assert second == (priority(text_id("text"), 2), text_id("text"))


def test_rows_of_the_report_say_where_a_record_is_from_and_what_it_overlaps(ngrams):
    reading = SourcePass(1, ngrams)
    assert reading.overlap_rows("the quick brown dog", {"id": "x"}) == []  # one 3-gram; the threshold is two
    (row,) = reading.overlap_rows("A quick brown fox jumps, too.", {"id": "x", "line": 3})
    assert row == {
        "id": "x", "line": 3, "evaluation_set": "proof", "shared_ngrams": 2, "num_ngrams": 4, "example": "quick brown fox",
    }  # fmt: skip


def test_another_format_is_noticed_early_and_a_few_bad_records_are_tolerated():
    counter = RecordCounter()
    counter.usable = 10_000
    for line in range(200):
        counter.add_malformed(Malformed("x.jsonl", line, "empty text"))
    assert (counter.malformed, len(counter.examples)) == (200, 20)
    counter.check_format()
    other = RecordCounter()
    for line in range(99):
        other.add_malformed(Malformed("x.jsonl", line, "no text"))
    with pytest.raises(ValueError, match=r"^100 of 100 records are malformed: .* text_field\? .* x\.jsonl, line 0: no text"):
        other.add_malformed(Malformed("x.jsonl", 99, "no text"))


def test_the_tolerated_share_of_malformed_records_is_a_limit():
    check_malformed_share(1, 999, ["x.jsonl, line 5: empty text"], max_share=0.001)
    check_malformed_share(0, 0, [], max_share=0)
    with pytest.raises(ValueError, match=r"2 of 1000 records are malformed \(0\.20%\), .* 0\.10%:\n  x\.jsonl, line 5: empty"):
        check_malformed_share(2, 998, ["x.jsonl, line 5: empty text"], max_share=0.001)
