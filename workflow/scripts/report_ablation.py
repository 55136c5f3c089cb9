"""Report one ablation: a row of the table for each combination of settings.

Reads the JSON records of its cells and what each window lost (Parquet); writes CSV, Markdown, LaTeX, PNG and SVG.
"""

from longqlora.joblog import job_log

from longqlora.plots import plot_ablation
from longqlora.tables import render_ablation

with job_log(snakemake.log[0]):
    ablation = snakemake.params.ablation
    render_ablation(
        records=snakemake.input.records,
        windows=snakemake.input.windows,
        ablation=ablation,
        csv=snakemake.output.csv,
        markdown=snakemake.output.markdown,
        latex=snakemake.output.latex,
    )
    plot_ablation(records=snakemake.input.records, ablation=ablation, outputs=[snakemake.output.png, snakemake.output.svg])
