# Raw texts to tokens: the evaluation sets, the corpus, the instruction set.

SAMPLE = {key: CORPUS.get(key) for key in ("num_texts", "min_tokens", "max_tokens", "examined_share")}
SAMPLE["shares"] = sample_shares(CORPUS)
SAMPLE["spare"] = "near_duplicates" in CORPUS or SAMPLE["shares"] is not None
SAMPLE["seed"] = experiment["seed"]


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


rule retokenize_evaluation_set:
    input:
        tokens=rules.prepare_evaluation_set.output.tokens,
        description=rules.prepare_evaluation_set.output.description,
        base_tokenizer=local_model(TOKENIZER),
        tokenizer=lambda wildcards: local_model(SYSTEMS[wildcards.system]["tokenizer"]),
        code=code_of("retokenize_evaluation_set"),
    output:
        tokens=f"{RESULTS}/tokens/evaluation/{{system}}/{{dataset}}.bin",
        description=f"{RESULTS}/tokens/evaluation/{{system}}/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/retokenize_evaluation_set/{{system}}/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/retokenize_evaluation_set/{{system}}/{{dataset}}.tsv"
    conda:
        "../../environment.yml"
    params:
        base_tokenizer=lambda wildcards, input: str(input.base_tokenizer or TOKENIZER),
        tokenizer=lambda wildcards: SYSTEMS[wildcards.system]["tokenizer"],
    script:
        "../scripts/retokenize_evaluation_set.py"


rule index_evaluation_sets:
    input:
        tokens=expand(rules.prepare_evaluation_set.output.tokens, dataset=DATASETS),
        descriptions=expand(rules.prepare_evaluation_set.output.description, dataset=DATASETS),
        tokenizer=local_model(TOKENIZER),
        code=code_of("index_evaluation_sets"),
    output:
        ngrams=f"{RESULTS}/tokens/evaluation_ngrams.parquet",
    log:
        f"{RESULTS}/logs/index_evaluation_sets.log",
    benchmark:
        f"{RESULTS}/benchmarks/index_evaluation_sets.tsv"
    conda:
        "../../environment.yml"
    params:
        names=list(DATASETS),
        tokenizer=tokenizer,
        ngram_words=GATE["ngram_words"],
    script:
        "../scripts/index_evaluation_sets.py"


rule sample_shard:
    input:
        sources=lambda wildcards: local_files(SHARDS[wildcards.shard]["paths"]),
        tokenizer=local_model(TOKENIZER),
        ngrams=rules.index_evaluation_sets.output.ngrams,
        code=code_of("sample_shard"),
    output:
        candidates=f"{RESULTS}/corpus/shards/{{shard}}.parquet",
        priorities=f"{RESULTS}/corpus/shards/{{shard}}.priorities.parquet",
        card=f"{RESULTS}/corpus/shards/{{shard}}.json",
    log:
        f"{RESULTS}/logs/sample_shard/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_shard/{{shard}}.tsv"
    conda:
        "../../environment.yml"
    params:
        settings=SAMPLE,
        source=lambda wildcards: SHARDS[wildcards.shard]["source"],
        paths=lambda wildcards: SHARDS[wildcards.shard]["paths"],
        part=lambda wildcards: SHARDS[wildcards.shard]["part"],
        tokenizer=tokenizer,
        threshold=GATE["threshold"],
    script:
        "../scripts/sample_shard.py"


rule sample_corpus:
    input:
        shards=expand(rules.sample_shard.output.candidates, shard=SHARDS),
        priorities=expand(rules.sample_shard.output.priorities, shard=SHARDS),
        cards=expand(rules.sample_shard.output.card, shard=SHARDS),
        ngrams=rules.index_evaluation_sets.output.ngrams,
        code=code_of("sample_corpus"),
    output:
        texts=f"{RESULTS}/corpus/sample.parquet",
        card=f"{RESULTS}/corpus/sample.json",
        removed=f"{RESULTS}/corpus/removed.csv",
    log:
        f"{RESULTS}/logs/sample_corpus.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_corpus.tsv"
    conda:
        "../../environment.yml"
    params:
        settings=SAMPLE,
        near_duplicates=CORPUS.get("near_duplicates"),
        allow_fewer=CORPUS.get("allow_fewer"),
        max_malformed_share=experiment["max_malformed_share"],
        threshold=GATE["threshold"],
    script:
        "../scripts/sample_corpus.py"


rule plot_text_lengths:
    input:
        texts=rules.sample_corpus.output.texts,
        code=code_of("plot_text_lengths"),
    output:
        png=f"{RESULTS}/plots/text_lengths.png",
        svg=f"{RESULTS}/plots/text_lengths.svg",
    log:
        f"{RESULTS}/logs/plot_text_lengths.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_text_lengths.tsv"
    conda:
        "../../environment.yml"
    script:
        "../scripts/plot_text_lengths.py"


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
        ngrams=rules.index_evaluation_sets.output.ngrams,
        code=code_of("build_sft_set"),
    output:
        records=f"{RESULTS}/sft/records.parquet",
        card=f"{RESULTS}/sft/records.json",
        removed=f"{RESULTS}/sft/removed.csv",
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
        allow_fewer=SFT.get("allow_fewer"),
        max_malformed_share=experiment["max_malformed_share"],
        threshold=GATE["threshold"],
    script:
        "../scripts/build_sft_set.py"


rule plot_sft_shares:
    input:
        card=rules.build_sft_set.output.card,
        code=code_of("plot_sft_shares"),
    output:
        png=f"{RESULTS}/plots/sft_shares.png",
        svg=f"{RESULTS}/plots/sft_shares.svg",
    log:
        f"{RESULTS}/logs/plot_sft_shares.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_sft_shares.tsv"
    conda:
        "../../environment.yml"
    script:
        "../scripts/plot_sft_shares.py"


rule tokenize_sft:
    input:
        records=rules.build_sft_set.output.records,
        tokenizer=local_model(TOKENIZER),
        code=code_of("tokenize_sft"),
    output:
        tokens=f"{RESULTS}/tokens/sft.arrow",
    log:
        f"{RESULTS}/logs/tokenize_sft.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_sft.tsv"
    conda:
        "../../environment.yml"
    params:
        tokenizer=tokenizer,
        held_out=SFT.get("held_out"),
    script:
        "../scripts/tokenize_sft.py"


rule data:
    input:
        [rules.tokenize_corpus.output, rules.plot_text_lengths.output] if "corpus" in experiment else [],
        [rules.tokenize_sft.output, rules.plot_sft_shares.output] if "sft" in experiment else [],
        expand(rules.prepare_evaluation_set.output, dataset=DATASETS),
    localrule: True
