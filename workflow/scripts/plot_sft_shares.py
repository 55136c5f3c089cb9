"""Plot the composition of the instruction set.

Reads its data card (JSON); writes PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.distributions import plot_sft_shares

with job_log(snakemake.log[0]):
    plot_sft_shares(card=snakemake.input.card, outputs=[snakemake.output.png, snakemake.output.svg])
