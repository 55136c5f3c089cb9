# Tables and plots of the records; no model is needed.


CHOSEN = {  # rows with rope_scaling: best, by the record of their choice
    record: [name for name in TABLE_SYSTEMS if scaling_record(name) == record]
    for record in filter(None, map(scaling_record, TABLE_SYSTEMS))
}


rule render_table:
    input:
        records=rules.evaluate.input.perplexity,
        windows=window_losses(rules.evaluate.input.perplexity),
        retrieval=rules.evaluate.input.retrieval,
        scalings=list(CHOSEN),
    output:
        csv=f"{RESULTS}/tables/perplexity.csv",
        markdown=f"{RESULTS}/tables/perplexity.md",
        html=report(
            f"{RESULTS}/tables/perplexity.html",
            caption="../report/table_perplexity.rst",
            category="Perplexity",
            labels={"content": "table"},
        ),
        latex=f"{RESULTS}/tables/perplexity.tex",
        differences=f"{RESULTS}/tables/differences.csv",
    log:
        f"{RESULTS}/logs/render_table.log",
    benchmark:
        f"{RESULTS}/benchmarks/render_table.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("render_table"),
        labels=labels_of_rows(),
        published=[row.model_dump() for row in EXPERIMENT.published],
        base=EXPERIMENT.base_row,
        extended=EXPERIMENT.extended_rows,
        chosen=list(CHOSEN.values()),
    message:
        "table of perplexity and retrieval"
    script:
        "../scripts/render_table.py"


rule plot_perplexity:
    input:
        records=rules.evaluate.input.perplexity,
    output:
        png=f"{RESULTS}/plots/perplexity.png",
        svg=report(
            f"{RESULTS}/plots/perplexity.svg",
            caption="../report/perplexity.rst",
            category="Perplexity",
            labels={"content": "by context length"},
        ),
    log:
        f"{RESULTS}/logs/plot_perplexity.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_perplexity.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("plot_perplexity"),
        labels=labels_of_rows(),
        published=[row.model_dump() for row in EXPERIMENT.published],
    message:
        "plot perplexity"
    script:
        "../scripts/plot_perplexity.py"


rule plot_loss_by_position:
    input:
        records=rules.evaluate.input.perplexity,
    output:
        csv=f"{RESULTS}/tables/loss_by_position.csv",
        png=f"{RESULTS}/plots/loss_by_position.png",
        svg=report(
            f"{RESULTS}/plots/loss_by_position.svg",
            caption="../report/loss_by_position.rst",
            category="Perplexity",
            labels={"content": "by position"},
        ),
    log:
        f"{RESULTS}/logs/plot_loss_by_position.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_loss_by_position.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("plot_loss_by_position"),
        labels=labels_of_rows(),
    message:
        "plot the loss by position"
    script:
        "../scripts/plot_loss_by_position.py"


rule report_retrieval:
    input:
        records=rules.evaluate.input.retrieval,
    output:
        csv=f"{RESULTS}/tables/retrieval.csv",
        markdown=f"{RESULTS}/tables/retrieval.md",
        html=report(
            f"{RESULTS}/tables/retrieval.html",
            caption="../report/table_retrieval.rst",
            category="Retrieval",
            labels={"content": "table"},
        ),
        png=f"{RESULTS}/plots/retrieval.png",
        svg=report(
            f"{RESULTS}/plots/retrieval.svg",
            caption="../report/retrieval.rst",
            category="Retrieval",
            labels={"content": "by length and depth"},
        ),
    log:
        f"{RESULTS}/logs/report_retrieval.log",
    benchmark:
        f"{RESULTS}/benchmarks/report_retrieval.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("report_retrieval"),
        labels=labels_of(TABLE_SYSTEMS),
    message:
        "table and plot of retrieval"
    script:
        "../scripts/report_retrieval.py"


