# LongQLoRA: from raw texts to a table and a plot of perplexity by context length.
#
#   snakemake --cores all                                                the demo (config/config.yaml)
#   snakemake --cores all --configfile config/llama2-7b-8k.yaml          the paper's run

from snakemake.utils import min_version

min_version("9.0")


if not workflow.overwrite_configfiles:  # a --configfile replaces the demo's configuration

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/evaluation_sets.smk"


if CORPUS:

    include: "workflow/rules/corpus.smk"


if SFT:

    include: "workflow/rules/sft.smk"


include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/serve.smk"
include: "workflow/rules/html_report.smk"


if EXPERIMENT.pretraining:

    include: "workflow/rules/pretrain.smk"


rule data:
    input:
        [rules.tokenize_corpus.output, rules.plot_text_lengths.output] if CORPUS else [],
        [rules.tokenize_sft.output, rules.plot_sft_shares.output] if SFT else [],
        expand(rules.prepare_evaluation_set.output, dataset=DATASETS),
    localrule: True


rule all:
    default_target: True
    input:
        rules.perplexity_report.input,
        rules.train.input,
        rules.plot_loss.output if LISTED_TRAINED else [],
        rules.report_answers.output if CHAT else [],
        rules.report_harness.output if HARNESS else [],
        served_files if EXPERIMENT.serving else [],
        rules.data.input,
        rules.plan_run.output,
        rules.render_report.output,
    localrule: True


include: "workflow/rules/access.smk"
include: "workflow/rules/terminal.smk"
