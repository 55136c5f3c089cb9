import gzip
import json
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest

import longqlora.data.shards
from longqlora.config.settings import CorpusSource
from longqlora.data.corpus import JoinSettings, sample_corpus
from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.near_duplicates import NearDuplicates
from longqlora.data.sampling import apportion, priority, text_id
from longqlora.data.shards import CANDIDATES, PRIORITIES, SampleSettings, ShardFiles, sample_shard

VOCABULARY = ["".join(random.Random(number).choices("abcdefghijklmnop", k=5)) for number in range(400)]


def make_text(number: int, words: int = 40) -> str:
    return " ".join(random.Random(number).choices(VOCABULARY, k=words))


HELD_OUT = make_text(10**6, words=200)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> str:
    """Path of the n-grams of one evaluation set."""
    output = str(tmp_path_factory.mktemp("evaluation") / "ngrams.parquet")
    index_evaluation_sets({"held-out": [HELD_OUT]}, 5, output)
    return output


@pytest.fixture
def draw(tmp_path, tokenizer, index):
    """Sample records in ``shards`` shards, or in the given ones by name, with up to three files per shard."""

    def run(
        records, *, k=20, shards=1, seed=7, near=None, allow_fewer=False, malformed=0.0, own=False, metadata_fields=(),
        min_tokens=20, max_tokens=2000, threshold=1, **options,
    ):  # fmt: skip
        parts = [records[number::shards] for number in range(shards)] if isinstance(records, list) else [*records.values()]
        names = [*records] if isinstance(records, dict) else ["web"] * shards
        reserve = near is not None or "shares" in options
        settings = SampleSettings(k, min_tokens, max_tokens, seed, keep_reserve=reserve, **options)
        joining, ngrams = JoinSettings(near, allow_fewer, malformed), EvaluationNgrams(index, threshold)
        outputs = []
        for number, (part, name) in enumerate(zip(parts, names, strict=True)):
            paths, files = [], 3 if len(part) > 3 else 1
            for file in range(files):
                lines = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in part[file::files])
                paths.append(str(tmp_path / f"{number}-{file}.jsonl.gz"))
                Path(paths[-1]).write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines), compresslevel=1))
            source = CorpusSource(
                name=name, paths=paths, metadata_fields=list(metadata_fields), share=0.5 if own else None
            )  # how large the share is, is in the settings
            outputs.append(shard_files(tmp_path / str(number)))
            sample_shard(settings=settings, source=source, part=(0, 1), tokenizer=tokenizer, ngrams=ngrams, output=outputs[-1])
        sample, removed = str(tmp_path / "sample.parquet"), str(tmp_path / "removed.csv")
        card = sample_corpus(settings=settings, joining=joining, shards=outputs, ngrams=ngrams, output=sample, removed=removed)
        rows = pyarrow.parquet.read_table(sample).to_pylist()
        check_outcomes(card, rows)
        return rows, card, pandas.read_csv(removed)

    return run


def shard_files(prefix) -> ShardFiles:
    return ShardFiles(*(f"{prefix}{ending}" for ending in (".parquet", ".priorities.parquet", ".json")))


def check_outcomes(card, rows):
    """Every document of every source has one outcome, and the card describes the sample."""
    assert sum(Counter(row["source"] for row in rows).values()) == card["total"]["sampled"]
    for source, counts in card["sources"].items():
        assert min(counts.values(), default=0) >= 0, (source, counts)
        count = Counter(counts)
        rejected = ["too short by characters", "too long by characters", "not examined", "too short", "too long"]
        assert count["read"] == sum(count[outcome] for outcome in [*rejected, "in range"])
        used = ["contaminated", "without a share", "duplicate", "near-duplicate", "not drawn", "sampled"]
        assert count["in range"] == sum(count[outcome] for outcome in used)
        assert count["sampled"] == sum(row["source"] == source for row in rows)
    assert card["total"]["read"] == sum(file["documents"] for file in card["files"])
    assert card["total"]["malformed"] == sum(file["malformed"] for file in card["files"])
    assert card["sampled_tokens"] == sum(row["num_tokens"] for row in rows)


