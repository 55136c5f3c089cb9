"""Report retrieval accuracy: a table, and a heat map by context length and depth.

Reads the JSON records of all systems and context lengths; writes CSV, Markdown, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.plots import plot_retrieval
from longqlora.reporting.tables import render_retrieval

with job_log(snakemake.log[0]):
    shown = {"records": snakemake.input.records, "labels": snakemake.params.labels}
    render_retrieval(**shown, csv=snakemake.output.csv, markdown=snakemake.output.markdown)
    plot_retrieval(**shown, outputs=[snakemake.output.png, snakemake.output.svg])
