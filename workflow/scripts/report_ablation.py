"""Report one ablation: a row of the table for each combination of settings.

Reads the JSON records of its cells and what each window lost (Parquet); writes CSV, Markdown, LaTeX, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.plots import plot_ablation
from longqlora.reporting.tables import render_ablation

with job_log(snakemake.log[0]):
    shown = {
        "records": snakemake.input.records,
        "ablation": snakemake.params.ablation,
        "labels": snakemake.params.labels,
    }
    render_ablation(
        **shown,
        windows=snakemake.input.windows,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
    )
    plot_ablation(**shown, outputs=[snakemake.output.png, snakemake.output.svg])
