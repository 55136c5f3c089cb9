# One small JSON record per cell of the table: {system, dataset, length}.


rule evaluate_perplexity:
    input:
        unpack(evaluation_tokens),
        model=lambda wildcards: local_model(evaluated_model(wildcards)),
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
        has_own_tokenizer=has_own_tokenizer,
        rope_context=untrained_context,
        rope_scaling=lambda wildcards: SYSTEMS[wildcards.system]["rope_scaling"],
        stride=lambda wildcards: experiment["evaluation"]["stride"] or int(wildcards.length),
        precision=experiment["evaluation"]["precision"],
        device=experiment["device"],
    script:
        "../scripts/evaluate_perplexity.py"


rule evaluate:
    input:
        expand(rules.evaluate_perplexity.output.record, system=SYSTEMS, dataset=DATASETS, length=LENGTHS),
    localrule: True


rule answer_held_out:
    input:
        model=f"{RESULTS}/models/{{system}}",
        records=rules.build_sft_set.output.records,
        code=code_of("answer_held_out"),
    output:
        answers=f"{RESULTS}/answers/{{system}}.json",
        markdown=f"{RESULTS}/answers/{{system}}.md",
    log:
        f"{RESULTS}/logs/answer_held_out/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/answer_held_out/{{system}}.tsv"
    wildcard_constraints:
        system=one_of(CHAT),
    conda:
        "../../environment.yml"
    resources:
        gpu=GPUS,
    params:
        held_out=SFT.get("held_out"),
        label=lambda wildcards: SYSTEMS[wildcards.system]["label"],
        device=experiment["device"],
    script:
        "../scripts/answer_held_out.py"


rule answers:
    input:
        expand(rules.answer_held_out.output, system=CHAT if SFT.get("held_out") else []),
    localrule: True
