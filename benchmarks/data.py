"""Speed and memory of the data stages, as ratios within one run.

    python benchmarks/data.py                                   # 4 minutes on 2 cores; no network, no GPU
    python benchmarks/data.py --tokenizer models/llama-2-7b     # with a real tokenizer

The texts are lines of the demo's corpus in random order; without --tokenizer one of 2048 pieces is trained on them.
The two sides of a ratio run in turn, and the best time of each counts. Memory is the peak of a process of its own.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import orjson
from backports.zstd import compress
from transformers import AutoTokenizer

from longqlora.config.settings import CorpusSource
from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.readers import open_binary, read_documents
from longqlora.data.shards import SampleSettings, ShardFiles, sample_shard
from longqlora.data.token_files import batches, tokenize_documents
from longqlora.training.pretraining import train_tokenizer

CORPUS = Path(__file__).resolve().parent.parent / "demo/texts"
ROUNDS = 5
SHORT, LONG = 2_000, 24_000  # characters of a text below the range of 4096 to 32768 tokens, and within it
REJECTED = 0.95  # of the documents of the shard, by their characters
CORPUS_BYTES = 1.2e12 * 4  # RedPajama-1T: its tokens, at 4 bytes each
CORES_PER_NODE = 64


def make_texts(lines: list[str], number: int, characters: int, seed: int) -> list[str]:
    """Different texts of so many characters."""
    generator = random.Random(seed)
    return ["".join(generator.choices(lines, k=characters // 20))[:characters] for _ in range(number)]


def write_shard(path: Path, texts: list[str]) -> int:
    """Write JSON lines in RedPajama's form, compressed by zstd as its files are; return their size before that."""
    data = b"".join(orjson.dumps({"text": text, "meta": {"source": "code"}}) + b"\n" for text in texts)
    path.write_bytes(compress(data))
    return len(data)


def best_seconds(*functions) -> list[float]:
    """Shortest time of each function, all called in turn ``ROUNDS`` times."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for number, function in enumerate(functions):
            started = time.perf_counter()
            function()
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def parse(shard: Path) -> None:
    """Decompress a shard and parse its lines, nothing else."""
    with open_binary(str(shard)) as file:
        for line in file:
            orjson.loads(line)


def sample(shard: Path, tokenizer, ngrams: EvaluationNgrams, num_texts: int, examined_share: float) -> None:
    """One job of the sampling."""
    sample_shard(
        settings=SampleSettings(num_texts, min_tokens=4096, max_tokens=32768, seed=1, examined_share=examined_share),
        source=CorpusSource(name="benchmark", paths=[str(shard)]),
        part=(0, 1),
        tokenizer=tokenizer,
        ngrams=ngrams,
        output=ShardFiles(*(str(shard.with_name(name)) for name in ("candidates.parquet", "priorities.parquet", "card.json"))),
    )


def sample_alone(shard: Path, tokenizer: str, ngrams: str) -> None:
    """The sampling with all that it loads."""
    sample(shard, AutoTokenizer.from_pretrained(tokenizer), EvaluationNgrams(ngrams, 1), num_texts=50, examined_share=1.0)


def tokenize_alone(shard: Path, tokenizer: str, ngrams: str) -> None:
    """The tokenizing with all that it loads."""
    texts = (document.text for document in read_documents(str(shard)))
    tokenize_documents(texts, AutoTokenizer.from_pretrained(tokenizer), str(shard.with_suffix(".bin")))


def report_peak(queue, function, *arguments) -> None:
    """Call a function and report the peak of this process; getrusage would count what its parent had."""
    function(*arguments)
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    queue.put(int(peak.split()[1]) / 1024)


def peak_megabytes(function, *arguments) -> float:
    """Largest resident memory, in MiB, of a new process that calls a function."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=report_peak, args=(queue, function, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")
    return queue.get()


