"""Write the folder of a published model.

Reads the weights of a trained system, its training card and, where an adapter was merged, the merge report; writes the folder
with weights, tokenizer, generation settings and model card. The weights are hard links, which take no further disk space.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.publishing.model_folder import publish_model

with job_log(snakemake.log[0]):
    publish_model(
        weights=snakemake.input.weights,
        output=snakemake.output.model,
        base_model=snakemake.params.base_model,
        tokenizer=snakemake.params.tokenizer,
        label=snakemake.params.label,
        card=json.loads(Path(snakemake.input.card).read_text(encoding="utf-8")),
        report=json.loads(Path(snakemake.input.report).read_text(encoding="utf-8")) if snakemake.input.report else None,
    )
