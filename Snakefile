# Leads to the workflow, which is in workflow/Snakefile. This line includes it and, unlike `include:`, keeps its default target.

workflow.include("workflow/Snakefile", overwrite_default_target=True)