def records_of(numbers, source=None, **options):
    meta = {"meta": {"source": source}} if source else {}
    return [{"text": make_text(number, **options), **meta} for number in numbers]


def shuffled(items, seed):
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


@pytest.fixture
def lengths():
    """Texts of 1 to 120 words, some of them twice, some very long."""
    records = [{"text": make_text(number, words=1 + number % 120)} for number in range(300)]
    return [*records, *records[40:60], {"text": make_text(5, words=5000)}, *[{"text": "x"}] * 3]


def test_the_sample_is_that_of_a_naive_reference(draw, lengths, tokenizer):
    texts = {record["text"] for record in lengths}
    counted = {text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    in_range = [text for text, num_tokens in counted.items() if 20 <= num_tokens <= 200]
    expected = sorted(in_range, key=lambda text: priority(text_id(text), 7))[:30]
    rows, card, _ = draw(lengths, k=30, shards=3, max_tokens=200)
    assert [row["text"] for row in rows] == expected
    assert [row["num_tokens"] for row in rows] == [counted[text] for text in expected]
    assert [row["id"] for row in rows] == [text_id(text) for text in expected]
    assert card["total"]["read"] == len(lengths)
    assert card["total"]["too long by characters"] == 1
    assert card["total"]["too short by characters"] >= 3
    densities = [len(text) / counted[text] for text in texts]
    assert min(densities) <= card["characters_per_token"]["min"] < card["characters_per_token"]["max"] <= max(densities)


def test_the_sample_depends_on_neither_shards_nor_files_nor_order(draw, lengths):
    reference, card, _ = draw(lengths, k=40)
    for number in (2, 5, 11):
        rows, other, _ = draw(shuffled(lengths, number), k=40, shards=number)
        assert rows == reference
        assert (other["sample_sha256"], other["total"]) == (card["sample_sha256"], card["total"])


def test_a_larger_sample_holds_a_smaller_one_and_another_seed_gives_another(draw, lengths):
    small, large = draw(lengths, k=20)[0], draw(lengths, k=60, shards=3)[0]
    assert large[:20] == small
    assert draw(lengths, k=20, seed=8)[0] != small


def test_equal_texts_count_once_also_across_shards(draw):
    records = records_of(range(30))
    rows, card, _ = draw({"a": records, "b": records[:20], "c": records[10:] + records[:5]}, k=30)
    assert len({row["text"] for row in rows}) == 30
    assert {row["source"] for row in rows} == {"a"}  # the first by name
    assert card["sources"]["b"] == {"read": 20, "in range": 20, "duplicate": 20}
    assert card["total"]["duplicate"] == 45


def test_records_that_differ_only_in_their_source_are_the_same_for_any_sharding(draw):
    records = records_of(range(40), "B") + records_of(range(40), "A") + records_of(range(20, 60), "C")
    reference, card, _ = draw(records, k=50)
    for number in (2, 5):
        rows, other, _ = draw(shuffled(records, number), k=50, shards=number)
        assert (rows, other["sources"]) == (reference, card["sources"])


def test_an_examined_share_gives_the_same_sample_where_it_holds_enough(draw):
    records = records_of(range(400))
    reference, _, _ = draw(records, k=20)
    rows, card, _ = draw(records, k=20, shards=3, examined_share=0.2)
    assert rows == reference
    assert 270 < card["total"]["not examined"] < 370  # expected 320, standard deviation 8
    with pytest.raises(
        ValueError, match=r"asks for 200 .* all has \d\d of 200 .* not examined.*; corpus\.examined_share limits"
    ):
        draw(records, k=200, examined_share=0.2)


def test_every_document_is_equally_likely(draw):
    records, counts = records_of(range(12)), Counter()
    for seed in range(60):
        counts.update(row["text"] for row in draw(records, k=4, seed=seed, shards=1 + seed % 3)[0])
    assert len(counts) == 12
    assert all(6 < count < 34 for count in counts.values())  # expected 20, standard deviation 3.7
    assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 30  # chi-squared of 11 degrees of freedom


SHARES = {"A": 0.5, "B": 0.3, "C": 0.2}


def test_shares_of_sources_are_exact(draw):
    parts = {name: records_of(range(100 * number, 100 * number + 100)) for number, name in enumerate(SHARES)}
    rows, _, _ = draw(parts, k=37, shares=SHARES, own=True)
    assert Counter(row["source"] for row in rows) == apportion(37, SHARES)
    assert [priority(row["id"], 7) for row in rows] == sorted(priority(row["id"], 7) for row in rows)


def test_shares_of_meta_values_are_exact_for_any_sharding(draw):
    names = [*SHARES, "other"]
    records = [record for n, name in enumerate(names) for record in records_of(range(100 * n, 100 * n + 80), name)]
    reference, card, _ = draw(records, k=40, shares=SHARES)
    assert Counter(row["source"] for row in reference) == {"A": 20, "B": 12, "C": 8}
    assert card["sources"]["other"] == {"read": 80, "in range": 80, "without a share": 80}
    for number in (2, 5):
        rows, other, _ = draw(shuffled(records, number), k=40, shares=SHARES, shards=number)
        assert (rows, other["sources"]) == (reference, card["sources"])


def test_a_text_in_two_strata_is_sampled_once(draw):
    both = records_of(range(60))
    parts = {"A": both, "B": both[:30] + records_of(range(100, 130))}
    rows, card, _ = draw(parts, k=60, shares={"A": 0.6, "B": 0.4}, own=True)
    assert len({row["text"] for row in rows}) == 60
    assert Counter(row["source"] for row in rows) == {"A": 36, "B": 24}
    assert card["total"]["duplicate"] == 30


@pytest.mark.parametrize("quotas", [(2, 18), (18, 2), (10, 10)])
def test_strata_of_the_same_texts_give_the_same_for_any_sharding(draw, quotas):
    """A small stratum keeps few candidates: how many the other one takes must not depend on what further shards kept."""
    shares = {"A": quotas[0] / 20, "B": quotas[1] / 20}
    records = records_of(range(100), "A") + records_of(range(100), "B")
    results = []
    for number in (1, 4, 10):
        rows, card, _ = draw(shuffled(records, number), k=20, shards=number, shares=shares, allow_fewer=True)
        results.append((rows, card["sources"]))
    assert results[0] == results[1] == results[2]


def change_words(text: str, number: int) -> str:
    words = text.split()
    for place in range(number):
        words[7 + 40 * place] = "changed"
    return " ".join(words)


def test_near_duplicates_are_removed_and_the_result_is_the_same_for_any_sharding(draw):
    originals = records_of(range(40), words=120)
    copies = [{"text": change_words(record["text"], 2)} for record in originals[:15]]
    records = originals + copies
    reference, card, removed = draw(records, k=40, near=0.7)
    changed = {change_words(record["text"], 2): record["text"] for record in originals[:15]}
    in_order = sorted(records, key=lambda record: priority(text_id(record["text"]), 7))
    last = max(place for place, record in enumerate(in_order) if record["text"] in {row["text"] for row in reference})
    met = last + 1 - 40  # those before the last sampled one that are not sampled; none after it is examined
    assert 10 < met <= 15
    assert card["total"]["near-duplicate"] == met
    assert len({changed.get(row["text"], row["text"]) for row in reference}) == 40
    pairs = {text_id(copy): text_id(original) for copy, original in changed.items()}
    assert len(removed) == met
    for row in removed.to_dict("records"):  # of each pair the one of the larger priority
        first, second = sorted([row["id"], row["near_duplicate_of"]], key=lambda key: priority(key, 7))
        assert (first, second) == (row["near_duplicate_of"], row["id"])
        assert pairs.get(first) == second or pairs.get(second) == first
        assert 0.7 <= row["similarity"] < 1
    for number in (2, 6):
        rows, other, _ = draw(shuffled(records, number), k=40, near=0.7, shards=number)
        assert (rows, other["sources"]) == (reference, card["sources"])


def test_many_near_duplicates_end_the_search_the_same_way_for_any_sharding(draw):
    """Each shard keeps twice the quota; beyond that, none is sampled, however many other shards kept."""
    base = make_text(0, words=300).split()
    records = [{"text": " ".join([*base, str(number)])} for number in range(100)] + records_of(range(20))
    results = [draw(shuffled(records, number), k=20, near=0.7, shards=number, allow_fewer=True)[:2] for number in (1, 4, 9)]
    assert all(rows == results[0][0] for rows, _ in results)
    assert all(card["sources"] == results[0][1]["sources"] for _, card in results)
    assert len(results[0][0]) < 20


def test_similarity_is_near_the_jaccard_index_and_texts_of_few_words_are_never_near():
    first, second = make_text(1, words=300), change_words(make_text(1, words=300), 3)
    near = NearDuplicates(0.7)
    assert near.find_or_add("first", first) is None
    shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (first.split(), second.split())]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    key, similarity = near.find_or_add("second", second)
    assert key == "first"
    assert abs(similarity - exact) < 3 * 0.044
    assert near.find_or_add("third", make_text(2, words=300)) is None
    for number in range(3):
        assert near.find_or_add(f"short-{number}", "漢字" * 1000 + str(number)) is None


