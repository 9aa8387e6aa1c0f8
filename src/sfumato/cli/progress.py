"""Progress, on standard error. A terminal that went away does not stop a training.   [shell]"""

import contextlib
import sys


def to_stderr(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody looks any more; the run's metrics.jsonl has the same
        print(line, file=sys.stderr, flush=True)
