# The texts that adapters are trained on: sampled file by file, joined, tokenized.

SHARDS = corpus_shards(CORPUS.sources)
SHARES = sample_shares(CORPUS)
SAMPLE = {
    **CORPUS.model_dump(include={"num_texts", "min_tokens", "max_tokens", "examined_share"}),
    "shares": SHARES,
    "keep_reserve": CORPUS.near_duplicates is not None or SHARES is not None,
    "seed": EXPERIMENT.seed,
}


rule sample_shard:
    input:
        sources=lambda wildcards: sources_of(SHARDS[wildcards.shard].source.paths),
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
    wildcard_constraints:
        shard=SHARD_NAME,
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=2000, runtime=240),
    params:
        *code_of("sample_shard"),
        settings=SAMPLE,
        source=lambda wildcards: SHARDS[wildcards.shard].source.model_dump(),
        contents=lambda wildcards: contents_of(SHARDS[wildcards.shard].source.paths),
        part=lambda wildcards: SHARDS[wildcards.shard].part,
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
        threshold=EXPERIMENT.decontamination.threshold,
    message:
        "sample texts from {wildcards.shard}"
    script:
        "../scripts/sample_shard.py"


rule sample_corpus:
    input:
        shards=of_all_shards(rules.sample_shard.output.candidates),
        priorities=of_all_shards(rules.sample_shard.output.priorities),
        cards=of_all_shards(rules.sample_shard.output.card),
        ngrams=rules.index_evaluation_sets.output.ngrams,
    output:
        texts=f"{RESULTS}/corpus/sample.parquet",
        card=f"{RESULTS}/corpus/sample.json",
        removed=f"{RESULTS}/corpus/removed.csv",
    log:
        f"{RESULTS}/logs/sample_corpus.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_corpus.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=1000 + CORPUS.num_texts // 50, runtime=60 + CORPUS.num_texts // 1000),
    params:
        *code_of("sample_corpus"),
        settings=SAMPLE,
        joining=CORPUS.model_dump(include={"near_duplicates", "allow_fewer"})
        | {"max_malformed_share": EXPERIMENT.max_malformed_share},
        threshold=EXPERIMENT.decontamination.threshold,
    message:
        "join the sampled texts"
    script:
        "../scripts/sample_corpus.py"


rule plot_text_lengths:
    input:
        texts=rules.sample_corpus.output.texts,
    output:
        png=f"{RESULTS}/plots/text_lengths.png",
        svg=report(
            f"{RESULTS}/plots/text_lengths.svg",
            caption="../report/text_lengths.rst",
            category="Data",
            labels={"content": "lengths of the texts"},
        ),
    log:
        f"{RESULTS}/logs/plot_text_lengths.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_text_lengths.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("plot_text_lengths"),
    message:
        "plot the lengths of the texts"
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
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=1100, runtime=60 + CORPUS.num_texts // 1000),
    params:
        *code_of("tokenize_corpus"),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER),
    message:
        "tokenize the texts"
    script:
        "../scripts/tokenize_corpus.py"
