"""Where records come from: a folder, a Parquet file, a built-in set. Each yields entries, which are read into records.

An entry is a record that has not been decoded; reading it may fail, with a reason. So a check can look at all of them
and report every problem, and a load can stop at the first bad ones; neither drops a record silently.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sfumato.data import media
from sfumato.data.settings import DataSettings
from sfumato.errors import DataError, MissingDependency, UsageError
from sfumato.records import Record

TEXT_COLUMNS = ("text", "caption")
_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLITS = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}


class Source(Protocol):
    """Attributes:
    name: of the set, for the data card.
    facts: closed label sets of ``metadata["facts"]``; {} where none are known.
    """

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, tuple[str, ...]]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record before it is decoded. ``problem`` is set where the source already knows that it is bad."""

    id: str
    unit: str | None  # None: the source names no units
    text: str | None = None
    image: media.Media | None = None
    audio: media.Media | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: DataError | None = None

    def read(self) -> Record:
        """Decodes it. Raises DataError for anything that is not as it should be."""
        if self.problem is not None:
            raise self.problem
        if self.unit is not None and not self.unit.strip():
            raise DataError(
                f"{self.id}: unit = {self.unit!r} · must name the person it belongs to",
                next="Fill the unit column.",
                code="unit",
            )
        if self.text is not None and not self.text.strip():
            raise DataError(
                f"{self.id}: text = {self.text!r} · must not be empty",
                next="Write the text, or take the record out.",
                code="empty_text",
            )
        if self.text is None and self.image is None and self.audio is None:
            raise DataError(
                f"{self.id} · has neither text nor image nor audio", next="Take the record out.", code="empty"
            )
        image = None if self.image is None else media.read_image(self.image, name=self.id)
        audio, rate = (None, None) if self.audio is None else media.read_audio(self.audio, name=self.id)
        return Record(
            id=self.id,
            unit=self.id if self.unit is None else self.unit,
            text=self.text,
            image=image,
            audio=audio,
            sample_rate=rate,
            metadata=self.metadata,
        )


class Entries:
    """What folder and Parquet share: iteration reads the entries."""

    name: str
    facts: Mapping[str, tuple[str, ...]] = {}

    def entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def __iter__(self) -> Iterator[Record]:
        for entry in self.entries():
            yield entry.read()


