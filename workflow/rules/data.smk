# Raw texts to tokens: the corpus, the instruction set, the evaluation sets.

CORPUS = experiment.get("corpus", {"sources": []})
CORPUS_PATHS = [path for source in CORPUS["sources"] for path in source["paths"]]
SFT = experiment.get("sft", {"sources": []})


rule sample_corpus:
    input:
        sources=local_files(CORPUS_PATHS),
        tokenizer=local_model(TOKENIZER),
        code=code_of("sample_corpus"),
    output:
        texts=f"{RESULTS}/corpus/sample.parquet",
        card=f"{RESULTS}/corpus/sample.json",
    log:
        f"{RESULTS}/logs/sample_corpus.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_corpus.tsv"
    conda:
        "../../environment.yml"
    params:
        sources=CORPUS_PATHS,
        text_field=CORPUS.get("text_field"),
        tokenizer=tokenizer,
        num_texts=CORPUS.get("num_texts"),
        min_tokens=CORPUS.get("min_tokens"),
        max_tokens=CORPUS.get("max_tokens"),
        seed=experiment["seed"],
    script:
        "../scripts/sample_corpus.py"


rule tokenize_corpus:
    input:
        texts=rules.sample_corpus.output.texts,
        tokenizer=local_model(TOKENIZER),
        code=code_of("tokenize_corpus"),
    output:
        tokens=f"{RESULTS}/tokens/corpus.bin",
        description=f"{RESULTS}/tokens/corpus.json",
    log:
        f"{RESULTS}/logs/tokenize_corpus.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_corpus.tsv"
    conda:
        "../../environment.yml"
    params:
        tokenizer=tokenizer,
    script:
        "../scripts/tokenize_corpus.py"


rule build_sft_set:
    input:
        sources=local_files(path for source in SFT["sources"] for path in source["paths"]),
        tokenizer=local_model(TOKENIZER),
        code=code_of("build_sft_set"),
    output:
        records=f"{RESULTS}/sft/records.parquet",
        card=f"{RESULTS}/sft/records.json",
    log:
        f"{RESULTS}/logs/build_sft_set.log",
    benchmark:
        f"{RESULTS}/benchmarks/build_sft_set.tsv"
    conda:
        "../../environment.yml"
    params:
        sources=SFT["sources"],
        tokenizer=tokenizer,
        num_records=SFT.get("num_records"),
        max_tokens=SFT.get("max_tokens"),
        seed=experiment["seed"],
    script:
        "../scripts/build_sft_set.py"


rule tokenize_sft:
    input:
        records=rules.build_sft_set.output.records,
        tokenizer=local_model(TOKENIZER),
        code=code_of("tokenize_sft"),
    output:
        tokens=directory(f"{RESULTS}/tokens/sft"),
    log:
        f"{RESULTS}/logs/tokenize_sft.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_sft.tsv"
    conda:
        "../../environment.yml"
    params:
        tokenizer=tokenizer,
    script:
        "../scripts/tokenize_sft.py"


rule prepare_evaluation_set:
    input:
        sources=lambda wildcards: local_files(DATASETS[wildcards.dataset]["paths"]),
        tokenizer=local_model(TOKENIZER),
        code=code_of("prepare_evaluation_set"),
    output:
        tokens=f"{RESULTS}/tokens/evaluation/{{dataset}}.bin",
        description=f"{RESULTS}/tokens/evaluation/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/prepare_evaluation_set/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare_evaluation_set/{{dataset}}.tsv"
    conda:
        "../../environment.yml"
    params:
        sources=lambda wildcards: DATASETS[wildcards.dataset]["paths"],
        tokenizer=tokenizer,
    script:
        "../scripts/prepare_evaluation_set.py"


rule data:
    input:
        rules.tokenize_corpus.output if "corpus" in experiment else [],
        rules.tokenize_sft.output if "sft" in experiment else [],
        expand(rules.prepare_evaluation_set.output, dataset=DATASETS),
    localrule: True
