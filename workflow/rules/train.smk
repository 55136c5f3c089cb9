# The training of each system, and the model folder that is published.

CORES_PER_PROCESS = 4 if GPUS else 1  # --set-threads train_adapter=8 gives other numbers


rule choose_scaling:
    input:
        data=lambda wildcards: getattr(rules, f"tokenize_{wildcards.data}").output.tokens,
        base_model=made_model(BASE_MODEL),
    output:
        record=f"{RESULTS}/scalings/{{target}}-{{data}}-{{precision}}.json",
    log:
        f"{RESULTS}/logs/choose_scaling/{{target}}-{{data}}-{{precision}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/choose_scaling/{{target}}-{{data}}-{{precision}}.tsv"
    wildcard_constraints:
        target=r"\d+",
        data="corpus|sft",
        precision="[a-z0-9]+",
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **planned("perplexity", runtime=240, system=first_with_scaling),
        gpu=GPUS,
    params:
        *code_of("choose_scaling"),
        base_model=base_model,
        base_model_contents=contents_of_model(BASE_MODEL),
        device=EXPERIMENT.device,
    message:
        "choose the scaling to {wildcards.target} tokens"
    script:
        "../scripts/choose_scaling.py"


rule train_adapter:
    input:
        data=training_data,
        base_model=made_trained_model,
        scaling=scaling_of,
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
    retries: 2  # each resumes from the last checkpoint
    conda:
        "../../environment.yml"
    threads: lambda wildcards: CORES_PER_PROCESS * SYSTEMS[wildcards.system].training.num_processes
    resources:
        **planned("training"),
        **on_several_nodes(),
        gpu=lambda wildcards: GPUS * num_processes(wildcards),
    params:
        *code_of("train"),
        base_model=trained_model,
        base_model_contents=contents_of_trained,
        extension=lambda wildcards: extension_of(SYSTEMS[wildcards.system]).model_dump(),
        settings=lookup("{system}/training", within=SYSTEM_VALUES),
        seed=lambda wildcards: {"seed": SYSTEMS[wildcards.system].seed},
        device=EXPERIMENT.device,
        # Snakemake does not compare params that are functions of the input; these three do not change what is trained
        progress=lambda wildcards, input: SYSTEM_VALUES[wildcards.system]["progress"],
        data=lambda wildcards, input: without_storage(input.data),
        checkpoint_dir=lambda wildcards, input: f"{RESULTS}/checkpoints/{wildcards.system}",  # kept when the job fails
    message:
        "train {wildcards.system}"
    script:
        "../scripts/train.py"


use rule train_adapter as train_model with:
    output:
        trained=directory(f"{RESULTS}/weights/{{system}}"),
        events=directory(f"{RESULTS}/tensorboard/{{system}}"),
        card=f"{RESULTS}/training/{{system}}.json",
    wildcard_constraints:
        system=one_of(FULL_FINETUNED),


rule merge_adapter:
    input:
        adapter=rules.train_adapter.output.trained,
        card=rules.train_adapter.output.card,
        data=training_data,
        base_model=made_trained_model,
    output:
        weights=directory(f"{RESULTS}/weights/{{system}}"),
        report=f"{RESULTS}/merges/{{system}}.json",
    log:
        f"{RESULTS}/logs/merge_adapter/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/merge_adapter/{{system}}.tsv"
    wildcard_constraints:
        system=one_of(ADAPTED),
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **planned("merging"),
        gpu=GPUS,
    params:
        *code_of("merge_adapter"),
        base_model_contents=contents_of_trained,
        settings=EXPERIMENT.merge.model_dump(),
        device=EXPERIMENT.device,
    message:
        "merge {wildcards.system} into one model"
    script:
        "../scripts/merge_adapter.py"


rule publish_model:
    input:
        weights=f"{RESULTS}/weights/{{system}}",
        cards=lambda wildcards: files_of_stages(wildcards, "training", TRAINED),
        reports=lambda wildcards: files_of_stages(wildcards, "merges", ADAPTED),
        base_model=made_model(BASE_MODEL),
        tokenizer=made_model(TOKENIZER),
    output:
        model=directory(f"{RESULTS}/models/{{system}}"),
    log:
        f"{RESULTS}/logs/publish_model/{{system}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/publish_model/{{system}}.tsv"
    wildcard_constraints:
        system=one_of(TRAINED),
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=2000, runtime=60),
    params:
        *code_of("publish_model"),
        base_model=base_model,
        generation_settings=contents_of_generation_settings(BASE_MODEL),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
        labels=lambda wildcards: {name: SYSTEMS[name].label for name in EXPERIMENT.stages_of(wildcards.system)},
    message:
        "write the model folder of {wildcards.system}"
    script:
        "../scripts/publish_model.py"


rule train:
    input:
        expand(f"{RESULTS}/models/{{system}}", system=LISTED_TRAINED),
    localrule: True
