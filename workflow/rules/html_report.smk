# The report of the experiment: what all other jobs left, in one HTML file.

DESIGN = [PROJECT / "longqlora/reporting" / name for name in ("report.html.jinja", "report.css")]
LENGTHS_OF_JOBS = map(str, {*LENGTHS, *EXPERIMENT.retrieval_lengths})
SCALINGS = [Path(record).stem for record in map(scaling_record, SYSTEMS) if record]
SERVED = expand("{system}-{format}", system=EXPERIMENT.served, format=EXPERIMENT.serving.gguf if EXPERIMENT.serving else [])
JOBS = {*SYSTEMS, *DATASETS, *LENGTHS_OF_JOBS, *SCALINGS, *HARNESS, *EXPERIMENT.ablations, *SERVED, *(SHARDS if CORPUS else [])}
PARTS = [  # tables, plots and records that the report shows: those of the default targets
    [rules.render_table.output, rules.plot_perplexity.output, rules.plot_loss_by_position.output],
    rules.report_retrieval.output if EXPERIMENT.retrieval.tasks else [],
    rules.report_harness.output if HARNESS else [],
    [rules.sample_corpus.output.card, rules.plot_text_lengths.output] if CORPUS else [],
    [rules.build_sft_set.output.card, rules.plot_sft_shares.output] if SFT else [],
    [rules.report_answers.input, rules.report_answers.output] if CHAT else [],
    [rules.plot_loss.input, rules.plot_loss.output] if LISTED_TRAINED else [],
    rules.report_serving.output if EXPERIMENT.serving else [],
    [f"{RESULTS}/merges/{name}.json" for name in LISTED_TRAINED if name in ADAPTED],
]
ABLATIONS = [rules.report_ablation.output.markdown, rules.report_ablation.output.svg]
MADE_ABLATIONS = [path for path in expand(ABLATIONS, ablation=EXPERIMENT.ablations) if Path(path).is_file()]


rule render_report:
    input:
        PARTS,
        ancient(rules.plan_run.output),  # a newer plan changes no result
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
    resources:
        **REPORTING,
    params:
        *code_of("render_report"),
        design=dict(zip([path.name for path in DESIGN], FACTS.find("sha256", DESIGN, digest_of_file))),
        configuration=digest_of_values(EXPERIMENT.model_dump(mode="json")),
        ablations=FACTS.fingerprint(MADE_ABLATIONS),  # shown if they are there, but not made, because `all` does not make them
        base=labels_of_rows()["system"].get(EXPERIMENT.base_row),
        # Snakemake does not compare params that are functions of the input; the digests above make it run again
        experiment=lambda wildcards, input: EXPERIMENT.model_dump(mode="json"),
        extras=lambda wildcards, input: MADE_ABLATIONS,
        results=lambda wildcards, input: RESULTS,
        jobs=lambda wildcards, input: sorted(JOBS),
    message:
        "write the report"
    script:
        "../scripts/render_report.py"
