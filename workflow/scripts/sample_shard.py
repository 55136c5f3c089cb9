"""Read one shard of the corpus and keep the texts that the sample may need.

Reads files (local or remote) and the n-grams of the evaluation sets. Writes the texts that are kept and the priorities of all
texts that could be sampled (Parquet), and counts (JSON). Fails if a file is damaged or has another format than expected.
"""

from longqlora.jobs.log import job_log

from longqlora.config.settings import CorpusSource
from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.shards import SampleSettings, ShardFiles, sample_shard
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    sample_shard(
        settings=SampleSettings(**snakemake.params.settings),
        source=CorpusSource(**snakemake.params.source),
        part=snakemake.params.part,
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        ngrams=EvaluationNgrams(snakemake.input.ngrams, snakemake.params.threshold),
        output=ShardFiles(snakemake.output.candidates, snakemake.output.priorities, snakemake.output.card),
    )
