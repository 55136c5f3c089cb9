"""Plot the lengths of the sampled texts.

Reads the sample (Parquet); writes PNG and SVG.
"""

from longqlora.jobs.log import job_log

from longqlora.reporting.distributions import plot_text_lengths

with job_log(snakemake.log[0]):
    plot_text_lengths(texts=snakemake.input.texts, outputs=[snakemake.output.png, snakemake.output.svg])