def measure_sampling(folder: Path, lines: list[str], tokenizer, ngrams: EvaluationNgrams) -> None:
    """Print the speed of the sampling against that of decompressing and parsing alone, and what it means for RedPajama."""
    number = 20_000
    texts = make_texts(lines, int(number * REJECTED), SHORT, seed=1) + make_texts(
        lines, round(number * (1 - REJECTED)), LONG, seed=2
    )
    random.Random(1).shuffle(texts)
    shard = folder / "shard.jsonl.zst"
    num_bytes = write_shard(shard, texts)
    print(
        f"\nSampling: {number} texts, {num_bytes / 1e6:.0f} MB of JSON lines in zstd; {REJECTED:.0%} rejected by characters.\n"
    )
    print("| | MB/s | of parsing alone | RedPajama-1T on one node of 64 cores | on 64 nodes |\n|:--|--:|--:|--:|--:|")
    runs = {
        "decompress and parse": (lambda: parse(shard), 1),
        "sample, examined_share 0.0025": (lambda: sample(shard, tokenizer, ngrams, 1000, 0.0025), 1),
        "sample, examined_share 0.01": (lambda: sample(shard, tokenizer, ngrams, 1000, 0.01), 1),
        "sample, examined_share 1": (lambda: sample(shard, tokenizer, ngrams, 1000, 1.0), os.cpu_count()),
    }
    times = best_seconds(*(function for function, _ in runs.values()))
    for (name, (_, cores)), seconds in zip(runs.items(), times, strict=True):
        hours = CORPUS_BYTES / (num_bytes / seconds / cores * CORES_PER_NODE) / 3600
        print(f"| {name} | {num_bytes / seconds / 1e6:.0f} | {times[0] / seconds:.0%} | {hours:.1f} h | {hours / 64:.2f} h |")


def measure_tokenizing(folder: Path, lines: list[str], tokenizer) -> None:
    """Print the speed of the tokenizing stage against the bare library's."""
    texts = make_texts(lines, 300, LONG, seed=3)
    backend = AutoTokenizer.from_pretrained(tokenizer.name_or_path).backend_tokenizer

    def bare(encode) -> None:
        for batch in batches(texts):
            encode(batch, add_special_tokens=False)

    stage, plain, fast = best_seconds(
        lambda: tokenize_documents(texts, tokenizer, str(folder / "corpus.bin")),
        lambda: bare(backend.encode_batch),
        lambda: bare(backend.encode_batch_fast),
    )
    size = sum(map(len, texts)) / 1e6
    print(f"\nTokenizing: {size:.0f} MB of text.\n\n| | MB/s | the stage in ratio |\n|:--|--:|--:|")
    print(f"| tokenize_corpus, its .bin written | {size / stage:.1f} | |")
    print(f"| tokenizers, encode_batch | {size / plain:.1f} | {plain / stage:.0%} |")
    print(f"| tokenizers, encode_batch_fast (no offsets) | {size / fast:.1f} | {fast / stage:.0%} |")


def measure_memory(folder: Path, lines: list[str], tokenizer: str, ngrams: str) -> None:
    """Print the peak memory of both stages on some data and on ten times as much."""
    shards = [folder / f"{number}.jsonl.zst" for number in (300, 3000)]
    sizes = [write_shard(shard, make_texts(lines, int(shard.name.split(".")[0]), LONG, seed=4)) / 1e6 for shard in shards]
    print(f"\nPeak memory on {sizes[0]:.0f} MB and on {sizes[1]:.0f} MB of texts within the range.\n")
    print("| | MiB | MiB on ten times the data | ratio |\n|:--|--:|--:|--:|")
    for function in (sample_alone, tokenize_alone):
        small, large = (peak_megabytes(function, shard, tokenizer, ngrams) for shard in shards)
        print(f"| {function.__name__.removesuffix('_alone')} | {small:.0f} | {large:.0f} | {large / small:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or hub id of a tokenizer")
    tokenizer = parser.parse_args().tokenizer
    documents = [document for path in sorted(CORPUS.glob("corpus-*")) for document in read_documents(str(path))]
    lines = [f"{line}\n" for document in documents for line in document.text.splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if tokenizer is None:
            tokenizer = str(folder / "tokenizer")
            train_tokenizer(make_texts(lines, 100, LONG, seed=5), vocab_size=2048).save_pretrained(tokenizer)
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {len(loaded)} pieces")
        ngrams = str(folder / "ngrams.parquet")
        index_evaluation_sets({"evaluation": ["".join(lines[:5000])]}, 13, ngrams)
        gc.freeze()  # as the jobs do: passes over all that is imported are no part of their time
        measure_sampling(folder, lines, loaded, EvaluationNgrams(ngrams, 1))
        measure_tokenizing(folder, lines, loaded)
        measure_memory(folder, lines, tokenizer, ngrams)


if __name__ == "__main__":
    main()
