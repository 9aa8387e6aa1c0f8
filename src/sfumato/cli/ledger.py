"""``sfumato ledger``: what was spent, and whether the record of it is whole."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer, Verb

app = typer.Typer(rich_markup_mode=None, help="Shows and checks what was spent.")
Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="A ledger or an account (.db), or a run's folder.")]


@app.command(cls=Verb)
def show(path: Path_) -> Answer:
    """The events and what they add up to.

    \b
    Example:
      sfumato ledger show runs/clinic/last
    """
    from sfumato.privacy import ledger

    result = ledger.show(_file(path))
    return Answer(result, _words(result))


@app.command(cls=Verb)
def verify(path: Path_) -> Answer:
    """Recomputes the chain of hashes. Exit code 4 if an entry was changed or taken away.

    \b
    Example:
      sfumato ledger verify runs/clinic/last/ledger.db
    """
    from sfumato.privacy import ledger

    result = ledger.show(_file(path))  # it reads every entry again
    return Answer(result, _words(result), exit_code=0 if result["valid"] else 4)


def _file(path: Path) -> Path:
    return path / "ledger.db" if path.is_dir() else path


def _words(result: dict[str, Any]) -> str:
    rows = [
        (event["mechanism"], event["count"], event["sampling_rate"], event["noise_multiplier"])
        for event in result["events"]
    ]
    return "\n\n".join(
        [
            words.table(("mechanism", "times", "sampling rate", "noise multiplier"), rows),
            words.pairs(
                [
                    ("epsilon", result["epsilon"]),
                    ("delta", result["delta"]),
                    ("accountant", result.get("accountant")),
                    ("valid", result["valid"]),
                    ("", result.get("detail")),
                ]
            ),
        ]
    )
