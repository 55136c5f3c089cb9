# The instruction set: sampled from its sources, tokenized.

SFT_PATHS = [path for source in SFT.sources for path in source.paths]
SFT_SETTINGS = {
    **SFT.model_dump(include={"num_records", "max_tokens", "allow_fewer"}),
    "max_malformed_share": EXPERIMENT.max_malformed_share,
    "seed": EXPERIMENT.seed,
}


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
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=1500, runtime=60 + SFT.num_records // 1000),
    params:
        *code_of("build_sft_set"),
        sources=[source.model_dump(by_alias=True) for source in SFT.sources],
        contents=contents_of(SFT_PATHS),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
        settings=SFT_SETTINGS,
        threshold=EXPERIMENT.decontamination.threshold,
    message:
        "sample the instructions"
    script:
        "../scripts/build_sft_set.py"


rule plot_sft_shares:
    input:
        card=rules.build_sft_set.output.card,
    output:
        png=f"{RESULTS}/plots/sft_shares.png",
        svg=report(
            f"{RESULTS}/plots/sft_shares.svg",
            caption="../report/sft_shares.rst",
            category="Data",
            labels={"content": "sources of the instructions"},
        ),
    log:
        f"{RESULTS}/logs/plot_sft_shares.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_sft_shares.tsv"
    conda:
        "../../environment.yml"
    resources:
        **REPORTING,
    params:
        *code_of("plot_sft_shares"),
    message:
        "plot where the instructions come from"
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
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=1000, runtime=60 + SFT.num_records // 1000),
    params:
        *code_of("tokenize_sft"),
        tokenizer=base_tokenizer,
        tokenizer_contents=contents_of_tokenizer(TOKENIZER, with_chat_template=True),
        held_out=SFT.held_out,
    message:
        "tokenize the instructions"
    script:
        "../scripts/tokenize_sft.py"
