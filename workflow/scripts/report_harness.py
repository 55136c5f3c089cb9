"""Report the scores of all systems on tasks of lm-evaluation-harness.

Reads the records (JSON); writes the table as CSV, Markdown and HTML.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.harness_report import read_harness, render_harness
from longqlora.reporting.html_tables import write_html

with job_log(snakemake.log[0]):
    cells = read_harness(snakemake.input.records, snakemake.params.labels, snakemake.params.base)
    render_harness(cells, csv=snakemake.output.csv, markdown=snakemake.output.markdown)
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
