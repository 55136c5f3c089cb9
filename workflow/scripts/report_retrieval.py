"""Report retrieval accuracy: a table, and a heat map by context length and depth.

Reads the records of all systems and context lengths (JSON); writes CSV, Markdown, HTML, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.html_tables import write_html
from longqlora.reporting.retrieval_report import plot_retrieval, read_retrieval, render_retrieval

with job_log(snakemake.log[0]):
    cells = read_retrieval(snakemake.input.records, snakemake.params.labels)
    render_retrieval(cells, csv=snakemake.output.csv, markdown=snakemake.output.markdown)
    plot_retrieval(cells, [snakemake.output.png, snakemake.output.svg])
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
