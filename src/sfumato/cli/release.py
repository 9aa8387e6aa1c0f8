"""``sfumato release``: the gate, and the signed bundle behind it."""

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.arguments import Run


def release(
    run: Run,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with the keys of the recipe's section release.")
    ] = None,
) -> Answer:
    """Asks the gate; writes a signed bundle if it approves.

    \b
    Example:
      sfumato release runs/clinic/last
    """
    from sfumato import workflow

    result = workflow.release(run, policy=policy)
    if not result["approved"]:
        return Answer(result, "Refused:\n" + words.reasons(result["reasons"]), exit_code=3)
    return Answer(result, words.pairs([("bundle", result["bundle"])]))
