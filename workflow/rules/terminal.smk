# What the terminal shows of a run, in place of Snakemake's paragraphs: the message of each rule that starts, how far long jobs
# are, and at the end the files to look at or why a job failed. Snakemake's own output comes with --quiet host or --verbose.

from snakemake.logging import logger

from longqlora.jobs.terminal import Terminal


def results_to_look_at():
    """The files that a reader opens first, with what they show: those that this run was asked for."""
    files = {
        rules.render_report.output.html: "the report: tables, plots, data, cost; open it in a browser",
        rules.render_table.output.markdown: "table of perplexity and retrieval by context length",
        rules.plot_perplexity.output.png: "plot of perplexity by context length",
        rules.report_retrieval.output.png: "retrieval by context length",
    }
    if HARNESS:
        files[rules.report_harness.output.markdown] = "scores on the tasks of lm-evaluation-harness"
    if EXPERIMENT.serving:
        files[rules.report_serving.output.markdown] = "GGUF files in llama.cpp compared with transformers"
    ablations = expand(rules.report_ablation.output.markdown, ablation=EXPERIMENT.ablations)
    files |= dict.fromkeys(ablations, "table of an ablation")
    if CHAT:
        files[rules.report_answers.output.markdown] = "loss on held-out answers, before and after fine-tuning"
        files |= dict.fromkeys(rules.report_answers.output.samples, "sample answers")
    models = {f"{RESULTS}/models/{system}": f"model folder of {SYSTEMS[system].label}" for system in TRAINED}
    made = {without_storage(path) for job in workflow.dag.jobs for path in job.output}
    shown = {without_storage(path): words for path, words in (files | models).items()}
    folder = f"{workflow.storage_settings.default_storage_prefix.rstrip('/')}/" if COPIES else ""
    return {folder + path: words for path, words in shown.items() if path in made}


def local_copy(path):
    """Where a file is on this machine that Snakemake's messages name by its place in a default storage."""
    prefix = f"{workflow.storage_settings.default_storage_prefix.rstrip('/')}/" if COPIES else ""
    return path.removesuffix(" (send to storage)").removeprefix(prefix)


WITHOUT_DIGEST = {shard: shard.rpartition("-")[0] for shard in SHARDS} if CORPUS else {}
MESSAGES = {each.name: each.message for each in workflow.rules if each.message}
TERMINAL = Terminal(
    titles=MESSAGES, labels=labels_of(SYSTEMS) | {"shard": WITHOUT_DIGEST}, results=results_to_look_at, local_copy=local_copy
)

for each in workflow.rules:
    each.message = None  # otherwise the log of Snakemake and a dry run would have it in place of the job's files

if workflow.is_main_process and not (
    workflow.output_settings.dryrun or workflow.output_settings.quiet or workflow.output_settings.verbose
):
    TERMINAL.replace(logger)


onsuccess:
    TERMINAL.succeeded()


onerror:
    TERMINAL.stopped()
