# What is trained per system, and the model that anybody can load.

TRAINING_DATA = {"corpus": rules.tokenize_corpus.output.tokens, "sft": rules.tokenize_sft.output.tokens}
SIDE_BY_SIDE = 1 if GPUS else max(1, len(TRAINED))  # on a CPU, small models make more of the cores side by side


rule train_adapter:
    input:
        data=lambda wildcards: TRAINING_DATA[SYSTEMS[wildcards.system]["training"]["data"]],
        base_model=local_model(BASE_MODEL),
        code=code_of("train"),
    output:
        trained=directory(f"{RESULTS}/adapters/{{system}}"),
        events=directory(f"{RESULTS}/tensorboard/{{system}}"),
        card=f"{RESULTS}/training/{{system}}.json",
    log:
        f"{RESULTS}/logs/train/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{{system}}.tsv"
    wildcard_constraints:
        system=one_of(ADAPTED),
    retries: 2  # each goes on from the last checkpoint
    conda:
        "../../environment.yml"
    threads: max(1, workflow.cores // SIDE_BY_SIDE)
    resources:
        gpu=lambda wildcards: GPUS * SYSTEMS[wildcards.system]["training"]["num_processes"],
    params:
        base_model=base_model,
        label=lambda wildcards: SYSTEMS[wildcards.system]["label"],
        context_length=lambda wildcards: SYSTEMS[wildcards.system]["context_length"],
        rope_scaling=lambda wildcards: SYSTEMS[wildcards.system]["rope_scaling"],
        settings=lambda wildcards: SYSTEMS[wildcards.system]["training"],
        seed=experiment["seed"],
        device=experiment["device"],
        work=lambda wildcards: f"{RESULTS}/checkpoints/{wildcards.system}",  # no output: it outlives a job that fails
    script:
        "../scripts/train.py"


use rule train_adapter as train_model with:
    output:
        trained=directory(f"{RESULTS}/models/{{system}}"),
        events=directory(f"{RESULTS}/tensorboard/{{system}}"),
        card=f"{RESULTS}/training/{{system}}.json",
    wildcard_constraints:
        system=one_of(WHOLE),


rule merge_adapter:
    input:
        adapter=rules.train_adapter.output.trained,
        card=rules.train_adapter.output.card,
        base_model=local_model(BASE_MODEL),
        sample=expand(rules.prepare_evaluation_set.output.tokens, dataset=list(DATASETS)[0]),
        description=expand(rules.prepare_evaluation_set.output.description, dataset=list(DATASETS)[0]),
        code=code_of("merge_adapter"),
    output:
        model=directory(f"{RESULTS}/models/{{system}}"),
    log:
        f"{RESULTS}/logs/merge_adapter/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/merge_adapter/{{system}}.tsv"
    wildcard_constraints:
        system=one_of(ADAPTED),
    conda:
        "../../environment.yml"
    resources:
        gpu=GPUS,
    params:
        base_model=base_model,
        label=lambda wildcards: SYSTEMS[wildcards.system]["label"],
        device=experiment["device"],
    script:
        "../scripts/merge_adapter.py"


rule train:
    input:
        expand(f"{RESULTS}/models/{{system}}", system=TRAINED_ROWS),
    localrule: True
