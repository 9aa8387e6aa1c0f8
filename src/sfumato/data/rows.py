"""A row of a table (JSON lines, CSV, Parquet, Arrow) as an entry; whatever is wrong with it becomes its problem."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.data import media
from sfumato.data.entries import Columns, Entry, inside, kind_of, text_of, unknown_kind
from sfumato.errors import DataError

MEDIA_COLUMNS = ("file_name", "image", "audio")


def entry_of(
    row: Mapping[str, Any],
    *,
    name: str,
    there: set[str],
    root: Path,
    columns: Columns,
    split: str | None = None,
) -> Entry:
    """Args: there: the columns that any row has; one that this row lacks is its problem."""
    text_column = columns.text_among(there, name)
    metadata = {key: value for key, value in row.items() if key not in MEDIA_COLUMNS and key != text_column}
    if split is not None:
        metadata.setdefault("split", split)
    unit = None
    if columns.unit is not None:
        given = row.get(columns.unit)
        unit = "" if given is None else str(given)
    values: dict[str, Any] = {}
    try:
        if text_column is not None and not (columns.may_lack and row.get(text_column) in (None, "")):
            values["text"] = text_of(row.get(text_column), name)
        found = {}
        for column in MEDIA_COLUMNS:
            if column in there:
                found.update(media_of(row.get(column), column, name, root))
        wanted = [column for column in ("image", "audio") if column in there and column in columns.modalities]
        if not columns.may_lack:
            for column in wanted:
                if column not in found:
                    raise _nothing(column, name)
            if "file_name" in there and not found and set(columns.modalities) & {"image", "audio"}:
                raise _nothing("file_name", name)
        values.update({kind: value for kind, value in found.items() if kind in columns.modalities})
    except DataError as problem:
        return Entry(id=name, unit=unit, metadata=metadata, problem=problem, **values)
    return Entry(id=name, unit=unit, metadata=metadata, **values)


def media_of(value: Any, column: str, name: str, root: Path) -> dict[str, media.Media]:
    """Bytes, {bytes, path}, or a path below ``root``; {} where there is nothing."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        return {}
    if isinstance(value, (bytes, bytearray)):
        if column == "file_name":
            raise DataError(
                f"{name}: file_name = bytes · must be a path", next="Name the column image or audio.", code="row"
            )
        return {column: bytes(value)}
    if not isinstance(value, str):
        raise DataError(
            f"{name}: {column} = {str(value)[:60]} · must be a path or bytes", next="Correct the record.", code="row"
        )
    path = inside(root, value, f"{name}: {column}")
    kind = kind_of(value) if column == "file_name" else column
    if kind is None:
        raise unknown_kind(f"{name}: {column} = {value}")
    return {kind: path}


def _nothing(column: str, name: str) -> DataError:
    return DataError(
        f"{name}: {column} = nothing · the record has a caption but nothing that it describes",
        next="Name the file, take the record out, or set data.may_lack.",
        code="missing_file",
    )


def read_lines(table: Path, label: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Numbered rows (from 1) of JSON lines or CSV; a line that is not a row is given as the DataError that it is."""
    try:
        with table.open(encoding="utf-8-sig", newline="" if table.suffix == ".csv" else None) as lines:
            if table.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(lines), 1):
                    if None in row or None in row.values():
                        yield number, _bad_row(f"{label}:{number} · has more or fewer cells than the header")
                    else:
                        yield number, dict(row)
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, _bad_row(f"{label}:{number} · must be a JSON object ({error})")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    yield number, _bad_row(f"{label}:{number} = {str(row)[:60]} · must be a JSON object")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{label} · must be readable UTF-8 ({error})", next="Save it as UTF-8.", code="unreadable"
        ) from None


def _bad_row(message: str) -> DataError:
    return DataError(message, next="Correct the line.", code="row")


def columns_of(table: Path, label: str) -> set[str]:
    """The columns that any row has. Raises DataError where there is no row."""
    columns: set[str] = set()
    for _, row in read_lines(table, label):
        if isinstance(row, dict):
            columns.update(row)
    if not columns:
        raise DataError(f"{label} · has no records", next="Write one line a record.", code="empty")
    return columns
