"""A folder of pictures or sounds with a table, or one folder per class."""

from collections.abc import Iterator
from pathlib import Path

from sfumato.data.entries import (
    SPLITS,
    Columns,
    Entries,
    Entry,
    kind_of,
    missing_column,
    stay_inside,
    unknown_kind,
)
from sfumato.data.rows import columns_of, entry_of, read_lines
from sfumato.data.tables import Parquet
from sfumato.errors import DataError

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Folder(Entries):
    """A folder in one of these layouts, also once for each of ``train``, ``validation``, ``test`` inside it:

    - ``metadata.jsonl`` (or ``.csv``, ``.parquet``): one row a record, with ``file_name`` (or ``image``, ``audio``),
      ``text`` (or ``caption``), the unit column, and any metadata;
    - one folder per class (the imagefolder and audiofolder layouts of ``datasets``): the folder's name is the caption.
    """

    def __init__(self, path: Path | str, *, columns: Columns | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.how = columns or Columns()
        if not self.path.is_dir():
            raise DataError(f"path = {path} · must be a folder", next="Check data.path.", code="missing_file")
        inner = sorted(p for p in self.path.iterdir() if p.is_dir() and p.name.lower() in SPLITS)
        self.roots = (
            [(self.path, None)] if table_of(self.path) or not inner else [(p, SPLITS[p.name.lower()]) for p in inner]
        )
        self.tables = [table_of(root) for root, _ in self.roots]
        if any(self.tables) and not all(self.tables):
            bare = [root.name for (root, _), table in zip(self.roots, self.tables, strict=True) if table is None]
            raise DataError(
                f"metadata.jsonl = missing in {', '.join(bare)} · every split or none has one",
                next="Add it.",
                code="missing_file",
            )
        self.columns: list[set[str]] = []
        if all(self.tables):
            self._look_at_tables([table for table in self.tables if table is not None])
        else:
            self._look_at_classes()

    def _look_at_tables(self, tables: list[Path]) -> None:
        for table in tables:
            label = table.relative_to(self.path).as_posix()
            there = (
                set(Parquet(table, columns=self.how).columns)
                if table.suffix == ".parquet"
                else columns_of(table, label)
            )
            self.columns.append(there)
            if self.how.unit is not None and self.how.unit not in there:
                raise missing_column(self.how.unit, there, label)
            self.how.text_among(there, label)

    def _look_at_classes(self) -> None:
        classes = sorted({p.name for root, _ in self.roots for p in _visible(root) if p.is_dir()})
        if not classes:
            raise DataError(
                f"path = {self.path} · has no metadata.jsonl and no class folders",
                next="Add metadata.jsonl with one line a record: file_name, text, and a unit column.",
                code="missing_file",
            )
        for name, value in (("unit_column", self.how.unit), ("text_column", self.how.text)):
            if value is not None:
                raise DataError(
                    f"{name} = {value} · class folders have no columns",
                    next=f"Write a metadata.jsonl with that column, or leave data.{name} out.",
                    code="missing_column",
                )
        self.facts = {"label": tuple(dict.fromkeys(_caption(name) for name in classes))}

    def entries(self) -> Iterator[Entry]:
        for number, ((root, split), table) in enumerate(zip(self.roots, self.tables, strict=True)):
            if table is None:
                yield from self._class_folders(root, split)
            elif table.suffix == ".parquet":
                yield from Parquet(table, columns=self.how).rows(split=split)
            else:
                yield from self._rows(root, split, table, self.columns[number])

    def _class_folders(self, root: Path, split: str | None) -> Iterator[Entry]:
        for folder in (p for p in _visible(root) if p.is_dir()):
            caption = _caption(folder.name)
            for file in (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")):
                yield self._member(file, caption, split)

    def _member(self, file: Path, caption: str, split: str | None) -> Entry:
        name = file.relative_to(self.path).as_posix()
        kind = kind_of(name)
        problem = None if kind else unknown_kind(name)
        try:
            stay_inside(self.path, file, name)
        except DataError as error:
            problem = error
        return Entry(
            id=name,
            unit=None,
            text=caption if "text" in self.how.modalities else None,
            image=file if kind == "image" and kind in self.how.modalities else None,
            audio=file if kind == "audio" and kind in self.how.modalities else None,
            metadata={"facts": {"label": caption}} | ({"split": split} if split else {}),
            problem=problem,
        )

    def _rows(self, root: Path, split: str | None, table: Path, there: set[str]) -> Iterator[Entry]:
        """``there``: the columns that any row has; one that some rows lack is a problem of those rows."""
        label = table.relative_to(self.path).as_posix()
        for number, row in read_lines(table, label):
            name = f"{label}:{number}"
            if isinstance(row, DataError):
                yield Entry(id=name, unit=None, problem=row)
            else:
                yield entry_of(row, name=name, there=there, root=root, columns=self.how, split=split)


def table_of(root: Path) -> Path | None:
    return next((root / name for name in TABLES if (root / name).is_file()), None)


def _visible(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if not p.name.startswith("."))


def _caption(folder: str) -> str:
    return " ".join(folder.replace("_", " ").replace("-", " ").split()) or folder
