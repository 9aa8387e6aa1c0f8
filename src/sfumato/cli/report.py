"""``sfumato report``: one page of everything a run can say of itself."""

from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.arguments import Run


def report(
    run: Run,
    public: Annotated[
        bool, typer.Option("--public", help="Only what may leave: no attacks, losses or counts.")
    ] = False,
) -> Answer:
    """Writes one HTML page, and the same as JSON.

    \b
    Example:
      sfumato report runs/clinic/last --public
    """
    from sfumato import workflow

    result = workflow.report(run, public=public)
    return Answer(result, words.pairs([("page", result["html"]), ("data", result["json"])]))
