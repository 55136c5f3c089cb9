# The evaluation sets: token ids, and the n-grams that no training text may share with them.

EVALUATION_PATHS = [path for dataset in DATASETS.values() for path in dataset.paths]


rule prepare_evaluation_set:
    input:
        sources=lambda wildcards: sources_of(DATASETS[wildcards.dataset].paths),
        tokenizer=made_model(TOKENIZER),
    output:
        tokens=f"{RESULTS}/tokens/evaluation/{{dataset}}.bin",
        description=f"{RESULTS}/tokens/evaluation/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/prepare_evaluation_set/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare_evaluation_set/{{dataset}}.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=2000, runtime=120),
    params:
        *code_of("prepare_evaluation_set"),
        sources=lambda wildcards: DATASETS[wildcards.dataset].paths,
        contents=lambda wildcards: contents_of(DATASETS[wildcards.dataset].paths),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
    message:
        "prepare the evaluation set {wildcards.dataset}"
    script:
        "../scripts/prepare_evaluation_set.py"


rule retokenize_evaluation_set:
    input:
        tokens=rules.prepare_evaluation_set.output.tokens,
        description=rules.prepare_evaluation_set.output.description,
        base_tokenizer=made_model(TOKENIZER),
        tokenizer=lambda wildcards: made_model(SYSTEMS[wildcards.system].tokenizer),
    output:
        tokens=f"{RESULTS}/tokens/evaluation/{{system}}/{{dataset}}.bin",
        description=f"{RESULTS}/tokens/evaluation/{{system}}/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/retokenize_evaluation_set/{{system}}/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/retokenize_evaluation_set/{{system}}/{{dataset}}.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=2000, runtime=120),
    params:
        *code_of("retokenize_evaluation_set"),
        base_tokenizer=base_tokenizer,
        base_tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        tokenizer=lookup("{system}/tokenizer", within=SYSTEM_VALUES),
        tokenizer_contents=lambda wildcards: contents_of_tokenizer(SYSTEMS[wildcards.system].tokenizer),
    message:
        "tokenize {wildcards.dataset} for {wildcards.system}"
    script:
        "../scripts/retokenize_evaluation_set.py"


rule index_evaluation_sets:
    input:
        sources=sources_of(EVALUATION_PATHS),
        tokens=expand(rules.prepare_evaluation_set.output.tokens, dataset=DATASETS),
        descriptions=expand(rules.prepare_evaluation_set.output.description, dataset=DATASETS),
        tokenizer=made_model(TOKENIZER),
    output:
        ngrams=f"{RESULTS}/tokens/evaluation_ngrams.parquet",
    log:
        f"{RESULTS}/logs/index_evaluation_sets.log",
    benchmark:
        f"{RESULTS}/benchmarks/index_evaluation_sets.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=4000, runtime=120),
    params:
        *code_of("index_evaluation_sets"),
        sources={name: dataset.paths for name, dataset in DATASETS.items()},
        contents=contents_of(EVALUATION_PATHS),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        ngram_words=EXPERIMENT.decontamination.ngram_words,
    message:
        "index the evaluation sets, to keep them out of the training data"
    script:
        "../scripts/index_evaluation_sets.py"
