"""Render the table of perplexity.

Reads the JSON records of all cells, what each window lost (Parquet) and the records of retrieval; writes CSV, Markdown and
LaTeX, and the differences of all pairs of systems with their confidence intervals (CSV).
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.tables import render_table

with job_log(snakemake.log[0]):
    render_table(
        records=snakemake.input.records,
        labels=snakemake.params.labels,
        windows=snakemake.input.windows,
        retrieval=snakemake.input.retrieval,
        published=snakemake.params.published,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
        differences_csv=snakemake.output.differences,
    )
