"""Report one ablation: a row of the table for each combination of settings.

Reads the records of its cells (JSON) and the losses of their windows (Parquet); writes CSV, Markdown, HTML, LaTeX, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.config.settings import Ablation
from longqlora.reporting.ablation_report import plot_ablation, read_ablation, render_ablation
from longqlora.reporting.html_tables import write_html

with job_log(snakemake.log[0]):
    ablation = Ablation(**snakemake.params.ablation)
    cells = read_ablation(snakemake.input.records, ablation, snakemake.params.labels)
    render_ablation(
        cells,
        snakemake.input.windows,
        ablation.label,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
    )
    plot_ablation(cells, ablation.axes, [snakemake.output.png, snakemake.output.svg])
    write_html(snakemake.output.html, markdown=snakemake.output.markdown)
