"""Render the table of perplexity.

Reads the JSON records of all cells; writes CSV, Markdown and LaTeX.
"""

from longqlora.joblog import job_log

from longqlora.tables import render_table

with job_log(snakemake.log[0]):
    render_table(
        records=snakemake.input.records,
        published=snakemake.params.published,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
    )
