# LongQLoRA: from raw texts to the table and the plot of perplexity per context length.
#
#   snakemake --cores all                                                the demo (config/config.yaml)
#   snakemake --cores all --configfile config/llama2-7b-8k.yaml          the paper's run

from snakemake.utils import min_version

min_version("9.0")


if not workflow.overwrite_configfiles:  # a --configfile replaces the demo's, it is not merged into it

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


if "demo" in experiment:

    include: "workflow/rules/demo.smk"


rule all:
    default_target: True
    input:
        rules.perplexity_report.input,
        rules.train.input,
        rules.plot_loss.output if TRAINED_TABLE_SYSTEMS else [],
        rules.answers.input,
        rules.data.input,
    localrule: True
