"""Report how llama.cpp's GGUF files compare with the models that they were made from.

Reads the records of the serving check (JSON); writes the table as CSV, Markdown and HTML.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.html_tables import write_html
from longqlora.reporting.serving_report import read_serving, render_serving

with job_log(snakemake.log[0]):
    rows = read_serving(snakemake.input.records, snakemake.params.labels)
    render_serving(rows, csv=snakemake.output.csv, markdown=snakemake.output.markdown)
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
