# The records as tables and as plots; no model is needed here.


rule render_table:
    input:
        records=rules.evaluate.input,
        code=code_of("render_table"),
    output:
        csv=f"{RESULTS}/tables/perplexity.csv",
        markdown=f"{RESULTS}/tables/perplexity.md",
        latex=f"{RESULTS}/tables/perplexity.tex",
    log:
        f"{RESULTS}/logs/render_table.log",
    benchmark:
        f"{RESULTS}/benchmarks/render_table.tsv"
    conda:
        "../../environment.yml"
    params:
        published=experiment.get("published", []),
    script:
        "../scripts/render_table.py"


rule plot_perplexity:
    input:
        records=rules.evaluate.input,
        code=code_of("plot_perplexity"),
    output:
        png=f"{RESULTS}/plots/perplexity.png",
        svg=f"{RESULTS}/plots/perplexity.svg",
    log:
        f"{RESULTS}/logs/plot_perplexity.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_perplexity.tsv"
    conda:
        "../../environment.yml"
    params:
        published=experiment.get("published", []),
    script:
        "../scripts/plot_perplexity.py"


rule plot_loss:
    input:
        cards=expand(f"{RESULTS}/training/{{system}}.json", system=TRAINED),
        code=code_of("plot_loss"),
    output:
        csv=f"{RESULTS}/tables/loss.csv",
        png=f"{RESULTS}/plots/loss.png",
        svg=f"{RESULTS}/plots/loss.svg",
    log:
        f"{RESULTS}/logs/plot_loss.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_loss.tsv"
    conda:
        "../../environment.yml"
    params:
        labels=[SYSTEMS[system]["label"] for system in TRAINED],
    script:
        "../scripts/plot_loss.py"


rule perplexity_report:
    input:
        rules.render_table.output,
        rules.plot_perplexity.output,
    localrule: True
