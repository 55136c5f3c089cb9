# The inputs of the demo, made from the Python standard library: corpus, instructions, tokenizer and base model.


rule build_demo_sources:
    output:
        shards=DEMO.shards,
        evaluation_sets=list(DEMO.evaluation_sets.model_dump().values()),
        instructions=list(DEMO.instructions.model_dump().values()),
    log:
        f"{RESULTS}/logs/build_demo_sources.log",
    benchmark:
        f"{RESULTS}/benchmarks/build_demo_sources.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("build_demo_sources"),
        shards=DEMO.shards,
        evaluation_sets=DEMO.evaluation_sets.model_dump(),
        instructions=DEMO.instructions.model_dump(),
        settings={"evaluation_characters": DEMO.evaluation_characters, "seed": EXPERIMENT.seed},
    script:
        "../scripts/build_demo_sources.py"


rule train_tokenizer:
    input:
        shards=DEMO.shards,
    output:
        tokenizer=directory(TOKENIZER),
    log:
        f"{RESULTS}/logs/train_tokenizer.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_tokenizer.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("train_tokenizer"),
        vocab_size=DEMO.vocab_size,
    script:
        "../scripts/train_tokenizer.py"


rule pretrain_model:
    input:
        shards=DEMO.shards,
        tokenizer=rules.train_tokenizer.output.tokenizer,
    output:
        model=directory(f"{RESULTS}/pretrained/{{pretrained}}"),
    log:
        f"{RESULTS}/logs/pretrain_model/{{pretrained}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pretrain_model/{{pretrained}}.tsv"
    wildcard_constraints:
        pretrained=one_of(DEMO.pretrained),
    conda:
        "../../environment.yml"
    params:
        *code_of("pretrain_model"),
        settings=lambda wildcards: {
            "context_length": DEMO.pretrained[wildcards.pretrained],
            "architecture": DEMO.architecture.model_dump(),
            "pretraining": DEMO.pretraining.model_dump(),
            "seed": EXPERIMENT.seed,
        },
    script:
        "../scripts/pretrain_model.py"
