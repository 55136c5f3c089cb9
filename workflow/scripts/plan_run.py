"""Plan the jobs of the experiment.

Reads the config.json of its models; writes the plan (JSON). What cannot be planned is no error: the plan says why.
"""

from longqlora.jobs.log import job_log

from longqlora.planning.command import write_plan

with job_log(snakemake.log[0]):
    write_plan(snakemake.params.experiment, snakemake.output.plan)
