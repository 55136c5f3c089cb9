# Models and data that are not on this machine: looked up once, when jobs are about to start.

from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from longqlora.access import access_problems
from longqlora.evaluation.harness_tasks import task_problems
from longqlora.publishing.gguf_packages import package_problems


def script_of(job):
    """The name of a job's script. Where this workflow is a module, its rules may have other names."""
    return Path(str(job.rule.script)).stem


def params_of_jobs():
    """Yield the params of the jobs to run, but for the plan, which reads no data and says itself what it cannot read."""
    return (list(job.params) for job in workflow.dag.needrun_jobs() if script_of(job) != "plan_run")


onstart:
    problems = []
    try:
        problems = access_problems(EXPERIMENT, params_of_jobs())
    except ImportError as error:  # an environment with little more than Snakemake; the jobs have their own
        logger.warning(f"models and data that are not on this machine are not looked up before the first job: {error}")
    if problems:
        raise WorkflowError(f"no job has started, because these cannot be read:\n{ConfigError(problems)}")
    deployed = workflow.deployment_settings.deployment_method  # then jobs have other packages
    if DeploymentMethod.APPTAINER in deployed and not Path(IMAGE).is_file():
        raise WorkflowError(
            f"no job has started: there is no {IMAGE} in this folder, the container that jobs run in with --sdm apptainer; "
            "docs/platforms.md tells how to build it"
        )
    needed = set() if deployed else set(map(script_of, workflow.dag.needrun_jobs()))
    unknown = list(task_problems(EXPERIMENT.evaluation.harness)) if "evaluate_harness" in needed else []
    if workflow.local_exec:
        unknown += slurm_problems(job.wildcards.system for job in workflow.dag.needrun_jobs() if script_of(job) == "train")
    if {"convert_gguf", "check_gguf"} & needed:
        unknown += package_problems(EXPERIMENT.serving.converter)
    if unknown:
        raise WorkflowError(f"no job has started:\n{ConfigError(unknown)}")
