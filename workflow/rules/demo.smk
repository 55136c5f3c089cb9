# What the demo has in place of downloads: a corpus, instructions, a tokenizer and a base model from the standard library.

DEMO = experiment["demo"]


rule build_demo_sources:
    input:
        code=code_of("build_demo_sources"),
    output:
        shards=DEMO["shards"],
        evaluation_sets=list(DEMO["evaluation_sets"].values()),
        instructions=list(DEMO["instructions"].values()),
    log:
        f"{RESULTS}/logs/build_demo_sources.log",
    benchmark:
        f"{RESULTS}/benchmarks/build_demo_sources.tsv"
    conda:
        "../../environment.yml"
    params:
        shards=DEMO["shards"],
        evaluation_sets=DEMO["evaluation_sets"],
        instructions=DEMO["instructions"],
        evaluation_characters=DEMO["evaluation_characters"],
        seed=experiment["seed"],
    script:
        "../scripts/build_demo_sources.py"


rule train_tokenizer:
    input:
        shards=DEMO["shards"],
        code=code_of("train_tokenizer"),
    output:
        tokenizer=directory(TOKENIZER),
    log:
        f"{RESULTS}/logs/train_tokenizer.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_tokenizer.tsv"
    conda:
        "../../environment.yml"
    params:
        vocab_size=DEMO["vocab_size"],
    script:
        "../scripts/train_tokenizer.py"


rule pretrain_model:
    input:
        shards=DEMO["shards"],
        tokenizer=rules.train_tokenizer.output.tokenizer,
        code=code_of("pretrain_model"),
    output:
        model=directory(f"{RESULTS}/pretrained/{{pretrained}}"),
    log:
        f"{RESULTS}/logs/pretrain_model/{{pretrained}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pretrain_model/{{pretrained}}.tsv"
    wildcard_constraints:
        pretrained=one_of(DEMO["pretrained"]),
    conda:
        "../../environment.yml"
    threads: max(1, workflow.cores // len(DEMO["pretrained"]))  # side by side, small models make more of the cores
    params:
        context_length=lambda wildcards: DEMO["pretrained"][wildcards.pretrained],
        architecture=DEMO["architecture"],
        pretraining=DEMO["pretraining"],
        seed=experiment["seed"],
    script:
        "../scripts/pretrain_model.py"
