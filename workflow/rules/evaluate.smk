# One small JSON record per cell of the table: {system, dataset, length}.


rule evaluate_perplexity:
    input:
        model=lambda wildcards: local_model(evaluated_model(wildcards)),
        tokens=rules.prepare_evaluation_set.output.tokens,
        description=rules.prepare_evaluation_set.output.description,
        code=code_of("evaluate_perplexity"),
    output:
        record=f"{RESULTS}/perplexity/{{system}}/{{dataset}}/{{length}}.json",
    log:
        f"{RESULTS}/logs/evaluate_perplexity/{{system}}/{{dataset}}/{{length}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_perplexity/{{system}}/{{dataset}}/{{length}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=GPUS,
    params:
        label=lambda wildcards: SYSTEMS[wildcards.system]["label"],
        dataset_label=lambda wildcards: DATASETS[wildcards.dataset]["label"],
        model=evaluated_model,
        rope_context=untrained_context,
        stride=lambda wildcards: experiment["evaluation"]["stride"] or int(wildcards.length),
        precision=experiment["evaluation"]["precision"],
        device=experiment["device"],
    script:
        "../scripts/evaluate_perplexity.py"


rule evaluate:
    input:
        expand(rules.evaluate_perplexity.output.record, system=SYSTEMS, dataset=DATASETS, length=LENGTHS),
    localrule: True
