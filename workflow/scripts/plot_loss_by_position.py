"""Plot the loss against the position in the window.

Reads the JSON records of all cells, of which those at the longest context length are shown; writes CSV, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.plots import plot_loss_by_position

with job_log(snakemake.log[0]):
    plot_loss_by_position(
        records=snakemake.input.records,
        labels=snakemake.params.labels,
        csv=snakemake.output.csv,
        outputs=[snakemake.output.png, snakemake.output.svg],
    )
