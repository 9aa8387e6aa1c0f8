"""Tables in files: Parquet, and the Arrow folders that ``datasets`` saves, which are memory-mapped."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from sfumato.data.entries import SPLITS, TEXT_COLUMNS, Columns, Entries, Entry, missing_column
from sfumato.data.rows import MEDIA_COLUMNS, entry_of
from sfumato.errors import DataError, MissingDependency

_ROWS = 256  # that are turned into Python values at once


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            f"pyarrow = missing · reads Parquet and Arrow ({error})", next="pip install pyarrow"
        ) from None
    return pa


def _require(columns: Columns, there: list[str], where: str) -> None:
    """Raises DataError unless the unit column and something to train on are among the columns."""
    if columns.unit is not None and columns.unit not in there:
        raise missing_column(columns.unit, there, where)
    if columns.text_among(there, where) is None and not any(name in there for name in (*TEXT_COLUMNS, *MEDIA_COLUMNS)):
        raise missing_column("text, image or audio", there, where)


class Parquet(Entries):
    """A Parquet file, or a folder of them. ``image`` and ``audio``: bytes, {bytes, path}, or paths beside the file."""

    def __init__(self, path: Path | str, *, columns: Columns | None = None) -> None:
        self.path, self.how = Path(path), columns or Columns()
        self.name = self.path.stem
        self.files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.files or not all(file.is_file() for file in self.files):
            raise DataError(
                f"path = {path} · must be a Parquet file, or a folder of them",
                next="Check data.path.",
                code="missing_file",
            )
        self.columns: list[str] = []
        for file in self.files:
            self.columns = list(self._open(file).schema_arrow.names)
            _require(self.how, self.columns, file.name)

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    @staticmethod
    def _open(file: Path) -> Any:
        pa = _pyarrow()
        try:
            return pa.parquet.ParquetFile(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{file.name} · is not a readable Parquet file ({error})", next="Write it again.", code="unreadable"
            ) from None

    def entries(self) -> Iterator[Entry]:
        return self.rows(split=None)

    def rows(self, *, split: str | None) -> Iterator[Entry]:
        for file in self.files:
            opened, number = self._open(file), 0
            there = set(opened.schema_arrow.names)
            try:
                for batch in opened.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        yield entry_of(
                            row,
                            name=f"{file.name}:{number}",
                            there=there,
                            root=file.parent,
                            columns=self.how,
                            split=split,
                        )
                        number += 1
            except (OSError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{file.name}:{number} · cannot be read ({error})", next="Write the file again.", code="unreadable"
                ) from None


class Arrow(Entries):
    """What ``save_to_disk`` of ``datasets`` writes, or a folder of .arrow files: memory-mapped, any row at once.

    A column of the type ClassLabel becomes a fact under its own name.
    """

    def __init__(self, path: Path | str, *, columns: Columns | None = None) -> None:
        self.path, self.how = Path(path), columns or Columns()
        self.name = self.path.resolve().name
        self.files = _arrow_files(self.path)
        self._tables = [_mapped(file, self.path) for file, _ in self.files]
        self._ends = list(accumulate(table.num_rows for table in self._tables))
        self._labels: dict[Path, dict[str, tuple[str, ...]]] = {}
        for (file, _), table in zip(self.files, self._tables, strict=True):
            _require(self.how, table.column_names, file.name)
            self._labels.setdefault(file.parent, _class_labels(file.parent))
        self.facts = {name: names for labels in self._labels.values() for name, names in labels.items()}

    def __len__(self) -> int:
        return self._ends[-1]

    def entries(self) -> Iterator[Entry]:
        for number in range(len(self.files)):
            table = self._tables[number]
            for start in range(0, table.num_rows, _ROWS):
                yield from self._part(number, start, min(_ROWS, table.num_rows - start))

    def entry(self, row: int) -> Entry:
        """Any row, without those before it."""
        if not 0 <= row < len(self):
            raise DataError(f"row = {row} · must be from 0 to {len(self) - 1}", next="Choose one of these.")
        number = bisect_right(self._ends, row)
        before = self._ends[number - 1] if number else 0
        return next(self._part(number, row - before, 1))

    def _part(self, number: int, start: int, count: int) -> Iterator[Entry]:
        (file, split), table = self.files[number], self._tables[number]
        labels, there = self._labels[file.parent], set(table.column_names)
        label = file.relative_to(self.path).as_posix()
        pa = _pyarrow()
        try:
            rows = table.slice(start, count).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{label}:{start} · cannot be read ({error})", next="Save the set again.", code="unreadable"
            ) from None
        for place, row in enumerate(rows, start):
            name = f"{label}:{place}"
            facts, problem = _facts(row, labels, name)
            entry = entry_of(
                {key: value for key, value in row.items() if key not in labels} | facts,
                name=name,
                there=there,
                root=file.parent,
                columns=self.how,
                split=split,
            )
            yield entry if problem is None else Entry(id=name, unit=entry.unit, problem=problem)


def _facts(
    row: Mapping[str, Any], labels: Mapping[str, tuple[str, ...]], name: str
) -> tuple[dict[str, Any], DataError | None]:
    """{"facts": {column: name of the class}}; a row without a class (None, -1) lacks that fact."""
    facts: dict[str, str] = {}
    for column, names in labels.items():
        value = row.get(column)
        if value is None or value == -1:
            continue
        if not isinstance(value, int) or not 0 <= value < len(names):
            error = f"{name}: {column} = {value} · must be from 0 to {len(names) - 1}"
            return {}, DataError(error, next="Save the set again.", code="row")
        facts[column] = names[value]
    return ({"facts": facts} if facts else {}), None


def _arrow_files(path: Path) -> list[tuple[Path, str | None]]:
    """The .arrow files in order, each with its split; of a saved set those that its own list names."""
    if not path.is_dir():
        raise DataError(f"path = {path} · must be a folder", next="Check data.path.", code="missing_file")
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        if not isinstance(splits, list) or not all(isinstance(s, str) and "/" not in s and s != ".." for s in splits):
            raise DataError(
                "dataset_dict.json: splits · must be names of folders", next="Save it again.", code="unreadable"
            )
        return [(file, SPLITS.get(split.lower())) for split in splits for file, _ in _arrow_files(path / split)]
    if (path / "state.json").is_file():
        listed = _json(path / "state.json").get("_data_files", [])
        try:
            names = [str(item["filename"]) for item in listed]
        except (TypeError, KeyError):
            names = []
        if any("/" in name or name == ".." for name in names):
            raise DataError(f"{path.name}/state.json · names a file outside the folder", next="Save it again.")
    else:
        names = sorted(file.name for file in path.glob("*.arrow"))
    if not names:
        raise DataError(
            f"path = {path} · has no .arrow files", next="Give what save_to_disk wrote.", code="missing_file"
        )
    return [(path / name, None) for name in names]


def _mapped(file: Path, root: Path) -> Any:
    """The table of a file (either form of Arrow's); its pages are read when they are asked for."""
    pa = _pyarrow()
    label = file.relative_to(root).as_posix()
    try:
        source = pa.memory_map(str(file))
        start = source.read(6)
        source.seek(0)
        return pa.ipc.open_file(source).read_all() if start == b"ARROW1" else pa.ipc.open_stream(source).read_all()
    except FileNotFoundError:
        raise DataError(f"{label} · does not exist", next="Save the set again.", code="missing_file") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{label} · is not a readable Arrow file ({error})", next="Save the set again.", code="unreadable"
        ) from None


def _class_labels(folder: Path) -> dict[str, tuple[str, ...]]:
    """Columns of the type ClassLabel and their names, from dataset_info.json; {} where there is none."""
    if not (folder / "dataset_info.json").is_file():
        return {}
    features = _json(folder / "dataset_info.json").get("features") or {}
    return {
        column: tuple(str(name) for name in feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path.name} · must be JSON ({error})", next="Save the set again.", code="unreadable"
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path.name} · must be a JSON object", next="Save the set again.", code="unreadable")
    return value
