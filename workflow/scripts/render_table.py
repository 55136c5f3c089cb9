"""Render the table of perplexity and retrieval.

Reads the records of all cells (JSON), the losses of their windows (Parquet), the records of retrieval and those of chosen RoPE
scalings (JSON); writes CSV, Markdown, HTML and LaTeX, and the differences between all pairs of systems with their confidence
intervals (CSV).
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.html_tables import write_html
from longqlora.reporting.tables import read_results, render_table

with job_log(snakemake.log[0]):
    results = read_results(
        records=snakemake.input.records,
        windows=snakemake.input.windows,
        retrieval=snakemake.input.retrieval,
        choices=dict(zip(snakemake.input.scalings, snakemake.params.chosen, strict=True)),
        labels=snakemake.params.labels,
        published=snakemake.params.published,
        base=snakemake.params.base,
        extended=snakemake.params.extended,
    )
    render_table(
        results,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
        differences_csv=snakemake.output.differences,
    )
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
