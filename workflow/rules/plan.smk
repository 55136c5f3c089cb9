# What the jobs of the experiment need, told before they start: memory, time, disk. Nothing waits for it, and nothing runs again
# because of it.

PLANNED = {  # what a plan depends on
    **EXPERIMENT.model_dump(include={"device", "base_model", "pretraining", "rows", "listed", "retrieval_lengths"}),
    "evaluation": EXPERIMENT.evaluation.model_dump(exclude={"harness", "key_tokens", "num_processes"}),
    "retrieval": EXPERIMENT.retrieval.model_dump(),
    "systems": {name: system.model_dump(exclude={"label", "progress", "seed"}) for name, system in SYSTEMS.items()},
}


rule plan_run:
    output:
        plan=PLAN,
    log:
        f"{RESULTS}/logs/plan_run.log",
    benchmark:
        f"{RESULTS}/benchmarks/plan_run.tsv"
    priority: 100  # before all other jobs, which have more precise resources with it
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **measured(mem=2000, runtime=60),
    params:
        *code_of("plan_run"),
        planned=digest_of_values(PLANNED),
        models=FACTS.fingerprint(
            sorted({Path(system.model) / "config.json" for system in SYSTEMS.values() if is_users_folder(system.model)})
        ),
        # a function of the input, so that Snakemake does not compare it
        experiment=lambda wildcards, input: EXPERIMENT.model_dump(mode="json", by_alias=True),
    message:
        "plan memory, time and disk"
    script:
        "../scripts/plan_run.py"
