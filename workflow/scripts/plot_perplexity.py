"""Plot perplexity against context length.

Reads the records of all cells (JSON); writes PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.plots import plot_perplexity

with job_log(snakemake.log[0]):
    plot_perplexity(
        records=snakemake.input.records,
        labels=snakemake.params.labels,
        published=snakemake.params.published,
        outputs=[snakemake.output.png, snakemake.output.svg],
    )
