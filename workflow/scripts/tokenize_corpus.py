"""Tokenize the sampled texts.

Reads the sample (Parquet). Writes one stream of token ids (``.bin``) and its description (JSON).
"""

from longqlora.jobs.log import job_log

from longqlora.data.readers import read_documents
from longqlora.data.token_files import tokenize_documents
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    tokenize_documents(
        texts=(document.text for document in read_documents(snakemake.input.texts)),
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        output=snakemake.output.tokens,
    )
