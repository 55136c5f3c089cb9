# One small JSON record per cell of the tables: perplexity by {system, dataset, length}, retrieval by {system, length}, and answers
# by {system}. One job measures all evaluation sets, because loading a model takes longer than a small set.


if KEY_TOKENS:

    rule find_key_tokens:
        input:
            tokens=evaluation_files("tokens"),
            descriptions=evaluation_files("description"),
            model=made_folders,
            scaling=scaling_of_evaluated,
        output:
            key_tokens=expand(f"{RESULTS}/tokens/key/{{{{system}}}}/{{dataset}}.parquet", dataset=DATASETS),
        log:
            f"{RESULTS}/logs/find_key_tokens/{{system}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/find_key_tokens/{{system}}.tsv"
        wildcard_constraints:
            system=one_of([KEY_TOKENS.system]),
        retries: 2
        conda:
            "../../environment.yml"
        resources:
            **planned("perplexity", runtime=480),
            gpu=GPUS,
        params:
            *code_of("find_key_tokens"),
            model=model_of,
            model_contents=contents_of_evaluated,
            protocol=protocol_at(EXPERIMENT.evaluation, max(LENGTHS)).model_dump(),
            short_context=KEY_TOKENS.short_context,
            device=EXPERIMENT.device,
            datasets=lambda wildcards, input: list(DATASETS),
        message:
            "key tokens of the evaluation sets, by {wildcards.system}"
        script:
            "../scripts/find_key_tokens.py"


rule evaluate_perplexity:
    input:
        tokens=evaluation_files("tokens"),
        descriptions=evaluation_files("description"),
        key_tokens=key_tokens_of,
        model=made_folders,
        scaling=scaling_of_evaluated,
    output:
        records=expand(f"{RESULTS}/perplexity/{{{{system}}}}/{{dataset}}/{{{{length}}}}.json", dataset=DATASETS),
        windows=expand(f"{RESULTS}/perplexity/{{{{system}}}}/{{dataset}}/{{{{length}}}}.parquet", dataset=DATASETS),
    log:
        f"{RESULTS}/logs/evaluate_perplexity/{{system}}/{{length}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_perplexity/{{system}}/{{length}}.tsv"
    priority: -1  # trainings start first, because more jobs wait for them
    retries: 2
    conda:
        "../../environment.yml"
    threads: 1 if GPUS else EXPERIMENT.evaluation.num_processes
    resources:
        **planned("perplexity"),
        gpu=GPUS * EXPERIMENT.evaluation.num_processes,
    params:
        *code_of("evaluate_perplexity"),
        model=model_of,
        model_contents=contents_of_evaluated,
        has_own_tokenizer=has_own_tokenizer,
        evaluator=evaluator_of,
        protocol=lambda wildcards: protocol_at(EXPERIMENT.evaluation, int(wildcards.length)).model_dump(),
        device=EXPERIMENT.device,
        # Snakemake does not compare params that are functions of the input: one changes no result, the other is in the outputs
        num_processes=lambda wildcards, input: EXPERIMENT.evaluation.num_processes,
        datasets=lambda wildcards, input: list(DATASETS),
    message:
        "perplexity of {wildcards.system} at {wildcards.length} tokens"
    script:
        "../scripts/evaluate_perplexity.py"


rule evaluate_retrieval:
    input:
        tokens=evaluation_files("tokens", [EXPERIMENT.filler]),
        description=evaluation_files("description", [EXPERIMENT.filler]),
        model=made_folders,
        scaling=scaling_of_evaluated,
        untrained=lambda wildcards: made_model(first_model(wildcards)),
        tokenizer=lambda wildcards: made_model(SYSTEMS[wildcards.system].tokenizer),
    output:
        record=f"{RESULTS}/retrieval/{{system}}/{{length}}.json",
    log:
        f"{RESULTS}/logs/evaluate_retrieval/{{system}}/{{length}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_retrieval/{{system}}/{{length}}.tsv"
    priority: -1
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **planned("retrieval"),
        gpu=GPUS,
    params:
        *code_of("evaluate_retrieval"),
        model=model_of,
        model_contents=contents_of_evaluated,
        untrained=first_model,
        generation_settings=lambda wildcards: (
            contents_of_generation_settings(first_model(wildcards)) if WRITES_ANSWERS else None
        ),
        tokenizer=lookup("{system}/tokenizer", within=SYSTEM_VALUES),
        tokenizer_contents=lambda wildcards: contents_of_tokenizer(
            SYSTEMS[wildcards.system].tokenizer, with_chat_template=WRITES_ANSWERS and EXPERIMENT.retrieval.chat_template
        ),
        is_trained_to_answer=is_trained_to_answer,
        settings=EXPERIMENT.retrieval.model_dump(),
        device=EXPERIMENT.device,
    message:
        "retrieval of {wildcards.system} at {wildcards.length} tokens"
    script:
        "../scripts/evaluate_retrieval.py"


