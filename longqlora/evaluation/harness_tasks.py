"""The tasks of EleutherAI's lm-evaluation-harness that a configuration names, looked up before the first job.

Imports nothing heavy before it is needed.
"""

import difflib
from collections.abc import Iterator
from importlib.util import find_spec

from longqlora.config.settings import HarnessSection

NOT_INSTALLED = (
    'needs lm-evaluation-harness, which is not installed: pip install "lm-eval[ruler]" (with conda, add it to the pip section '
    "of environment.yml)"
)


def task_problems(harness: HarnessSection) -> Iterator[str]:
    """Yield which tasks do not exist, or that lm-evaluation-harness is not installed. Reads the files of all its tasks, which
    takes seconds."""
    if not find_spec("lm_eval"):
        yield f"evaluation.harness: {NOT_INSTALLED}"
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=harness.include_path).task_index
    for key in ("tasks", "long_tasks"):
        for name in getattr(harness, key):
            entry = known.get(name)
            if entry is None:
                guess = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {guess[0]}?" if guess else ""
                yield f"evaluation.harness.{key}: lm-evaluation-harness has no task {name!r}{hint} (all: lm-eval ls tasks)"
            elif key == "long_tasks" and entry.kind.name == "TASK" and "custom_dataset" not in entry.cfg:
                yield f"evaluation.harness.long_tasks: {name!r} makes no texts of a given length; move it to tasks"
