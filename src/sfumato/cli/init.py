"""``sfumato init``: a commented recipe for a folder of one's own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer
from sfumato.errors import DataError, UsageError

UNIT_COLUMNS = ("unit", "person", "patient", "subject", "user", "client", "author", "speaker", "customer")
IMAGE_COLUMNS = ("file_name", "image")


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds metadata.jsonl, or is a Parquet file.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME.yaml here.")] = None,
) -> Answer:
    """Writes a recipe for a folder of yours, explained.

    Overwrites nothing.

    \b
    Example:
      sfumato init my-folder
    """
    from sfumato import recipe as recipes
    from sfumato.cli.commented import to_commented_yaml

    if not folder.exists():
        raise UsageError(f"folder = {folder} · must exist", next="Check the path.")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in folder.resolve().stem).strip("-")
    name = name or "mine"
    target = out or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"out = {target} · exists already, and is not overwritten", next="Give another --out.")
    seen = _look(folder)
    batch = batch_size_for(seen.units)
    recipe = recipes.from_mapping(
        {
            "name": name,
            "data": {
                "source": seen.source,
                "path": str(folder),
                "unit_column": seen.unit_column,
                "public_units": min(6_000, max(1, seen.units // 10)),
            },
            "privacy": {
                "unit": "person" if seen.unit_column else "record",
                "records_per_unit": 4 if seen.unit_column else 1,
            },
            "training": {"expected_batch_size": batch},
        }
    )
    target.write_text(to_commented_yaml(recipe, _heading(folder, seen, target)), encoding="utf-8")
    result = {
        "recipe": str(target),
        "records": seen.records,
        "units": seen.units,
        "columns": list(seen.columns),
        "unit_column": seen.unit_column,
        "notes": list(seen.notes),
    }
    text = words.pairs([("recipe", target), ("unit column", seen.unit_column or "none: each record by itself")])
    notes = "".join(f"\n- {note}" for note in seen.notes)
    return Answer(
        result, f"{text}{notes}\nnext: read it, then `sfumato data check {folder}` and `sfumato plan {target}`."
    )


def batch_size_for(units: int) -> int:
    """A power of two near a tenth of the units, so that a step uses a small part of them."""
    return min(2_048, max(16, 1 << max(0, (units // 10).bit_length() - 1)))


@dataclass(frozen=True, slots=True)
class _Seen:
    source: str
    columns: tuple[str, ...]
    unit_column: str | None
    records: int
    units: int
    notes: tuple[str, ...]


def _look(path: Path) -> _Seen:
    if path.is_file() and path.suffix == ".parquet":
        rows, columns, notes = _parquet(path)
        source = "parquet"
    elif (path / "metadata.jsonl").is_file():
        rows, columns, notes = _jsonl(path / "metadata.jsonl")
        source = "folder"
    else:
        raise DataError(
            f"folder = {path} · must hold metadata.jsonl, or be a .parquet file",
            next='Write one line a record, such as {"file_name": "1.png", "text": "a red circle", "patient": "p1"}.',
        )
    unit_column = _unit_column(columns)
    if unit_column is None:
        notes.append("no column names a person: if a person has several records, add one and set data.unit_column")
    if "text" not in columns:
        notes.append("there is no column named text: the captions are read from it")
    if not any(column in columns for column in IMAGE_COLUMNS):
        notes.append(f"there is no column named {' or '.join(IMAGE_COLUMNS)}: the pictures are found by it")
    units = len({str(row.get(unit_column)) for row in rows}) if unit_column else len(rows)
    return _Seen(source, columns, unit_column, len(rows), units, tuple(notes))


def _unit_column(columns: tuple[str, ...]) -> str | None:
    for word in UNIT_COLUMNS:
        for column in columns:
            if column.lower() in (word, f"{word}_id", f"{word}id", f"{word}_name"):
                return column
    return None


def _jsonl(path: Path) -> tuple[list[dict], tuple[str, ...], list[str]]:
    rows: list[dict] = []
    unreadable = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        row = None
                    if isinstance(row, dict):
                        rows.append(row)
                    else:
                        unreadable += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path} = {error.reason} · must be UTF-8 text", next="Convert the file.") from None
    if not rows:
        raise DataError(f"{path} = no record · at least one line with a JSON object", next="Write one line a record.")
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    notes = [f"{unreadable} lines are not JSON objects: `sfumato data check` names them"] if unreadable else []
    return rows, columns, notes


def _parquet(path: Path) -> tuple[list[dict], tuple[str, ...], list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = tuple(pyarrow.parquet.read_schema(path).names)
        unit_column = _unit_column(columns)
        if unit_column is None:
            return [{}] * pyarrow.parquet.read_metadata(path).num_rows, columns, []
        return pyarrow.parquet.read_table(path, columns=[unit_column]).to_pylist(), columns, []
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} = {str(error)[:200]} · must be a Parquet file", next="Write it again.") from None


def _heading(folder: Path, seen: _Seen, target: Path) -> str:
    return "\n".join(
        [
            f"A recipe for {folder}, with every value that is used. Keys that you remove take their default.",
            f"Columns found: {', '.join(seen.columns)}.",
            *(f"Note: {note}." for note in seen.notes),
            "The batch size was chosen from the number of units found, which so becomes as public as the recipe.",
            "",
            "What is wrong with the data; what the guarantee costs; and then the training, which spends:",
            f"  sfumato data check {folder}",
            f"  sfumato plan {target}",
            f"  sfumato train {target}",
        ]
    )