if HARNESS:

    rule report_harness:
        input:
            records=expand(rules.evaluate_harness.output.record, system=EXPERIMENT.harness_rows, task=HARNESS),
        output:
            csv=f"{RESULTS}/tables/harness.csv",
            markdown=f"{RESULTS}/tables/harness.md",
            html=report(
                f"{RESULTS}/tables/harness.html",
                caption="../report/table_harness.rst",
                category="Tasks of lm-evaluation-harness",
                labels={"content": "table"},
            ),
        log:
            f"{RESULTS}/logs/report_harness.log",
        benchmark:
            f"{RESULTS}/benchmarks/report_harness.tsv"
        conda:
            "../../environment.yml"
        resources:
            **REPORTING,
        params:
            *code_of("report_harness"),
            labels=labels_of_rows(),
            base=EXPERIMENT.base_row,
        message:
            "table of the tasks of lm-evaluation-harness"
        script:
            "../scripts/report_harness.py"


if CHAT:

    rule report_answers:
        input:
            records=expand(rules.evaluate_answers.output.record, system=CHAT),
        output:
            csv=f"{RESULTS}/tables/answers.csv",
            markdown=f"{RESULTS}/tables/answers.md",
            html=report(
                f"{RESULTS}/tables/answers.html",
                caption="../report/table_answers.rst",
                category="Answers",
                labels={"content": "table"},
            ),
            latex=f"{RESULTS}/tables/answers.tex",
            samples=expand(f"{RESULTS}/answers/{{system}}.md", system=CHAT),
        log:
            f"{RESULTS}/logs/report_answers.log",
        benchmark:
            f"{RESULTS}/benchmarks/report_answers.tsv"
        conda:
            "../../environment.yml"
        resources:
            **REPORTING,
        params:
            *code_of("report_answers"),
            labels={system: SYSTEMS[system].label for system in CHAT},
        message:
            "table of answers"
        script:
            "../scripts/report_answers.py"


rule plot_loss:
    input:
        cards=expand(f"{RESULTS}/training/{{system}}.json", system=LISTED_TRAINED),
    output:
        csv=f"{RESULTS}/tables/loss.csv",
        png=f"{RESULTS}/plots/loss.png",
        svg=report(
            f"{RESULTS}/plots/loss.svg",
            caption="../report/loss.rst",
            category="Training",
            labels={"content": "loss"},
        ),
    log:
        f"{RESULTS}/logs/plot_loss.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_loss.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("plot_loss"),
        labels={system: SYSTEMS[system].label for system in LISTED_TRAINED},
    message:
        "plot the training losses"
    script:
        "../scripts/plot_loss.py"


rule report_ablation:
    input:
        records=ablation_records,
        windows=lambda wildcards: window_losses(ablation_records(wildcards)),
    output:
        csv=f"{RESULTS}/tables/ablations/{{ablation}}.csv",
        markdown=f"{RESULTS}/tables/ablations/{{ablation}}.md",
        html=report(
            f"{RESULTS}/tables/ablations/{{ablation}}.html",
            caption="../report/table_ablation.rst",
            category="Ablations",
            labels={"ablation": "{ablation}", "content": "table"},
        ),
        latex=f"{RESULTS}/tables/ablations/{{ablation}}.tex",
        png=f"{RESULTS}/plots/ablations/{{ablation}}.png",
        svg=report(
            f"{RESULTS}/plots/ablations/{{ablation}}.svg",
            caption="../report/ablation.rst",
            category="Ablations",
            labels={"ablation": "{ablation}", "content": "plot"},
        ),
    log:
        f"{RESULTS}/logs/report_ablation/{{ablation}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/report_ablation/{{ablation}}.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("report_ablation"),
        labels=lambda wildcards: labels_of(EXPERIMENT.ablations[wildcards.ablation].rows),
        ablation=lambda wildcards: EXPERIMENT.ablations[wildcards.ablation].model_dump(),
    message:
        "table and plot of the ablation {wildcards.ablation}"
    script:
        "../scripts/report_ablation.py"


rule ablations:
    input:
        ablation_reports,
    localrule: True


rule perplexity_report:
    input:
        rules.render_table.output,
        rules.plot_perplexity.output,
        rules.plot_loss_by_position.output,
        rules.report_retrieval.output if EXPERIMENT.retrieval.tasks else [],
    localrule: True


rule answers:
    input:
        answer_reports,
    localrule: True
