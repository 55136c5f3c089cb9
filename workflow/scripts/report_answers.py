"""Report the losses of fine-tuned systems on the answers of held-out conversations, and their sample answers.

Reads the records of all fine-tuned systems (JSON); writes the table as CSV, Markdown, HTML and LaTeX, and a Markdown file of
sample answers for each system.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.answer_report import read_answers, render_answers, write_samples
from longqlora.reporting.html_tables import write_html

with job_log(snakemake.log[0]):
    table = read_answers(snakemake.input.records, snakemake.params.labels)
    render_answers(table, csv=snakemake.output.csv, markdown=snakemake.output.markdown, latex=snakemake.output.latex)
    write_samples(table, snakemake.input.records, snakemake.output.samples)
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
