"""Write the folder of a published model.

Reads the weights of a trained system, its training card and, where an adapter was merged, the merge report, and those of the
systems that it was trained on; writes the folder with weights, tokenizer, generation settings and model card. The weights are
hard links, which take no further disk space.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.publishing.model_card import Stage
from longqlora.publishing.model_folder import publish_model

with job_log(snakemake.log[0]):
    reports = {Path(file).stem: json.loads(Path(file).read_text(encoding="utf-8")) for file in snakemake.input.reports}
    cards = {Path(file).stem: json.loads(Path(file).read_text(encoding="utf-8")) for file in snakemake.input.cards}
    publish_model(
        weights=snakemake.input.weights,
        output=snakemake.output.model,
        base_model=snakemake.params.base_model,
        tokenizer=snakemake.params.tokenizer,
        stages=[Stage(label, cards[name], reports.get(name)) for name, label in snakemake.params.labels.items()],
    )
