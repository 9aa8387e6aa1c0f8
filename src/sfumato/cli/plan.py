"""``sfumato plan``: what a guarantee costs, or why it is not to be had."""

from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.arguments import Assignments
from sfumato.errors import UsageError


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A named recipe, or a YAML file.")] = None,
    assignments: Assignments = None,
    population: Annotated[int | None, typer.Option(metavar="N", help="Public number of units.")] = None,
    expected_batch_size: Annotated[int | None, typer.Option(metavar="B", help="Units in a batch, on average.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="T", help="Training steps.")] = None,
    epsilon: Annotated[float | None, typer.Option(metavar="E", help="The target.")] = None,
    delta: Annotated[float | None, typer.Option(metavar="D", help="Default: 1/(N ln N).")] = None,
    accountant: Annotated[str, typer.Option(metavar="NAME", help="Whose epsilon is told: pld, rdp or zcdp.")] = "pld",
) -> Answer:
    """Says what a guarantee costs, or why it cannot be had.

    Spends nothing.

    \b
    Example:
      sfumato plan clinic --set privacy.epsilon=4
      sfumato plan --population 60000 --expected-batch-size 4096 --steps 4394 --epsilon 1 --delta 1e-5
    """
    from sfumato import workflow

    if recipe is None and assignments:
        raise UsageError(
            f"--set {assignments[0]} · there is no recipe to change", next="Name one: sfumato plan clinic."
        )
    result = workflow.plan(
        recipe,
        assignments=assignments or [],
        population=population,
        expected_batch_size=expected_batch_size,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
    )
    return Answer(result, _words(result), exit_code=3 if result.get("refusals") else 0)


def _words(result: dict[str, Any]) -> str:
    if result.get("refusals"):
        return "Refused:\n" + words.reasons(result["refusals"])
    accountants = result.get("accountants") or {}
    lines = [
        words.pairs(
            [
                ("noise multiplier", result.get("noise_multiplier")),
                ("epsilon", result.get("epsilon")),
                ("delta", result.get("delta")),
                ("sampling rate", result.get("sampling_rate")),
                ("steps", result.get("steps")),
                ("unit", result.get("unit")),
                ("adjacency", result.get("adjacency")),
                *[
                    (f"before the steps: {name.replace('_', ' ')}, noise multiplier", result[name]["noise_multiplier"])
                    for name in ("warm_start", "clip_estimate")
                    if name in result
                ],
                *[
                    (f"released: {stage['name'].replace('_', ' ')}", stage.get("noise_multiplier", stage.get("noise")))
                    for stage in result.get("releases", [])
                ],
                *[
                    (f"noise of {m['name']}, {m['dimension']} numbers", m["noise_std"])
                    for stage in result.get("releases", [])
                    for m in stage.get("modalities", [])
                ],
                *[(f"epsilon by {name}", value) for name, value in accountants.items()],
            ]
        )
    ]
    if result.get("warnings"):
        lines.append("Worth knowing:\n" + words.reasons(result["warnings"]))
    return "\n\n".join(lines)
