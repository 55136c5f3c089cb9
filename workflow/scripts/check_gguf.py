"""Check that llama.cpp computes with a GGUF file what transformers computes with the published model.

Reads the file, the model folder, the training cards of the model's stages, and the training data, on whose held-out end both
are compared; writes the record (JSON). Fails if they differ by more than rounding.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.jobs.digests import stamp
from longqlora.publishing.serving_check import check_serving

with job_log(snakemake.log[0]):
    record = check_serving(
        gguf=snakemake.input.gguf,
        gguf_format=snakemake.wildcards.format,
        model=snakemake.input.model,
        data=snakemake.input.data,
        cards=[json.loads(Path(file).read_text(encoding="utf-8")) for file in snakemake.input.cards],
    )
    record = {"system": snakemake.wildcards.system} | record | stamp(snakemake.params)
    Path(snakemake.output.record).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
