"""``sfumato audit``: attacks on a run's model, held against what its guarantee claims."""

from typing import Any

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.arguments import Run
from sfumato.cli.progress import to_stderr


def audit(run: Run) -> Answer:
    """Attacks the model, as an adversary would.

    With the records it was trained on, held against what its guarantee claims. The result is internal: it stays in the run.

    \b
    Example:
      sfumato audit runs/clinic/last
    """
    from sfumato import workflow

    result = workflow.audit(run, progress=to_stderr)
    return Answer(result, _words(result))


def _words(result: dict[str, Any]) -> str:
    rows = [
        (attack["name"], attack["auc"], attack["blind_baseline"], attack["epsilon_lower_bound"], attack["confidence"])
        for attack in result["attacks"]
    ]
    return "\n\n".join(
        [
            words.pairs([("verdict", result["verdict"]), ("because", result.get("because"))]),
            words.table(("attack", "AUC", "blind AUC", "epsilon at least", "confidence"), rows),
        ]
    )
