"""The paper's two sets at their real size, from texts that are on this machine: 54,212 texts and 38,821 instruction records.

    python benchmarks/full_size.py make data/ scratch/ # with --scale 0.02, a fiftieth of it
    snakemake data --cores 2 --configfile scratch/experiment.yaml
    python benchmarks/full_size.py report scratch/ results/full-size

``data/`` has three folders: ``books`` (the evaluation set, plain text), ``corpus`` (JSON lines) and ``stories`` (text). Their
passages are recombined at random into texts in RedPajama's format and records in the schemas of the paper's sources. Some texts
get a passage of a book, others are near-copies of earlier ones: the workflow must remove exactly these. Lengths follow a power
law with the exponent -3. ``report`` prints time and memory of each stage, the counts, and what was found of that.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import orjson
import pandas
import pyarrow
import pyarrow.parquet
import yaml
from backports.zstd import ZstdFile
from transformers import LlamaConfig, LlamaForCausalLM

from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.readers import read_documents
from longqlora.data.sampling import text_id
from longqlora.training.pretraining import train_tokenizer

VOCABULARY = 32_000
WORD = re.compile(r"\w+")
PASSAGE = 400  # characters of a passage, at least
NUM_TEXTS, NUM_RECORDS = 54_212, 38_821
BANDS = [  # texts to each one that is wanted, fewest and most tokens; most texts of RedPajama are short
    (15.0, 300, 900), (0.2, 1024, 4000), (1.02, 4200, 32_000), (0.01, 34_000, 60_000),
]  # fmt: skip
CONTAMINATED, NEAR_COPIES = 0.01, 0.01  # of the texts that are wanted; among the records, the first only
NUM_SHARDS = 20
SUBSETS = {  # share of the texts, and what RedPajama says about one
    "common_crawl": (0.51, lambda number: {"source": f"cc/2023-06/{number}", "wiki_prob": 0.5}),
    "c4": (0.39, lambda number: {"meta": {"source": "c4", "url": f"https://example.org/{number}", "timestamp": "2019"}}),
    "github": (0.03, lambda number: {"meta": {"source": "github", "path": f"{number}.py", "license": "mit"}}),
    "stackexchange": (0.03, lambda number: {"meta": {"source": "stackexchange", "question_score": "1"}}),
    "wikipedia": (0.03, lambda number: {"meta": {"title": str(number), "language": "en"}}),
    "arxiv": (0.01, lambda number: {"meta": {"source": "arxiv", "arxiv_id": str(number)}}),
}
SHARES = {"natural_questions_hub": 0.43, "alpaca": 0.26, "booksum": 0.19, "long_alpaca": 0.12}  # of the records, by schema
SURPLUS = 1.06  # records to each one that is wanted


def passages(texts: Iterable[str], ngrams: EvaluationNgrams | None = None) -> list[str]:
    """Whole lines of the texts, ``PASSAGE`` characters or more at a time, without those that share n-grams with a set."""
    found, lines, size = [], [], 0
    for line in (line for text in texts for line in text.splitlines(keepends=True)):
        lines.append(line[: 4 * PASSAGE])  # some files are one line
        size += len(lines[-1])
        if size >= PASSAGE:
            found.append("".join(lines))
            lines, size = [], 0
    return [passage for passage in dict.fromkeys(found) if not (ngrams and ngrams.overlaps(passage))]


class Author:
    """Writes texts of given lengths from passages.

    Args:
        pool: the passages.
        books: passages of the evaluation set.
        density: characters per token.
    """

    def __init__(self, pool: list[str], books: list[str], density: float):
        self.pool, self.books, self.density = pool, books, density
        self.random = random.Random(1)
        self.mean = sum(map(len, pool)) / len(pool)

    def length(self, fewest: int, most: int) -> int:
        """Number of tokens, by a power law with the exponent -3."""
        return int(self.random.uniform(most**-2, fewest**-2) ** -0.5)

    def write(self, num_tokens: int, planted: str = "") -> str:
        """A text of about so many tokens, in which a passage is planted."""
        characters = int(num_tokens * self.density)
        chosen = self.random.choices(self.pool, k=int(1.5 * characters / self.mean) + 20)
        text = "".join(chosen)[:characters]
        middle = len(text) // 2
        return f"{text[:middle]}\n{planted}\n{text[middle:]}" if planted else text

    def nearly(self, text: str) -> str:
        """A copy with another word in place of every hundredth: a Jaccard similarity of 5-word shingles of about 0.9."""
        words = count()
        return WORD.sub(lambda found: "other" if next(words) % 100 == 50 else found[0], text)


def corpus_texts(author: Author, scale: float) -> Iterator[tuple[str, str, str | None]]:
    """Yield text, what it is (plain, contaminated, near), and, for a near-copy, the id of the text that it is a copy of."""
    wanted = NUM_TEXTS * scale
    kinds = [band for band in BANDS for _ in range(round(band[0] * wanted))]
    kinds += ["contaminated"] * round(CONTAMINATED * wanted) + ["near"] * round(NEAR_COPIES * wanted)
    author.random.shuffle(kinds)
    for kind in kinds:
        if kind == "contaminated":
            yield author.write(author.length(4500, 30_000), author.random.choice(author.books)), kind, None
        elif kind == "near":
            text = author.write(author.length(4500, 30_000))
            yield text, "plain", None
            yield author.nearly(text), kind, text_id(text)
        else:
            yield author.write(author.length(*kind[1:])), "plain", None


def write_corpus(author: Author, folder: Path, scale: float) -> dict:
    """Write the shards; return how many bytes they have before compression, and the ids of what was planted."""
    folder.mkdir()
    names, weights = list(SUBSETS), [share for share, _ in SUBSETS.values()]
    counts = {name: max(1, round(share * NUM_SHARDS)) for name, (share, _) in SUBSETS.items()}
    files = {name: [ZstdFile(folder / f"{name}-{n:02}.jsonl.zst", "w") for n in range(counts[name])] for name in names}
    facts: dict = {"bytes": 0, "texts": 0, "contaminated": [], "near": {}}
    for number, (text, kind, original) in enumerate(corpus_texts(author, scale)):
        (subset,) = author.random.choices(names, weights)
        line = orjson.dumps({"text": text, **SUBSETS[subset][1](number)}) + b"\n"
        author.random.choice(files[subset]).write(line)
        facts["bytes"] += len(line)
        facts["texts"] += 1
        if kind == "contaminated":
            facts["contaminated"].append(text_id(text))
        elif kind == "near":
            facts["near"][text_id(text)] = original
    for file in (file for shards in files.values() for file in shards):
        file.close()
    return facts


def natural_questions(author: Author, number: int, planted: str) -> dict:
    """A record of the hub's release: words and HTML tags of a page, and spans of words as answers. Few words are tags here."""
    words = author.write(author.length(1000, 30_000), planted).split()
    begin = author.random.randrange(len(words) // 2)
    short = {"start_token": [begin + 3], "end_token": [begin + 5], "text": [" ".join(words[begin + 3 : begin + 5])]}
    return {
        "document": {"title": str(number), "tokens": {"token": words, "is_html": [word.startswith("<") for word in words]}},
        "question": {"text": f"what is said in {number}"},
        "annotations": {
            "long_answer": [{"start_token": begin, "end_token": begin + 60}],
            "short_answers": [short],
            "yes_no_answer": [-1],
        },
    }


def make_record(author: Author, schema: str, number: int, planted: str) -> dict:
    """A record in the native form of a schema."""
    answer = author.write(author.length(50, 600))
    if schema == "natural_questions_hub":
        return natural_questions(author, number, planted)
    if schema == "alpaca":
        return {"instruction": author.write(author.length(20, 300), planted) or str(number), "output": answer}
    if schema == "booksum":
        return {"chapter": author.write(author.length(1500, 20_000), planted), "summary_text": answer}
    document = author.write(author.length(6000, 12_000), planted)
    question = (
        f"Below is a paper. Memorize the paper.\nThe paper begins.\n{document}\nNow the paper ends.\nWhat is paper {number}?"
    )
    return {"instruction": question, "output": answer}


def write_instructions(author: Author, folder: Path, scale: float) -> dict:
    """Write the records in Parquet, as most of the published sources are; return how many are contaminated, by schema."""
    folder.mkdir()
    facts: dict = {"records": {}, "contaminated": {}}
    for schema, share in SHARES.items():
        number = round(NUM_RECORDS * scale * share * SURPLUS)
        contaminated = set(author.random.sample(range(number), round(CONTAMINATED * number)))
        writer = None
        for begin in range(0, number, 200):
            numbers = range(begin, min(begin + 200, number))
            plants = [author.random.choice(author.books) if n in contaminated else "" for n in numbers]
            table = pyarrow.Table.from_pylist(
                [make_record(author, schema, n, planted) for n, planted in zip(numbers, plants, strict=True)]
            )
            writer = writer or pyarrow.parquet.ParquetWriter(folder / f"{schema}.parquet", table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()
        facts["records"][schema], facts["contaminated"][schema] = number, len(contaminated)
    return facts


def make_base(pool: list[str], folder: Path) -> float:
    """Write a base model with a tokenizer of the passages and next to no weights; return its characters per token."""
    tokenizer = train_tokenizer(pool, VOCABULARY)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sample = "".join(random.Random(1).sample(pool, min(len(pool), 2000)))
    return len(sample) / len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])


