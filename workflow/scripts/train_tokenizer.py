"""Train the demo's tokenizer.

Reads corpus shards; writes the folder of a byte-level BPE tokenizer.
"""

from longqlora.jobs.log import job_log

from longqlora.data.readers import read_documents
from longqlora.training.pretraining import train_tokenizer

with job_log(snakemake.log[0]):
    texts = (document.text for shard in snakemake.input.shards for document in read_documents(shard))
    train_tokenizer(texts, snakemake.params.vocab_size).save_pretrained(snakemake.output.tokenizer)
