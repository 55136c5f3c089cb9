# The project's folder. The package longqlora is imported from there, whichever Snakefile is the main one: by the rules, and by
# their scripts, because Snakemake passes the folders of sys.path on to them.

import shutil
import sys
from tempfile import mkdtemp

from snakemake.exceptions import WorkflowError
from snakemake.sourcecache import HostingProviderFile, LocalSourceFile


def project_folder(folder):
    """The folder of the project on this machine.

    Args:
        folder: workflow/rules, as Snakemake has it. Of a workflow on a Git host, Snakemake copies the files that rules name. A
            package needs all of its files, so they are checked out from Snakemake's clone.
    """
    if isinstance(folder, LocalSourceFile):
        return Path(folder.get_path_or_uri(secret_free=True)).parent.parent
    if not isinstance(folder, HostingProviderFile):
        raise WorkflowError(
            f"{folder}: the workflow imports its package, so it runs from a folder of this machine "
            '(snakefile: "longqlora/workflow/Snakefile") or from a Git host '
            '(snakefile: github("owner/longqlora", path="workflow/Snakefile", tag="…"))'
        )
    clone = folder.hosted_repo.repo
    commit = clone.commit(folder.ref).hexsha
    checkout = Path(workflow.sourcecache.cache_path) / "longqlora" / commit
    if not checkout.exists():
        checkout.parent.mkdir(parents=True, exist_ok=True)
        unfinished = mkdtemp(dir=checkout.parent)
        clone.clone(unfinished).git.checkout(commit)
        try:
            os.rename(unfinished, checkout)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return checkout


PROJECT = project_folder(workflow.current_basedir)
sys.path.insert(0, str(PROJECT))
