# An adapter per trained system, and the merged model that anybody can load.

TRAINING_DATA = {"corpus": rules.tokenize_corpus.output.tokens, "sft": rules.tokenize_sft.output.tokens}


rule train_adapter:
    input:
        data=lambda wildcards: TRAINING_DATA[SYSTEMS[wildcards.system]["training"]["data"]],
        base_model=local_model(BASE_MODEL),
        code=code_of("train_adapter"),
    output:
        adapter=directory(f"{RESULTS}/adapters/{{system}}"),
    log:
        f"{RESULTS}/logs/train_adapter/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_adapter/{{system}}.tsv"
    conda:
        "../../environment.yml"
    threads: workflow.cores
    resources:
        gpu=GPUS,
    params:
        base_model=base_model,
        context_length=lambda wildcards: SYSTEMS[wildcards.system]["context_length"],
        settings=lambda wildcards: SYSTEMS[wildcards.system]["training"],
        seed=experiment["seed"],
        device=experiment["device"],
    script:
        "../scripts/train_adapter.py"


rule merge_adapter:
    input:
        adapter=rules.train_adapter.output.adapter,
        base_model=local_model(BASE_MODEL),
        code=code_of("merge_adapter"),
    output:
        model=directory(f"{RESULTS}/models/{{system}}"),
    log:
        f"{RESULTS}/logs/merge_adapter/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/merge_adapter/{{system}}.tsv"
    wildcard_constraints:
        system="|".join(map(re.escape, TRAINED)) or "none",
    conda:
        "../../environment.yml"
    params:
        base_model=base_model,
        context_length=lambda wildcards: SYSTEMS[wildcards.system]["context_length"],
        is_chat_model=lambda wildcards: SYSTEMS[wildcards.system]["training"]["data"] == "sft",
    script:
        "../scripts/merge_adapter.py"


rule train:
    input:
        expand(rules.merge_adapter.output, system=TRAINED),
    localrule: True