def experiment(scratch: Path, data: Path, scale: float) -> dict:
    """The configuration of a run."""
    names = dict.fromkeys(name for name, (_, meta) in SUBSETS.items() if meta(0).get("meta", {}).get("source") is None)
    named = [{"name": name, "paths": [f"{scratch}/texts/{name}-*.jsonl.zst"]} for name in names]
    others = [{"paths": [f"{scratch}/texts/{name}-*.jsonl.zst" for name in SUBSETS if name not in names]}]
    texts = {"num_texts": round(NUM_TEXTS * scale), "min_tokens": 4096, "max_tokens": 32768, "near_duplicates": 0.8}
    instructions = [
        {"name": schema, "schema": schema, "share": share, "paths": [f"{scratch}/instructions/{schema}.parquet"]}
        for schema, share in SHARES.items()
    ]
    trained = {"target_context": 8192}
    return {
        "experiment": "full-size" if scale == 1 else f"full-size-{scale}",
        "device": "cpu",
        "base_model": {"path": f"{scratch}/base"},
        "corpus": {"sources": named + others, **texts},
        "sft": {"sources": instructions, "num_records": round(NUM_RECORDS * scale), "max_tokens": 8192, "held_out": 0},
        "training": {"steps": 1, "rank": 4},
        "systems": {
            "texts": {**trained, "training": {}},
            "instructions": {**trained, "training": {"data": "sft"}},
        },
        "evaluation": {"lengths": [8192], "datasets": {"books": {"label": "books", "paths": [f"{data}/books/*.txt"]}}},
    }


