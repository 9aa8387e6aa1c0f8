"""WebDataset: records as neighbouring files of tar shards, found through an index, read without unpacking.

A record is the files of a shard that share their name up to the first dot: ``a/007.jpg``, ``a/007.txt``, ``a/007.json``.
The index says where in the shard each of them lies. It is made once, in the cache of the data's account, and again when
the shard's size or time changes.
"""

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from sfumato.data import media, places
from sfumato.data.entries import TEXT_COLUMNS, Columns, Entries, Entry, kind_of, text_of
from sfumato.errors import DataError, OutsideError

TEXT_SUFFIXES = ("txt", "text", "caption")
MAX_WORDS = 16 * 1024 * 1024  # bytes of a text or of its JSON
_BLOCK = 512
_ROWS = 1024
_VERSION = b"1"


class WebDataset(Entries):
    """A .tar shard, or a folder of them. Pictures, sounds, ``txt``, ``json`` (metadata), ``cls`` (a number, as a fact).

    Args: index: the folder for the indices.
    """

    def __init__(self, path: Path | str, *, index: Path, columns: Columns | None = None) -> None:
        self.path, self.how = Path(path), columns or Columns()
        self.name = self.path.resolve().stem
        self.shards = sorted(self.path.glob("*.tar")) if self.path.is_dir() else [self.path]
        if not self.shards or not all(shard.is_file() for shard in self.shards):
            raise DataError(
                f"path = {path} · must be a .tar shard, or a folder of them (not compressed)",
                next="Check data.path; gunzip what is compressed.",
                code="missing_file",
            )
        self._tables = [_index_of(shard, index) for shard in self.shards]
        self._ends = list(accumulate(table.num_rows for table in self._tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def entries(self) -> Iterator[Entry]:
        for number, table in enumerate(self._tables):
            for start in range(0, table.num_rows, _ROWS):
                for row in table.slice(start, _ROWS).to_pylist():
                    yield self._entry(self.shards[number], row)

    def entry(self, number: int) -> Entry:
        """Any record, without those before it."""
        if not 0 <= number < len(self):
            raise DataError(f"record = {number} · must be from 0 to {len(self) - 1}", next="Choose one of these.")
        shard = bisect_right(self._ends, number)
        before = self._ends[shard - 1] if shard else 0
        return self._entry(self.shards[shard], self._tables[shard].slice(number - before, 1).to_pylist()[0])

    def _entry(self, shard: Path, row: dict[str, Any]) -> Entry:
        name = f"{shard.name}:{row['key']}"
        members = {
            suffix: media.Span(shard, offset, size, f"{name}.{suffix}")
            for suffix, offset, size in zip(row["suffixes"], row["offsets"], row["sizes"], strict=True)
        }
        unit: str | None = None
        try:
            if row["problem"]:
                raise DataError(f"{name}{row['problem']}", next="Write the shard again.", code=row["code"])
            values = _json(members["json"]) if "json" in members else {}
            if self.how.unit is not None:
                given = values.get(self.how.unit)
                unit = "" if given is None else str(given)
            return self._read(name, unit, members, values)
        except DataError as problem:
            return Entry(id=name, unit=unit, problem=problem)

    def _read(self, name: str, unit: str | None, members: dict[str, media.Span], values: dict[str, Any]) -> Entry:
        found: dict[str, Any] = {}
        text: str | None = None
        text_key = (
            next((key for key in TEXT_COLUMNS if key in values), None) if self.how.text is None else self.how.text
        )
        metadata = {key: value for key, value in values.items() if key != text_key}
        for suffix, span in members.items():
            kind = kind_of(f"x.{suffix}")
            if suffix in TEXT_SUFFIXES:
                text = _utf8(span)
            elif suffix == "cls":
                metadata["facts"] = {**_facts(metadata), "label": _utf8(span).strip()}
            elif kind is not None and kind in found:
                raise DataError(
                    f"{name}: {kind} = two of them · a record has one", next="Write the shard again.", code="row"
                )
            elif kind is not None:
                found[kind] = span
            elif suffix != "json":
                raise DataError(
                    f"{span.name} · is of a kind that is not read",
                    next=f"Use {', '.join(TEXT_SUFFIXES)}, json, cls, or a suffix of a picture or sound.",
                    code="suffix",
                )
        if text_key is not None and (text is None or self.how.text is not None):
            text = text_of(values[text_key], name) if text_key in values else None
        kept = {kind: span for kind, span in found.items() if kind in self.how.modalities}
        if "text" in self.how.modalities and text is not None:
            kept["text"] = text
        return Entry(id=name, unit=unit, metadata=metadata, **kept)


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    facts = metadata.get("facts")
    return facts if isinstance(facts, dict) else {}


def _utf8(span: media.Span) -> str:
    if span.size > MAX_WORDS:
        raise DataError(f"{span.name}: bytes = {span.size} · at most {MAX_WORDS}", next="Shorten it.", code="huge")
    try:
        return span.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{span.name} · must be UTF-8 ({error})", next="Save it as UTF-8.", code="text") from None


def _json(span: media.Span) -> dict[str, Any]:
    try:
        value = json.loads(_utf8(span))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{span.name} · must be JSON ({error})", next="Write the shard again.", code="row") from None
    if not isinstance(value, dict):
        raise DataError(f"{span.name} · must be a JSON object", next="Write the shard again.", code="row")
    return value


# -- the index --


def _index_of(shard: Path, folder: Path) -> Any:
    """The table of a shard's records, memory-mapped; made now if there is none for this shard as it is."""
    import pyarrow as pa
    import pyarrow.ipc

    place = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:12]
    stat = shard.stat()
    state = hashlib.sha256(_VERSION + f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    file = folder / f"index-{place}-{state}.arrow"
    if not file.is_file():
        rows = _records(shard)
        places.private_folder(folder)
        places.sweep(folder)
        part = folder / f".part-{os.getpid()}-{file.name}"
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                _write(out, rows)
            part.rename(file)
        except OSError as error:
            raise places.no_room(folder, error) from None
        finally:
            part.unlink(missing_ok=True)
        for old in folder.glob(f"index-{place}-*.arrow"):
            if old != file:
                old.unlink(missing_ok=True)
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OutsideError(
            f"index = {file} · cannot be read ({error})", next="Remove it with `sfumato data clear`."
        ) from None


def _write(out: Any, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.ipc

    text, many = pa.string(), pa.list_
    schema = pa.schema(
        {
            "key": text,
            "suffixes": many(text),
            "offsets": many(pa.int64()),
            "sizes": many(pa.int64()),
            "problem": text,
            "code": text,
        }
    )
    with pa.ipc.new_file(out, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == 10_000:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _records(shard: Path) -> Iterator[dict[str, Any]]:
    """Neighbouring members with one key, as rows of the index; what is wrong with them is said there."""
    row: dict[str, Any] | None = None
    seen: set[str] = set()
    for member in _members(shard):
        key, suffix = _key(member.name)
        if not member.isreg() and not (member.islnk() or member.issym()):
            continue  # folders
        if key is None:
            continue  # hidden files, and files without a suffix, belong to no record
        if row is None or row["key"] != key:
            if row is not None:
                yield row
            row = {"key": key, "suffixes": [], "offsets": [], "sizes": [], "problem": None, "code": None}
            if key in seen:
                row |= {"problem": " · its files are not beside each other", "code": "row"}
            seen.add(key)
        if not member.isreg() or member.issparse():
            row |= {"problem": f".{suffix} · is a link, not a file", "code": "outside"}
        elif suffix in row["suffixes"]:
            row |= {"problem": f".{suffix} · is there twice", "code": "row"}
        else:
            row["suffixes"].append(suffix)
            row["offsets"].append(member.offset_data)
            row["sizes"].append(member.size)
    if row is not None:
        yield row


def _key(name: str) -> tuple[str | None, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return None, ""
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The headers in order. Raises DataError with the offset where the shard is torn: tarfile alone would end quietly."""
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # a million headers are not kept
                end = tar.offset  # pyright: ignore[reportAttributeAccessIssue]
                yield member
    except (tarfile.TarError, OSError) as error:
        raise _torn(shard, min(end, shard.stat().st_size), str(error)) from None
    with shard.open("rb") as file:
        file.seek(end)
        if (mark := file.read(_BLOCK)) != bytes(_BLOCK):
            raise _torn(shard, end, "neither a header nor the end mark follows" if mark else "the end mark is missing")


def _torn(shard: Path, offset: int, why: str) -> DataError:
    return DataError(
        f"{shard.name}: offset = {offset} · the shard is torn there, or is no plain tar ({why})",
        next="Copy the shard again, or write it again without compression.",
        code="unreadable",
    )
