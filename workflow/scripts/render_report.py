"""Render the report of the experiment.

Reads its tables (Markdown, CSV), plots (SVG) and records (JSON), and the measured times of its jobs; writes one HTML file.
"""

from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.jobs.machine import checkout, versions
from longqlora.reporting.html_report import render_report
from longqlora.reporting.report_sources import Sources

with job_log(snakemake.log[0]):
    sources = Sources(
        results=Path(snakemake.params.results),
        files=[*snakemake.input, *snakemake.params.extras],
        experiment=snakemake.params.experiment,
        base=snakemake.params.base,
        jobs=frozenset(snakemake.params.jobs),
        checkout=checkout(),
        versions=versions(),
    )
    render_report(sources, snakemake.output.html)
