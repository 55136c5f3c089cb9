# A base model that is trained from scratch.

PRETRAINING = EXPERIMENT.pretraining


rule pretrain_model:
    input:
        sources_of(PRETRAINING.paths),
    output:
        model=directory(EXPERIMENT.pretrained),
    log:
        f"{RESULTS}/logs/pretrain_model.log",
    benchmark:
        f"{RESULTS}/benchmarks/pretrain_model.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=4000, runtime=1440),
    params:
        *code_of("pretrain_model"),
        settings=PRETRAINING.model_dump(),
        seed={"seed": EXPERIMENT.seed},
        contents=contents_of(PRETRAINING.paths),
        # a function of the input, so that Snakemake does not compare it
        command=lambda wildcards, input: (
            f"snakemake {EXPERIMENT.pretrained} --cores 1 --configfile {' '.join(map(os.path.relpath, workflow.configfiles))}"
        ),
    message:
        "train the base model from scratch"
    script:
        "../scripts/pretrain_model.py"
