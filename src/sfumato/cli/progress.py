"""Progress, on standard error. A terminal that went away does not stop a training.   [shell]"""

import sys


def to_stderr(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        pass  # nobody looks any more; the run's metrics.jsonl has the same
