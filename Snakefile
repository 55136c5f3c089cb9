# Leads to the workflow, which is in workflow/Snakefile: does what `include: "workflow/Snakefile"` does, and keeps its default target.

workflow.include("workflow/Snakefile", overwrite_default_target=True)
