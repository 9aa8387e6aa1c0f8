"""``sfumato train``: one recipe, one run, from records to a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import INTERRUPTED, Answer
from sfumato.cli.arguments import Assignments, LimitUnits, Out, Recipe
from sfumato.cli.progress import to_stderr


def train(
    recipe: Recipe,
    assignments: Assignments = None,
    out: Out = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run of this recipe.")] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="Train in N processes of this machine.")
    ] = None,
    limit_units: LimitUnits = None,
) -> Answer:
    """Trains, measures, attacks, reports and bundles.

    Pictures appear in the run's folder while it trains.

    \b
    Example:
      sfumato train clinic --set data.units=3000
      sfumato train my-recipe.yaml --limit-units 200
      sfumato train my-recipe.yaml --resume --processes 4
    """
    from sfumato import workflow

    flags = {"performance.processes": processes, "data.limit_units": limit_units}
    wanted = [*(assignments or []), *(f"{path}={value}" for path, value in flags.items() if value is not None)]
    result = workflow.train(recipe, assignments=wanted, out=out, resume=resume, progress=to_stderr)
    interrupted = result.get("stopped") == "interrupted"
    return Answer(result, _words(result), exit_code=INTERRUPTED if interrupted else 0)


def _words(result: dict[str, Any]) -> str:
    parts = [
        words.pairs(
            [
                ("run", result["run"]),
                ("epsilon", "none: this run is not private" if result.get("epsilon") is None else result["epsilon"]),
                ("delta", result.get("delta")),
                ("steps", result.get("steps")),
                ("seconds", result.get("seconds")),
                ("stopped by", None if result.get("stopped") == "steps" else result.get("stopped")),
                ("report", result.get("html")),
                ("bundle", result.get("bundle")),
            ]
        )
    ]
    if result.get("quality"):
        parts.append(words.quality(result["quality"]))
    if result.get("reasons"):
        parts.append("Not released:\n" + words.reasons(result["reasons"]))
    if result.get("stopped") == "interrupted":
        parts.append("Interrupted; what was spent is in the ledger. next: the same command with --resume.")
    return "\n\n".join(parts)
