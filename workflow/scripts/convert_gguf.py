"""Write a published model as a GGUF file for llama.cpp.

Reads the model folder; writes the file. Fails if llama.cpp does not have the model's RoPE scaling, or its converter does not
know the tokenizer.
"""

from longqlora.jobs.log import job_log

from longqlora.publishing.gguf import convert

with job_log(snakemake.log[0]):
    convert(
        model=snakemake.input.model,
        output=snakemake.output.gguf,
        gguf_format=snakemake.wildcards.format,
        name=snakemake.params.label,
        converter=snakemake.params.converter,
    )