rule evaluate:
    input:
        perplexity=expand(rules.evaluate_perplexity.output.records, system=TABLE_SYSTEMS, length=LENGTHS),
        retrieval=(
            expand(rules.evaluate_retrieval.output.record, system=TABLE_SYSTEMS, length=EXPERIMENT.retrieval_lengths)
            if EXPERIMENT.retrieval.tasks
            else []
        ),
    localrule: True


if HARNESS:

    rule evaluate_harness:
        input:
            model=made_folders,
            scaling=scaling_of_evaluated,
            tokenizer=lambda wildcards: made_model(SYSTEMS[wildcards.system].tokenizer),
        output:
            record=f"{RESULTS}/harness/{{system}}/{{task}}.json",
        log:
            f"{RESULTS}/logs/evaluate_harness/{{system}}/{{task}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/evaluate_harness/{{system}}/{{task}}.tsv"
        wildcard_constraints:
            system=one_of(EXPERIMENT.harness_rows),
            task=one_of(HARNESS),
        priority: -1
        retries: 2
        conda:
            "../../environment.yml"
        resources:
            **planned("perplexity", runtime=1440),
            gpu=GPUS,
        params:
            *code_of("evaluate_harness"),
            model=model_of,
            model_contents=contents_of_evaluated,
            tokenizer=lookup("{system}/tokenizer", within=SYSTEM_VALUES),
            tokenizer_contents=lambda wildcards: contents_of_tokenizer(
                SYSTEMS[wildcards.system].tokenizer, with_chat_template=EXPERIMENT.evaluation.harness.chat_template
            ),
            is_trained_to_answer=is_trained_to_answer,
            task=lambda wildcards: HARNESS[wildcards.task],
            own_tasks=contents_of_folder(EXPERIMENT.evaluation.harness.include_path),
            settings=EXPERIMENT.evaluation.harness.model_dump(exclude={"tasks", "long_tasks", "lengths"}),
            device=EXPERIMENT.device,
        message:
            "{wildcards.task} of lm-evaluation-harness for {wildcards.system}"
        script:
            "../scripts/evaluate_harness.py"


if CHAT:

    rule evaluate_answers:
        input:
            records=rules.build_sft_set.output.records,
            base_model=made_model(BASE_MODEL),
            untrained=made_trained_model,
            model=made_folders,
            scaling=scaling_of,
            tokenizer=made_model(TOKENIZER),
        output:
            record=f"{RESULTS}/answers/{{system}}.json",
        log:
            f"{RESULTS}/logs/evaluate_answers/{{system}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/evaluate_answers/{{system}}.tsv"
        wildcard_constraints:
            system=one_of(CHAT),
        retries: 2
        conda:
            "../../environment.yml"
        resources:
            **planned("perplexity", runtime=240),
            gpu=GPUS,
        params:
            *code_of("evaluate_answers"),
            untrained=untrained_model_of,
            untrained_contents=contents_of_trained,
            base_model=lambda wildcards, input: BASE_MODEL,  # not compared: it is in untrained, or in what that was trained on
            generation_settings=contents_of_generation_settings(BASE_MODEL),  # the tokens at which it stops
            model=model_of,
            tokenizer=base_tokenizer,
            tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
            held_out=SFT.held_out,
            device=EXPERIMENT.device,
        message:
            "answers of {wildcards.system}"
        script:
            "../scripts/evaluate_answers.py"