def test_texts_that_overlap_an_evaluation_set_are_removed_and_listed(draw):
    quote = " ".join(HELD_OUT.split()[30:40])
    contaminated = [{"text": f"{make_text(number)} {quote.upper()}, {make_text(number + 1000)}"} for number in range(500, 506)]
    rows, card, removed = draw([*records_of(range(30)), *contaminated], k=30, shards=2)
    assert card["total"]["contaminated"] == 6
    assert not {row["text"] for row in rows} & {record["text"] for record in contaminated}
    assert set(removed["id"]) == {text_id(record["text"]) for record in contaminated}
    assert set(removed["evaluation_set"]) == {"held-out"}
    assert set(removed["shared_ngrams"]) == {6}  # of 5 words in 10
    assert set(removed["example"]) == {" ".join(quote.split()[:5])}
    for row in removed.to_dict("records"):  # the place of each is that in its file
        line = gzip.decompress(Path(row["path"]).read_bytes()).splitlines()[int(row["line"]) - 1]
        assert text_id(json.loads(line)["text"]) == row["id"]
    assert draw([*records_of(range(30)), *contaminated], k=36, threshold=7)[1]["total"].get("contaminated", 0) == 0


def test_the_sample_is_checked_once_more_at_the_end(tmp_path, index):
    """A contaminated candidate, as if a shard had been made by other code, stops the run."""
    text = f"{make_text(1)} {' '.join(HELD_OUT.split()[:8])}"
    order = priority(text_id(text), 7)
    row = {"priority": order, "id": text_id(text), "stratum": "all", "source": "web", "num_tokens": 99, "metadata": "{}"}
    shard = shard_files(tmp_path / "contaminated")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "text": text}], schema=CANDIDATES), shard.candidates)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], schema=PRIORITIES), shard.priorities)
    card = {"counts": {"web": {"read": 1, "in range": 1}}, "files": [], "malformed": [], "removed": []}
    Path(shard.card).write_text(json.dumps({**card, "characters_per_token": [], "length_bounds": ""}))
    with pytest.raises(
        ValueError, match=rf"the sample: {text_id(text)} shares 4 5-grams with the evaluation set 'held-out', such"
    ):
        sample_corpus(
            settings=SampleSettings(1, 20, 400, 7),
            joining=JoinSettings(None, False, 0.0),
            shards=[shard],
            ngrams=EvaluationNgrams(index, 1),
            output=str(tmp_path / "sample.parquet"),
            removed=str(tmp_path / "removed.csv"),
        )


