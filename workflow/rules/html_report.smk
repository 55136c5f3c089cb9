# The report of the experiment: what all other jobs left, in one HTML file.

DESIGN = [Path(workflow.basedir) / "longqlora/reporting" / name for name in ("report.html.jinja", "report.css")]
LENGTHS_OF_JOBS = map(str, {*LENGTHS, *EXPERIMENT.retrieval_lengths})
SCALINGS = [Path(record).stem for record in map(scaling_record, SYSTEMS) if record]
JOBS = {*SYSTEMS, *DATASETS, *LENGTHS_OF_JOBS, *SCALINGS, *HARNESS, *EXPERIMENT.ablations, *(SHARDS if CORPUS else [])}


def parts_of_report():
    """Tables, plots and records that the report shows: those of the default targets."""
    parts = [rules.render_table.output, rules.plot_perplexity.output, rules.plot_loss_by_position.output]
    parts += [rules.report_retrieval.output] if EXPERIMENT.retrieval.tasks else []
    parts += [rules.report_harness.output] if HARNESS else []
    parts += [rules.sample_corpus.output.card, rules.plot_text_lengths.output] if CORPUS else []
    parts += [rules.build_sft_set.output.card, rules.plot_sft_shares.output] if SFT else []
    parts += [rules.report_answers.input, rules.report_answers.output] if CHAT else []
    parts += [rules.plot_loss.input, rules.plot_loss.output] if LISTED_TRAINED else []
    parts += [f"{RESULTS}/merges/{name}.json" for name in LISTED_TRAINED if name in ADAPTED]
    return parts


def ablations_that_are_there():
    """Tables and plots of ablations that were made before; the report does not ask for them, because `all` does not."""
    made = expand([rules.report_ablation.output.markdown, rules.report_ablation.output.svg], ablation=EXPERIMENT.ablations)
    return [path for path in made if Path(path).is_file()]


rule render_report:
    input:
        parts_of_report(),
        rules.train.input,  # last, because the report has the time of all jobs
    output:
        html=report(
            f"{RESULTS}/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"content": "all results on one page"},
        ),
    log:
        f"{RESULTS}/logs/render_report.log",
    benchmark:
        f"{RESULTS}/benchmarks/render_report.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("render_report"),
        design=dict(zip([path.name for path in DESIGN], FACTS.find("sha256", DESIGN, digest_of_file))),
        configuration=digest_of_values(EXPERIMENT.model_dump(mode="json")),
        contents=FACTS.fingerprint(ablations_that_are_there()),
        base=labels_of_rows()["system"].get(EXPERIMENT.base_row),
        # Snakemake does not compare params that are functions of the input; the digests above stand for them
        experiment=lambda wildcards, input: EXPERIMENT.model_dump(mode="json"),
        extras=lambda wildcards, input: ablations_that_are_there(),
        results=lambda wildcards, input: RESULTS,
        jobs=lambda wildcards, input: sorted(JOBS),
    message:
        "write the report"
    script:
        "../scripts/render_report.py"
