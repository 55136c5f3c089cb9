# The project's folder. The package longqlora is imported from there, whichever Snakefile is the main one: by the rules, and by their
# scripts, because Snakemake passes the folders of sys.path on to them.

import sys

PROJECT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parent.parent
sys.path.insert(0, str(PROJECT))