def test_malformed_records_beyond_the_tolerated_share_stop_the_run(draw):
    records = records_of(range(60))
    records[16] = b'{"text": '
    with pytest.raises(
        ValueError, match=r"1 of 60 records are malformed \(1\.67%\), .* 1\.00%:\n.*-1\.jsonl\.gz, line 6: not v"
    ):
        draw(records, malformed=0.01)
    _, card, _ = draw(records, malformed=0.02)
    assert card["total"]["malformed"] == 1
    assert [line.rsplit("/", 1)[1][:25] for line in card["malformed"]] == ["0-1.jsonl.gz, line 6: not"]
    assert [(file["documents"], file["malformed"]) for file in card["files"]] == [(20, 0), (19, 1), (20, 0)]


def test_a_shard_in_another_format_stops_at_once(draw):
    with pytest.raises(
        ValueError, match=r"100 of 100 records are malformed: .*no text in the field 'text'; the record's fields are body"
    ):
        draw([{"body": make_text(1)}] * 1000, malformed=1.0)
    with pytest.raises(ValueError, match=r"2 of 3 records are malformed"):
        draw([*records_of([1]), {}, {}], malformed=1.0, k=1)


def test_too_few_texts_is_an_error_that_counts_them_unless_fewer_will_do(draw):
    records = records_of(range(10)) + records_of(range(3)) + [{"text": "short"}]
    message = (
        r"asks for 20 texts of 20 to 2000 tokens, but all has 10 of 20 \(14 read, .*3 duplicate, 10 sampled\); .*allow_fewer"
    )
    with pytest.raises(ValueError, match=message):
        draw(records, shards=2)
    rows, card, _ = draw(records, shards=2, allow_fewer=True)
    assert len(rows) == card["total"]["sampled"] == 10
    with pytest.raises(ValueError, match=r"but B has 3 of 10 \("):
        draw({"A": records, "B": records_of(range(50, 53))}, shares={"A": 0.5, "B": 0.5}, own=True)


