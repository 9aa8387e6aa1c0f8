"""``sfumato data``: fetch the built-in sets, and look at any set before training on it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer, Verb
from sfumato.cli.arguments import LimitUnits

app = typer.Typer(rich_markup_mode=None, help="Fetch the built-in sets; check and describe any set.")
Where = Annotated[
    str, typer.Argument(metavar="PATH", help="A folder, a Parquet, JSON lines or tar file, or a built-in set.")
]
UnitColumn = Annotated[str | None, typer.Option(metavar="NAME", help="The column that names the person.")]
SHOWN = 20  # problems told to a person; --json has all


@app.command(cls=Verb)
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="clinic, emoji, mnist, fashion-mnist, wordnet, emails, ...")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Where the archives lie already; no client is needed."),
    ] = None,
) -> Answer:
    """Brings a built-in set into the cache, and checks its sums.

    \b
    Example:
      sfumato data fetch mnist
    """
    from sfumato.data import examples

    result = examples.fetch(name, folder=folder)
    shown = [(key, value) for key, value in result.items() if not isinstance(value, list | dict)]
    return Answer(result, words.pairs(shown))


@app.command(cls=Verb)
def check(path: Where, unit_column: UnitColumn = None) -> Answer:
    """Every problem of a set: unreadable or huge images, empty texts, missing units, duplicates. Changes nothing.

    \b
    Example:
      sfumato data check my-folder --unit-column patient
    """
    from sfumato.data import prepare

    result = prepare.check(path, unit_column=unit_column)
    return Answer(result, _words(result))


@app.command(cls=Verb)
def stats(path: Where, unit_column: UnitColumn = None, limit_units: LimitUnits = None) -> Answer:
    """Sizes, units and modalities of a set. Internal: these counts are not private.

    \b
    Example:
      sfumato data stats my-folder --unit-column patient --limit-units 100
    """
    from sfumato.data import prepare

    result = prepare.stats(path, unit_column=unit_column, limit_units=limit_units)
    return Answer(result, _words(result))


@app.command(cls=Verb)
def clear(path: Where) -> Answer:
    """Removes what was prepared and cached of a set: indices, records, tensors. The account of what was spent stays.

    \b
    Example:
      sfumato data clear my-folder
    """
    from sfumato.data import prepare
    from sfumato.data.sources import settings_for

    result = prepare.clear(settings_for(path))
    return Answer(result, words.pairs([(key, _short(value)) for key, value in result.items()]))


def _words(result: dict[str, Any]) -> str:
    parts = [words.pairs([(key, _short(value)) for key, value in result.items() if key != "problems"])]
    problems = result.get("problems", [])
    if problems:
        rows = [(problem["record"], problem["problem"]) for problem in problems[:SHOWN]]
        parts.append(words.table(("record", "problem"), rows))
        if len(problems) > SHOWN:
            parts.append(f"and {len(problems) - SHOWN} more; --json has all")
    return "\n\n".join(parts)


def _short(value: Any) -> Any:
    """On one line; what is empty is left out."""
    match value:
        case {}:
            told = ((key, words.number(_short(inner)), isinstance(inner, dict)) for key, inner in value.items())
            return ", ".join(f"{key} ({inner})" if nested else f"{key} {inner}" for key, inner, nested in told) or None
        case list():
            return ", ".join(words.number(_short(inner)) for inner in value) or None
        case _:
            return value