def make(data: Path, scratch: Path, scale: float) -> None:
    """Write texts, instructions, base model and configuration into a folder."""
    scratch.mkdir(parents=True, exist_ok=True)
    books = [document.text for path in sorted((data / "books").glob("*.txt")) for document in read_documents(str(path))]
    index_evaluation_sets({"books": books}, 13, str(scratch / "ngrams.parquet"))
    files = [*sorted((data / "corpus").glob("*.jsonl*")), *sorted((data / "stories").glob("*.txt"))]
    texts = [document.text for path in files for document in read_documents(str(path))]
    pool = passages(texts, EvaluationNgrams(str(scratch / "ngrams.parquet"), 1))
    density = make_base(pool, scratch / "base")
    author = Author(pool, passages(books), density)
    facts = {"passages": len(pool), "characters_per_token": density, "corpus": write_corpus(author, scratch / "texts", scale)}
    facts["instructions"] = write_instructions(author, scratch / "instructions", scale)
    (scratch / "facts.json").write_text(json.dumps(facts, indent=1))
    (scratch / "experiment.yaml").write_text(yaml.safe_dump(experiment(scratch, data, scale), sort_keys=False))
    print({name: value for name, value in facts.items() if isinstance(value, int | float)}, facts["corpus"]["bytes"])


