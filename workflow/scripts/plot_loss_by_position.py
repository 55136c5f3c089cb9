"""Plot the loss against the position in the window, at the longest context length.

Reads the records of all cells (JSON); writes the losses at every context length (CSV), and the plot (PNG and SVG).
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.plots import loss_by_position, plot_loss_by_position
from longqlora.reporting.records import mean_over_seeds, read_records

with job_log(snakemake.log[0]):
    losses = loss_by_position(mean_over_seeds(read_records(snakemake.input.records, snakemake.params.labels)))
    losses.to_csv(snakemake.output.csv, index=False)
    plot_loss_by_position(losses, [snakemake.output.png, snakemake.output.svg])