def test_a_sample_without_a_text_is_an_error_though_fewer_will_do(draw):
    end = "allow_fewer: true accepts a smaller sample, but not an empty one$"
    with pytest.raises(ValueError, match=rf"all has 0 of 20 \(the files have no text\); .*{end}"):
        draw([], allow_fewer=True)
    with pytest.raises(ValueError, match=rf"all has 0 of 20 \(2 read, 2 too short by characters\); .*{end}"):
        draw([{"text": "short"}, {"text": "brief"}], allow_fewer=True)
    with pytest.raises(ValueError, match=rf"A has 0 of 10; B has 0 of 10 \(40 read, 40 in range, 40 contaminated\); .*{end}"):
        draw(
            {name: [{"text": f"{HELD_OUT} {make_text(number)}"} for number in range(20)] for name in "AB"},
            shares={"A": 0.5, "B": 0.5}, own=True, allow_fewer=True,
        )  # fmt: skip


def test_metadata_is_kept(draw):
    records = [{**record, "id": number, "meta": {"date": "2023"}} for number, record in enumerate(records_of(range(20)))]
    rows, _, _ = draw(records, shards=2, metadata_fields=("id", "meta.date", "license"))
    by_text = {record["text"]: record for record in records}
    for row in rows:
        assert json.loads(row["metadata"]) == {"id": by_text[row["text"]]["id"], "meta.date": "2023", "license": None}


def sample_file(path, tokenizer, index, part=(0, 1), **options):
    settings = SampleSettings(num_texts=5, min_tokens=20, max_tokens=400, seed=1)
    given = {"name": "x", "paths": [str(path)], "metadata_fields": ["price", "raw", "date"]}
    source, output = CorpusSource(**given | options), shard_files(path)
    ngrams = EvaluationNgrams(index, 1)
    sample_shard(settings=settings, source=source, part=part, tokenizer=tokenizer, ngrams=ngrams, output=output)
    return pyarrow.parquet.read_table(output.candidates).to_pylist(), json.loads(Path(output.card).read_text())


def test_metadata_of_parquet_types_that_json_has_not_is_kept_as_text(tmp_path, tokenizer, index):
    record = {"text": make_text(1), "price": Decimal("1.50"), "raw": b"x", "date": pandas.Timestamp("2023-01-02")}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
    (row,), _ = sample_file(tmp_path / "x.parquet", tokenizer, index)
    metadata = json.loads(row["metadata"])
    assert metadata["price"] == "1.50"
    assert metadata["date"].startswith("2023-01-02")