class Folder(Entries):
    """A folder in one of these layouts, also once for each of ``train``, ``validation``, ``test`` inside it:

    - ``metadata.jsonl`` (or ``.csv``): one row a record, with ``file_name`` (or ``image``, ``audio``), ``text`` (or
      ``caption``), the unit column, and any metadata;
    - one folder per class (the imagefolder and audiofolder layouts of ``datasets``): the folder's name is the caption.
    """

    def __init__(self, path: Path | str, *, unit_column: str | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.unit_column = unit_column
        if not self.path.is_dir():
            raise DataError(f"path = {path} · must be a folder", next="Check data.path.", code="missing_file")
        inner = sorted(p for p in self.path.iterdir() if p.is_dir() and p.name.lower() in SPLITS)
        self.roots = (
            [(self.path, None)] if _table_of(self.path) or not inner else [(p, SPLITS[p.name.lower()]) for p in inner]
        )
        self.tables = [_table_of(root) for root, _ in self.roots]
        if any(self.tables) and not all(self.tables):
            bare = [root.name for (root, _), table in zip(self.roots, self.tables, strict=True) if table is None]
            raise DataError(
                f"metadata.jsonl = missing in {', '.join(bare)} · every split or none has one",
                next="Add it.",
                code="missing_file",
            )
        self.columns: list[set[str]] = []
        if all(self.tables):
            for table in (table for table in self.tables if table is not None):
                label = table.relative_to(self.path).as_posix()
                self.columns.append(_columns_of(table, label))
                if unit_column is not None and unit_column not in self.columns[-1]:
                    raise missing_column(unit_column, self.columns[-1], label)
        else:
            classes = sorted({p.name for root, _ in self.roots for p in _visible(root) if p.is_dir()})
            if not classes:
                raise DataError(
                    f"path = {path} · has no metadata.jsonl and no class folders",
                    next="Add metadata.jsonl with one line a record: file_name, text, and a unit column.",
                    code="missing_file",
                )
            if unit_column is not None:
                raise DataError(
                    f"unit_column = {unit_column} · class folders have no columns",
                    next="Write a metadata.jsonl with that column, or leave data.unit_column out.",
                    code="missing_column",
                )
            self.facts = {"label": tuple(dict.fromkeys(_caption(name) for name in classes))}

    def entries(self) -> Iterator[Entry]:
        for number, ((root, split), table) in enumerate(zip(self.roots, self.tables, strict=True)):
            if table is None:
                yield from self._class_folders(root, split)
            else:
                yield from self._rows(root, split, table, self.columns[number])

    def _class_folders(self, root: Path, split: str | None) -> Iterator[Entry]:
        for folder in (p for p in _visible(root) if p.is_dir()):
            caption = _caption(folder.name)
            for file in (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")):
                name = file.relative_to(self.path).as_posix()
                metadata = {"facts": {"label": caption}} | ({"split": split} if split else {})
                kind = _kind(name)
                problem = None if kind else _unknown_kind(name)
                media_of = {"image": file} if kind == "image" else {"audio": file} if kind == "audio" else {}
                yield Entry(id=name, unit=None, text=caption, metadata=metadata, problem=problem, **media_of)

    def _rows(self, root: Path, split: str | None, table: Path, columns: set[str]) -> Iterator[Entry]:
        """``columns``: those that any row has; a column that some rows lack is a problem of those rows."""
        label = table.relative_to(self.path).as_posix()
        for number, row in _read_table(table, label):
            name = f"{label}:{number}"
            if isinstance(row, DataError):
                yield Entry(id=name, unit=None, problem=row)
            else:
                yield _entry(row, name=name, columns=columns, root=root, unit_column=self.unit_column, split=split)


class Parquet(Entries):
    """A Parquet file, or a folder of them. ``image`` and ``audio``: bytes, {bytes, path}, or paths beside the file."""

    def __init__(self, path: Path | str, *, unit_column: str | None = None) -> None:
        self.path, self.unit_column = Path(path), unit_column
        self.name = self.path.stem
        self.files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.files or not all(file.is_file() for file in self.files):
            raise DataError(
                f"path = {path} · must be a Parquet file, or a folder of them",
                next="Check data.path.",
                code="missing_file",
            )
        for file in self.files:
            columns = list(self._open(file).schema_arrow.names)
            if unit_column is not None and unit_column not in columns:
                raise missing_column(unit_column, columns, file.name)
            if not any(name in columns for name in (*TEXT_COLUMNS, "image", "audio", "file_name")):
                raise missing_column("text, image or audio", columns, file.name)

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingDependency(
                f"pyarrow = missing · reads Parquet ({error})", next="pip install pyarrow"
            ) from None
        try:
            return pq.ParquetFile(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{file.name} · is not a readable Parquet file ({error})", next="Write it again.", code="unreadable"
            ) from None

    def entries(self) -> Iterator[Entry]:
        for file in self.files:
            opened, number = self._open(file), 0
            columns = set(opened.schema_arrow.names)
            try:
                for batch in opened.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield _entry(
                            row,
                            name=f"{file.name}:{number}",
                            columns=columns,
                            root=file.parent,
                            unit_column=self.unit_column,
                            split=None,
                        )
                        number += 1
            except (OSError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{file.name}:{number} · cannot be read ({error})", next="Write the file again.", code="unreadable"
                ) from None


def open_source(settings: DataSettings) -> Source:
    """The records of ``settings`` that are for training; built-in public parts are opened by ``prepare.load``."""
    from sfumato.data import examples

    match settings.source:
        case "folder":
            return Folder(settings.path or "", unit_column=settings.unit_column)
        case "parquet":
            return Parquet(settings.path or "", unit_column=settings.unit_column)
        case _:
            return examples.open_example(settings)


def settings_for(target: str | Path, *, unit_column: str | None = None) -> DataSettings:
    """What ``data check PATH`` means: a built-in set, a folder, a Parquet file or a folder of them."""
    if str(target) in ("clinic", "emoji", "mnist", "fashion-mnist"):
        return DataSettings(source=str(target), unit_column=unit_column)  # type: ignore[arg-type]
    path = Path(target)
    if not path.exists():
        raise DataError(
            f"path = {path} · does not exist",
            next="Give a folder, a Parquet file, or clinic, emoji, mnist, fashion-mnist.",
            code="missing_file",
        )
    table = path.suffix == ".parquet" or (path.is_dir() and not _table_of(path) and any(path.glob("*.parquet")))
    if not table and not path.is_dir():
        raise UsageError(
            f"path = {path} · must be a folder or a .parquet file",
            next="Put the records in a folder with metadata.jsonl.",
        )
    return DataSettings(source="parquet" if table else "folder", path=str(path), unit_column=unit_column)


def missing_column(name: str, columns: Any, where: str) -> DataError:
    return DataError(
        f"{where}: column {name} · is missing",
        next=f"There are: {', '.join(sorted(columns)) or 'none'}.",
        code="missing_column",
    )


def _table_of(root: Path) -> Path | None:
    return next((root / name for name in ("metadata.jsonl", "metadata.csv") if (root / name).is_file()), None)


def _visible(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if not p.name.startswith("."))


def _caption(folder: str) -> str:
    return " ".join(folder.replace("_", " ").replace("-", " ").split()) or folder


def _kind(name: str) -> str | None:
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in media.IMAGE_SUFFIXES else "audio" if suffix in media.AUDIO_SUFFIXES else None


def _unknown_kind(name: str) -> DataError:
    return DataError(
        f"{name} · is neither a picture nor a sound by its suffix",
        next=f"Use one of {' '.join(media.IMAGE_SUFFIXES + media.AUDIO_SUFFIXES)}, or take it out.",
        code="suffix",
    )


def _read_table(table: Path, label: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Numbered rows (from 1); a line that is not a JSON object is given as the DataError that it is."""
    try:
        with table.open(encoding="utf-8-sig", newline="" if table.suffix == ".csv" else None) as lines:
            if table.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(lines), 1):
                    if None in row or None in row.values():
                        yield (
                            number,
                            DataError(
                                f"{label}:{number} · has more or fewer cells than the header",
                                next="Correct the line.",
                                code="row",
                            ),
                        )
                    else:
                        yield number, dict(row)
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield (
                        number,
                        DataError(
                            f"{label}:{number} · must be a JSON object ({error})", next="Correct the line.", code="row"
                        ),
                    )
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    yield (
                        number,
                        DataError(
                            f"{label}:{number} = {str(row)[:60]} · must be a JSON object",
                            next="Correct the line.",
                            code="row",
                        ),
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{label} · must be readable UTF-8 ({error})", next="Save it as UTF-8.", code="unreadable"
        ) from None


def _columns_of(table: Path, label: str) -> set[str]:
    columns: set[str] = set()
    for _, row in _read_table(table, label):
        if isinstance(row, dict):
            columns.update(row)
    if not columns:
        raise DataError(f"{label} · has no records", next="Write one line a record.", code="empty")
    return columns


def _entry(
    row: Mapping[str, Any], *, name: str, columns: set[str], root: Path, unit_column: str | None, split: str | None
) -> Entry:
    """One row of a table as an entry; whatever is wrong with it becomes its problem."""
    used = {"file_name", "image", "audio"}
    text_column = next((column for column in TEXT_COLUMNS if column in columns), None)
    metadata = {key: value for key, value in row.items() if key not in used and key != text_column}
    if split is not None:
        metadata.setdefault("split", split)
    unit = None
    if unit_column is not None:
        given = row.get(unit_column)
        unit = "" if given is None else str(given)
    values: dict[str, Any] = {}
    try:
        if text_column is not None:
            values["text"] = _text(row.get(text_column), name)
        found = {}
        for column in ("file_name", "image", "audio"):
            if column in columns:
                found.update(_media(row.get(column), column, name, root))
        values.update(found)
        for column in ("image", "audio"):
            if column in columns and column not in found:
                raise _no_media(column, name)
        if "file_name" in columns and not found:
            raise _no_media("file_name", name)
    except DataError as problem:
        return Entry(id=name, unit=unit, metadata=metadata, problem=problem, **values)
    return Entry(id=name, unit=unit, metadata=metadata, **values)


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""  # reading refuses an empty text
    if not isinstance(value, str):
        raise DataError(f"{name}: text = {str(value)[:60]} · must be a string", next="Correct the record.", code="text")
    return value


def _no_media(column: str, name: str) -> DataError:
    return DataError(
        f"{name}: {column} = nothing · the record has a caption but nothing that it describes",
        next="Name the file, or take the record out.",
        code="missing_file",
    )


def _media(value: Any, column: str, name: str, root: Path) -> dict[str, media.Media]:
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
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts or "\x00" in value:
        raise DataError(
            f"{name}: {column} = {value!r} · must be a path inside the folder",
            next="Copy the file into the folder.",
            code="outside",
        )
    kind = _kind(value) if column == "file_name" else column
    if kind is None:
        raise _unknown_kind(f"{name}: {column} = {value}")
    return {kind: root / relative}
