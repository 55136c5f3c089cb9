"""Plot the losses of the trained systems.

Reads their training cards; writes a CSV of every logged step, PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.loss_curves import plot_loss

with job_log(snakemake.log[0]):
    plot_loss(
        cards=dict(zip(snakemake.params.labels.values(), snakemake.input.cards, strict=True)),
        csv=snakemake.output.csv,
        outputs=[snakemake.output.png, snakemake.output.svg],
    )