def test_a_very_long_document_is_rejected_by_its_characters_and_never_tokenized(tmp_path, tokenizer, index, monkeypatch):
    seen = []

    def watched(tokenizer, texts, encode=longqlora.data.shards.encode_batch):
        seen.extend(map(len, texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(longqlora.data.shards, "encode_batch", watched)
    path = tmp_path / "x.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("all work " * 5_600_000, make_text(1), "short"))
    assert path.stat().st_size > 50_000_000
    rows, card = sample_file(path, tokenizer, index)
    assert seen == [len(make_text(1))]
    assert [row["text"] for row in rows] == [make_text(1)]
    assert {outcome: number for outcome, number in card["counts"]["x"].items() if number} == {
        "read": 3, "too long by characters": 1, "too short by characters": 1, "in range": 1,
    }  # fmt: skip


def test_a_source_field_that_names_texts_instead_of_subsets_is_an_error_in_the_shard_and_in_the_join(
    tmp_path, tokenizer, index
):
    """As in RedPajama's Common Crawl, whose source is the line of the crawl; several shards may each have few."""

    def shard(name: str, numbers) -> ShardFiles:
        lines = (json.dumps({"text": "short", "meta": {"source": f"cc/2023-06/{number}/line{number}"}}) for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        sample_file(tmp_path / f"{name}.jsonl", tokenizer, index)
        return shard_files(tmp_path / f"{name}.jsonl")

    message = r"name more than 1000 sources, such as cc/2023-06/0/line0, .*; source_field must be a field with few values"
    with pytest.raises(ValueError, match=message):
        shard("many", range(1001))
    shards = [shard("a", range(501)), shard("b", range(500, 1001))]
    settings, ngrams = SampleSettings(num_texts=5, min_tokens=20, max_tokens=400, seed=1), EvaluationNgrams(index, 1)
    paths = {"output": str(tmp_path / "sample.parquet"), "removed": str(tmp_path / "removed.csv")}
    with pytest.raises(ValueError, match=message):
        sample_corpus(settings=settings, joining=JoinSettings(None, True, 0), shards=shards, ngrams=ngrams, **paths)
    shard("enough", range(1000))


def test_a_text_is_the_same_in_files_with_other_line_ends_or_a_byte_order_mark(draw):
    texts = [f"{make_text(number, words=20)}\n{make_text(number + 100, words=20)}\n" for number in range(20)]
    forms = [texts, [text.replace("\n", "\r\n") for text in texts], ["\ufeff" + text.replace("\n", "\r") for text in texts]]
    expected, _, _ = draw([{"text": text} for text in texts])
    rows, card, _ = draw([{"text": text} for form in forms for text in form], shards=3)
    assert [(row["id"], row["text"]) for row in rows] == [(row["id"], row["text"]) for row in expected]
    assert (card["total"]["duplicate"], card["total"]["sampled"]) == (40, 20)
    assert "line ends are \\n" in card["normalization"]


def test_a_shard_of_no_files_keeps_nothing(tmp_path, tokenizer, index):
    (tmp_path / "only.jsonl").write_text("")
    pattern = f"file://{tmp_path}/*.jsonl"  # local wildcards are expanded before
    rows, card = sample_file(tmp_path / "only.jsonl", tokenizer, index, part=(3, 4), paths=[pattern])
    assert rows == card["files"] == card["characters_per_token"] == []


def test_damaged_records_of_every_kind_change_nothing_in_the_sample(draw, texts):
    """The good texts are sampled as before, and the data card shows the bad lines."""
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()][:150]
    lines = [json.dumps({"text": text, "meta": {"source": "prose"}}).encode() for text in paragraphs]
    rows, card, _ = draw(lines, shards=2, k=30)
    assert set(card["sources"]) == {"prose"}
    damage = [
        lines[0][: len(lines[0]) // 2],
        b'{"txt": "x"}',
        b'{"text": ""}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "\xff"}',
        b"[1]",
    ]
    damaged, bad, _ = draw([*lines[:70], *damage, *lines[70:]], shards=3, k=30, malformed=0.05)
    assert damaged == rows
    assert bad["total"]["malformed"] == len(damage) == len(bad["malformed"])
    for reason in ("not valid JSON", "no text in the field", "empty text", "NUL character", "expected a JSON object"):
        assert any(reason in example and "line" in example for example in bad["malformed"])
    with pytest.raises(ValueError, match=r"6 of 156 records are malformed \(3\.85%\), max_malformed_share allows 0\.10%"):
        draw([*lines[:70], *damage, *lines[70:]], k=30, malformed=0.001)
