# Raw texts to tokens: the evaluation sets, the corpus, the instruction set.

SAMPLE = {key: CORPUS.get(key) for key in ("num_texts", "min_tokens", "max_tokens", "examined_share")}
SAMPLE["shares"] = sample_shares(CORPUS)
SAMPLE["spare"] = "near_duplicates" in CORPUS or SAMPLE["shares"] is not None
SAMPLE["seed"] = experiment["seed"]
MALFORMED = {"max_malformed_share": experiment["max_malformed_share"]}
SFT_SETTINGS = {key: SFT.get(key) for key in ("num_records", "max_tokens", "allow_fewer")} | MALFORMED
SFT_SETTINGS["seed"] = experiment["seed"]
SFT_PATHS = [path for source in SFT["sources"] for path in source["paths"]]


rule prepare_evaluation_set:
    input:
        sources=lambda wildcards: sources_of(DATASETS[wildcards.dataset]["paths"]),
        tokenizer=made_model(TOKENIZER),
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
        *code_of("prepare_evaluation_set"),
        sources=lambda wildcards: DATASETS[wildcards.dataset]["paths"],
        contents=lambda wildcards: contents_of(DATASETS[wildcards.dataset]["paths"]),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
    script:
        "../scripts/prepare_evaluation_set.py"


rule retokenize_evaluation_set:
    input:
        tokens=rules.prepare_evaluation_set.output.tokens,
        description=rules.prepare_evaluation_set.output.description,
        base_tokenizer=made_model(TOKENIZER),
        tokenizer=lambda wildcards: made_model(SYSTEMS[wildcards.system]["tokenizer"]),
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
        *code_of("retokenize_evaluation_set"),
        base_tokenizer=base_tokenizer,
        base_tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        tokenizer=own_tokenizer,
        tokenizer_contents=lambda wildcards: contents_of_tokenizer(SYSTEMS[wildcards.system]["tokenizer"]),
    script:
        "../scripts/retokenize_evaluation_set.py"


rule index_evaluation_sets:
    input:
        tokens=expand(rules.prepare_evaluation_set.output.tokens, dataset=DATASETS),
        descriptions=expand(rules.prepare_evaluation_set.output.description, dataset=DATASETS),
        tokenizer=made_model(TOKENIZER),
    output:
        ngrams=f"{RESULTS}/tokens/evaluation_ngrams.parquet",
    log:
        f"{RESULTS}/logs/index_evaluation_sets.log",
    benchmark:
        f"{RESULTS}/benchmarks/index_evaluation_sets.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("index_evaluation_sets"),
        names=list(DATASETS),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        ngram_words=DECONTAMINATION["ngram_words"],
    script:
        "../scripts/index_evaluation_sets.py"


rule sample_shard:
    input:
        sources=lambda wildcards: sources_of(SHARDS[wildcards.shard]["paths"]),
        tokenizer=made_model(TOKENIZER),
        ngrams=rules.index_evaluation_sets.output.ngrams,
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
        *code_of("sample_shard"),
        settings=SAMPLE,
        source=lambda wildcards: SHARDS[wildcards.shard]["source"],
        paths=lambda wildcards: SHARDS[wildcards.shard]["paths"],
        contents=lambda wildcards: contents_of(SHARDS[wildcards.shard]["paths"]),
        part=lambda wildcards: SHARDS[wildcards.shard]["part"],
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        threshold=DECONTAMINATION["threshold"],
    script:
        "../scripts/sample_shard.py"


rule sample_corpus:
    input:
        shards=expand(rules.sample_shard.output.candidates, shard=SHARDS),
        priorities=expand(rules.sample_shard.output.priorities, shard=SHARDS),
        cards=expand(rules.sample_shard.output.card, shard=SHARDS),
        ngrams=rules.index_evaluation_sets.output.ngrams,
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
        *code_of("sample_corpus"),
        settings=SAMPLE,
        joining={key: CORPUS.get(key) for key in ("near_duplicates", "allow_fewer")} | MALFORMED,
        threshold=DECONTAMINATION["threshold"],
    script:
        "../scripts/sample_corpus.py"


rule plot_text_lengths:
    input:
        texts=rules.sample_corpus.output.texts,
    output:
        png=f"{RESULTS}/plots/text_lengths.png",
        svg=f"{RESULTS}/plots/text_lengths.svg",
    log:
        f"{RESULTS}/logs/plot_text_lengths.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_text_lengths.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("plot_text_lengths"),
    script:
        "../scripts/plot_text_lengths.py"


rule tokenize_corpus:
    input:
        texts=rules.sample_corpus.output.texts,
        tokenizer=made_model(TOKENIZER),
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
        *code_of("tokenize_corpus"),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
    script:
        "../scripts/tokenize_corpus.py"


rule build_sft_set:
    input:
        sources=sources_of(SFT_PATHS),
        tokenizer=made_model(TOKENIZER),
        ngrams=rules.index_evaluation_sets.output.ngrams,
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
        *code_of("build_sft_set"),
        sources=SFT["sources"],
        contents=contents_of(SFT_PATHS),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
        settings=SFT_SETTINGS,
        threshold=DECONTAMINATION["threshold"],
    script:
        "../scripts/build_sft_set.py"


rule plot_sft_shares:
    input:
        card=rules.build_sft_set.output.card,
    output:
        png=f"{RESULTS}/plots/sft_shares.png",
        svg=f"{RESULTS}/plots/sft_shares.svg",
    log:
        f"{RESULTS}/logs/plot_sft_shares.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_sft_shares.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("plot_sft_shares"),
    script:
        "../scripts/plot_sft_shares.py"


rule tokenize_sft:
    input:
        records=rules.build_sft_set.output.records,
        tokenizer=made_model(TOKENIZER),
    output:
        tokens=f"{RESULTS}/tokens/sft.arrow",
    log:
        f"{RESULTS}/logs/tokenize_sft.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_sft.tsv"
    conda:
        "../../environment.yml"
    params:
        *code_of("tokenize_sft"),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
        held_out=SFT.get("held_out"),
    script:
        "../scripts/tokenize_sft.py"


rule data:
    input:
        [rules.tokenize_corpus.output, rules.plot_text_lengths.output] if "corpus" in experiment else [],
        [rules.tokenize_sft.output, rules.plot_sft_shares.output] if "sft" in experiment else [],
        expand(rules.prepare_evaluation_set.output, dataset=DATASETS),
    localrule: True