def report_stages(results: Path) -> None:
    """Print time and memory of every stage, from the files that Snakemake writes for each job."""
    print("| stage | jobs | s | longest job, s | CPU s | peak memory of a job, MiB |\n|:--|--:|--:|--:|--:|--:|")
    stages: dict[str, list] = {}
    for path in sorted((results / "benchmarks").rglob("*.tsv")):
        stages.setdefault(path.relative_to(results / "benchmarks").parts[0].removesuffix(".tsv"), []).append(path)
    for stage, paths in stages.items():
        jobs = pandas.concat([pandas.read_csv(path, sep="\t", na_values="-") for path in paths])
        sums = f"{jobs['s'].sum():.0f} | {jobs['s'].max():.0f} | {jobs['cpu_time'].sum():.0f} | {jobs['max_rss'].max():.0f}"
        print(f"| {stage} | {len(jobs)} | {sums} |")


def report_corpus(planted: dict, results: Path) -> None:
    """Print what became of the texts, and whether exactly the planted ones were removed."""
    card, removed = json.loads((results / "corpus/sample.json").read_text()), pandas.read_csv(results / "corpus/removed.csv")
    sample = pandas.read_parquet(results / "corpus/sample.parquet", columns=["id", "source", "num_tokens"])
    ids, tokens = set(sample["id"]), sample["num_tokens"]
    print(f"\n{card['total']}")
    print(f"{len(ids)} different texts of {tokens.min()} to {tokens.max()} tokens, {tokens.sum()} in all")
    print(f"by subset: {sample['source'].value_counts().to_dict()}")
    found, wanted = set(removed.loc[removed["evaluation_set"].notna(), "id"]), set(planted["contaminated"])
    print(f"contaminated: {len(found & wanted)} of {len(wanted)} planted ones, {len(found - wanted)} others")
    near = removed[removed["near_duplicate_of"].notna()]
    found = {frozenset(pair) for pair in zip(near["id"], near["near_duplicate_of"], strict=True)}
    wanted = {frozenset(pair) for pair in planted["near"].items()}
    print(f"near-copies: {len(found & wanted)} of {len(wanted)} planted pairs, {len(found - wanted)} others removed")
    print(f"pairs with both texts in the sample: {sum(pair <= ids for pair in wanted)}")


def report_instructions(facts: dict, results: Path) -> None:
    """Print what became of the records."""
    card = json.loads((results / "sft/records.json").read_text())
    print(f"\n{card['records']} records, {card['tokens']} tokens; planted: {facts['contaminated']}")
    print(pandas.DataFrame(card["sources"]).to_markdown())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("data", type=Path)
    making.add_argument("scratch", type=Path)
    making.add_argument("--scale", type=float, default=1.0, help="share of the real size")
    reporting = commands.add_parser("report")
    reporting.add_argument("scratch", type=Path)
    reporting.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.data, arguments.scratch, arguments.scale)
    else:
        facts = json.loads((arguments.scratch / "facts.json").read_text())
        report_stages(arguments.results)
        report_corpus(facts["corpus"], arguments.results)
        report_instructions(facts["instructions"], arguments.results)


if __name__ == "__main__":
    main()
