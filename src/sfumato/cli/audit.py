"""``sfumato audit``: attacks on a run's model, or anyone's trainer held against its claim."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.cli.progress import to_stderr
from sfumato.errors import UsageError

TRAINER = "trainer"


def audit(
    what: Annotated[str, typer.Argument(metavar="RUN|trainer", help="A run's folder; or the word trainer.")],
    target: Annotated[
        str | None,
        typer.Argument(metavar="[MODULE:FUNCTION]", help="After `trainer`: what returns it, also FILE.py:FUNCTION."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With a trainer: write conformance.md and conformance.json there."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With a trainer: repeat a pass; left out, chance is fresh.")] = None,
) -> Answer:
    """Attacks a run's model, or tests anyone's private trainer.

    A run: with the records it was trained on, held against what its guarantee claims. The result is internal: it stays in the
    run. A trainer, anyone's, through a small adapter (docs/conformance.md): 24 ways to be wrong, a verdict for each. Exit
    code 4 if one is a VIOLATION.

    \b
    Example:
      sfumato audit runs/clinic/last
      sfumato audit trainer my_adapter.py:trainer --out report
    """
    if what == TRAINER and target is not None:
        return _trainer(target, out, seed)
    if what == TRAINER and not Path(what).exists():
        raise UsageError(
            "audit trainer · needs MODULE:FUNCTION or FILE.py:FUNCTION",
            next="For example sfumato audit trainer my_adapter.py:trainer.",
        )
    given = {"MODULE:FUNCTION": target, "--out": out, "--seed": seed}
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} = {value} · is for `audit trainer` only", next=f"sfumato audit {what}")
    from sfumato import workflow

    result = workflow.audit(Path(what), progress=to_stderr)
    return Answer(result, _words(result))


def _trainer(target: str, out: Path | None, seed: int | None) -> Answer:
    from sfumato.auditing.conformance.command import audit_trainer

    result = audit_trainer(target, out=out, seed=seed, progress=to_stderr)
    rows = [(row["row"], row["check"], row["verdict"], row["because"]) for row in result["conformance"]]
    text = "\n\n".join(
        [
            words.table(("row", "failure", "verdict", "because"), [(*row[:3], _short(row[3])) for row in rows]),
            words.pairs(
                [
                    ("verdict", result["verdict"]),
                    ("because", result["because"]),
                    ("false alarm", f"{result['false_alarm']:g} a pass, at most"),
                    ("seed", result["seed"]),
                    ("report", result.get("report")),
                ]
            ),
        ]
    )
    return Answer(result, text, exit_code=4 if result["verdict"] == "VIOLATION" else 0)


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."


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
