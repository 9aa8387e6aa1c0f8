"""``sfumato runs``: what is there."""

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs are kept.")] = Path("runs"),
) -> Answer:
    """Lists the runs, newest last.

    \b
    Example:
      sfumato runs
    """
    from sfumato import workflow

    result = workflow.runs(folder)
    rows = [(item["run"], item.get("epsilon"), item.get("steps"), item.get("state")) for item in result["runs"]]
    return Answer(result, words.table(("run", "epsilon", "steps", "state"), rows) if rows else f"No runs in {folder}.")
