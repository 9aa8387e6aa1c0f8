"""``sfumato evaluate``: how good the pictures of a run are, beside two baselines."""

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.arguments import Run
from sfumato.cli.progress import to_stderr


def evaluate(run: Run) -> Answer:
    """Measures quality, beside two baselines.

    Real held-out records, and shuffled captions.

    \b
    Example:
      sfumato evaluate runs/clinic/last
    """
    from sfumato import workflow

    result = workflow.evaluate(run, progress=to_stderr)
    return Answer(result, words.quality(result["quality"]))
