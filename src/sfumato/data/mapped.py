"""Prepared records and encoded tensors on disk, memory-mapped: a million records are read without being loaded.

What is prepared once lies in the cache of the data's account (``places``), for its owner alone, under a name made of the
settings and of the names, sizes and times of the files. What the files or settings made before is not found any more;
what the files made before is removed when they are read again. ``sfumato data clear`` removes it all.

[shell]
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from sfumato.data import media, places
from sfumato.data.settings import DataSettings
from sfumato.errors import OutsideError, UsageError
from sfumato.records import Record, UnitTable

ROWS = 4096  # in a batch on disk, and encoded at once
_VERSION = "1"
_PREPARED = "records.arrow"


class Stored(Sequence[Record]):
    """Records in a file, in order; each is made when it is asked for, and none is kept.

    Args:
      rows: which of the file's records, ascending; None takes all.
      own_units: every record is its own unit.
    """

    def __init__(self, folder: Path, *, rows: np.ndarray | None = None, own_units: bool = False) -> None:
        import pyarrow as pa
        import pyarrow.ipc

        self.folder, self.own_units = folder, own_units
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(folder / _PREPARED)))
            described = json.loads((folder / "described.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise OutsideError(
                f"cache = {folder} · cannot be read ({error})", next="Remove it with `sfumato data clear`."
            ) from None
        self.picture: tuple[int, ...] = tuple(described["picture"])
        self.rows = np.arange(described["records"], dtype=np.int64) if rows is None else rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _stored, (self.folder, self.rows, self.own_units)  # another process maps the same file

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return list(self._records(self.rows[index]))
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return next(self._records(self.rows[index : index + 1 or None]))

    def __iter__(self) -> Iterator[Record]:
        return self._records(self.rows)

    def select(self, which: Sequence[int] | np.ndarray) -> "Stored":
        """Args: which: places in this sequence, ascending."""
        return Stored(self.folder, rows=self.rows[np.asarray(which, np.int64)], own_units=self.own_units)

    def as_own_units(self) -> "Stored":
        return Stored(self.folder, rows=self.rows, own_units=True)

    def described(self, keys: Sequence[str] | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(id, unit, metadata) of each, without its text, picture and sound. Metadata without these keys may be left out."""
        marks = None if keys is None else [json.dumps(key) for key in keys]
        for batch in self._batches(self.rows, ["id", "unit", "metadata"]):
            ids, units, metadata = (column.to_pylist() for column in batch.columns)
            for name, unit, values in zip(ids, ids if self.own_units else units, metadata, strict=True):
                told = marks is None or any(mark in values for mark in marks)
                yield name, unit, json.loads(values) if told else {}

    def units(self) -> list[str]:
        column = "id" if self.own_units else "unit"
        return [unit for batch in self._batches(self.rows, [column]) for unit in batch.column(0).to_pylist()]

    @property
    def key(self) -> str:
        """Names these records: the file, and which of its records."""
        digest = hashlib.sha256(self.folder.name.encode() + (b"own" if self.own_units else b""))
        digest.update(np.ascontiguousarray(self.rows).tobytes())
        return digest.hexdigest()[:24]

    def _batches(self, rows: np.ndarray, names: list[str]) -> Iterator[Any]:
        """The chosen rows of each batch on disk, only these columns."""
        import pyarrow as pa

        number = rows // ROWS
        for part in np.split(rows, np.flatnonzero(np.diff(number)) + 1):
            if not len(part):
                continue
            batch = self._file.get_batch(int(part[0] // ROWS)).select(names)
            first, last = int(part[0] % ROWS), int(part[-1] % ROWS)
            whole = last - first + 1 == len(part)
            yield batch.slice(first, len(part)) if whole else batch.take(pa.array(part % ROWS))

    def _records(self, rows: np.ndarray) -> Iterator[Record]:
        for batch in self._batches(rows, [*_COLUMNS]):
            for row in batch.to_pylist():
                image, audio = row["image"], row["audio"]
                yield Record(
                    id=row["id"],
                    unit=row["id"] if self.own_units else row["unit"],
                    text=row["text"],
                    image=None if image is None else np.frombuffer(bytearray(image), np.uint8).reshape(self.picture),
                    audio=None if audio is None else np.frombuffer(bytearray(audio), np.float32),
                    sample_rate=row["rate"],
                    metadata=json.loads(row["metadata"]),
                )


def _stored(folder: Path, rows: np.ndarray, own_units: bool) -> Stored:
    return Stored(folder, rows=rows, own_units=own_units)


_COLUMNS = ("id", "unit", "text", "image", "audio", "rate", "metadata")


def stored(
    data: DataSettings,
    *,
    name: str,
    purpose: Mapping[str, Any],
    files: Iterable[Path],
    records: Callable[[], Iterator[Record]],
) -> Stored:
    """The prepared records of a source: from the cache, or written there now, in one pass.

    Args:
      name: of the source.
      purpose: everything that ``records`` depends on besides the files.
      files: what is read; their names, sizes and times are looked at.
      records: called if they are not there yet; pictures must have one shape. Errors that it raises leave no cache.
    """
    home = places.cache_of(data)
    of = hashlib.sha256(f"{name} {data.path} {json.dumps(purpose, sort_keys=True, default=str)}".encode()).hexdigest()[
        :16
    ]
    target = home / f"records-{of}-{_state_of(files)}"
    if not (target / "described.json").is_file():
        places.private_folder(home)
        places.sweep(home)
        for old in [*home.glob(f"records-{of}-*"), *home.glob(f"encoded-{of}-*")]:  # of files that have changed
            shutil.rmtree(old, ignore_errors=True)
        with _Building(target) as part:
            _describe(part, _write(part, records()))
    return Stored(target)


def _state_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(_VERSION.encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            digest.update(f"{file} gone\n".encode())
            continue
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _write(part: Path, records: Iterator[Record]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.ipc

    kinds = {"text": pa.large_string(), "image": pa.large_binary(), "audio": pa.large_binary(), "rate": pa.int64()}
    schema = pa.schema({column: kinds.get(column, pa.string()) for column in _COLUMNS})
    count, picture, rows = 0, (), []
    with _own_file(part / _PREPARED) as out, pa.ipc.new_file(out, schema) as writer:
        for record in records:
            if record.image is not None:
                if picture not in ((), record.image.shape):
                    raise UsageError(
                        f"record {record.id}: image.shape = {record.image.shape} · others have {picture}",
                        next="Scale them to one size first.",
                    )
                picture = record.image.shape
            rows.append(
                {
                    "id": record.id,
                    "unit": record.unit,
                    "text": record.text,
                    "image": None if record.image is None else record.image.tobytes(),
                    "audio": None if record.audio is None else np.asarray(record.audio, np.float32).tobytes(),
                    "rate": record.sample_rate,
                    "metadata": json.dumps(record.metadata, ensure_ascii=False, default=str),
                }
            )
            count += 1
            if len(rows) == ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    return {"records": count, "picture": list(picture)}


def encoded(
    records: Stored, encode: Callable[[Sequence[Record]], UnitTable], *, settings: Mapping[str, Any]
) -> UnitTable:
    """What ``encode`` makes of the records, as a table whose tensors are memory-mapped: from the cache, or written now.

    Args:
      encode: a model's; what it makes of a record must not depend on the records beside it.
      settings: everything that ``encode`` depends on.
    """
    words = json.dumps(settings, sort_keys=True, default=str)
    _, of, state = records.folder.name.split("-")
    key = hashlib.sha256(f"{records.key} {words}".encode()).hexdigest()[:16]
    target = records.folder.parent / f"encoded-{of}-{state}-{key}"
    if not (target / "described.json").is_file():
        with _Building(target) as part:
            _describe(part, _encode(part, records, encode))
    return MappedTable(target, records)


class MappedTable(UnitTable):
    """A table over the files of a folder; it is handed to another process by its name."""

    def __init__(self, folder: Path, records: Stored) -> None:
        import torch

        self._made_of = folder, records
        names = json.loads((folder / "described.json").read_text(encoding="utf-8"))

        def mapped(file: str) -> Any:
            # "c": the array is writable, which torch asks for, and what is written stays in this process
            return torch.from_numpy(np.load(folder / file, mmap_mode="c"))

        super().__init__(
            {name: mapped(f"tensor-{i}.npy") for i, name in enumerate(names)},
            records.units(),
            {name: mapped(f"present-{i}.npy") for i, name in enumerate(names)},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTable, self._made_of


def _encode(part: Path, records: Stored, encode: Callable[[Sequence[Record]], UnitTable]) -> list[str]:
    """One .npy file a tensor, and one for where it is present, written batch by batch."""
    rows_of: dict[str, tuple[int, ...]] = {}
    with ExitStack() as files:
        out: dict[str, Any] = {}
        for start in range(0, len(records), ROWS):
            table = encode(records[start : start + ROWS])
            if not out:
                for i, name in enumerate(sorted(table.tensors)):
                    values = table.tensors[name].numpy()
                    rows_of[name] = values.shape[1:]
                    shape = (len(records), *rows_of[name])
                    out[name] = (
                        files.enter_context(_npy(part / f"tensor-{i}.npy", values.dtype, shape)),
                        files.enter_context(_npy(part / f"present-{i}.npy", np.dtype(bool), (len(records),))),
                    )
            for name, (tensor, present) in out.items():
                values = table.tensors[name].numpy()
                if values.shape[1:] != rows_of[name]:
                    raise UsageError(
                        f"{name}: row shape = {values.shape[1:]} · the rows before have {rows_of[name]}",
                        next="Use a codec with one length, or data.store: memory.",
                    )
                tensor.write(values.tobytes())
                present.write(table.present[name].numpy().tobytes())
    return list(rows_of)


def _npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """An open file with the header of such an array; its rows are to be appended."""
    file = _own_file(path)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return file


def remembered(records: Sequence[Record], purpose: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` finds by reading all records, as JSON; of stored records it is found once and kept beside them."""
    if not isinstance(records, Stored):
        return make()
    file = records.folder / f"{purpose}-{records.key}.json"
    if not file.is_file():
        part = file.with_name(f".part-{os.getpid()}-{file.name}")
        try:
            part.unlink(missing_ok=True)
            with _own_file(part) as out:
                out.write(json.dumps(make()).encode())
            part.rename(file)
        except OSError as error:
            raise places.no_room(file, error) from None
    return json.loads(file.read_text(encoding="utf-8"))


def files_of(data: DataSettings, folder: Path | None) -> Iterator[Path]:
    """What a source reads, in order. Args: folder: of a built-in set; None where it is generated.

    A table may name files beside it, so of a single table all pictures and sounds below its folder count too.
    """
    path = folder if data.path is None else Path(data.path)
    if path is None:
        return
    if path.is_file():
        yield path
        if data.source in ("parquet", "messages"):
            suffixes = media.IMAGE_SUFFIXES + media.AUDIO_SUFFIXES
            yield from (file for file in _walk(path.parent) if file.suffix.lower() in suffixes)
        return
    yield from _walk(path)


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != ".sfumato")
        yield from (Path(where, name) for name in sorted(names))


def with_units_of_their_own(records: Sequence[Record]) -> Sequence[Record]:
    if isinstance(records, Stored):
        return records.as_own_units()
    return [record if record.unit == record.id else replace(record, unit=record.id) for record in records]


def select(records: Sequence[Record], which: Sequence[int] | np.ndarray) -> Sequence[Record]:
    """Those at the places ``which``, ascending; the same sequence where that is all of them."""
    if len(which) == len(records):
        return records
    return records.select(which) if isinstance(records, Stored) else [records[i] for i in which]


def described(
    records: Sequence[Record], keys: Sequence[str] | None = None
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(id, unit, metadata) of each; of stored records without reading their pictures, and without metadata that have
    none of the ``keys``."""
    if isinstance(records, Stored):
        yield from records.described(keys)
        return
    for record in records:
        yield record.id, record.unit, record.metadata


class _Building:
    """A folder that appears whole or not at all."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.part = target.parent / f".part-{os.getpid()}-{target.name}"

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        return places.private_folder(self.part)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._move()
            elif isinstance(error, OSError):
                raise places.no_room(self.target, error) from None
        finally:
            shutil.rmtree(self.part, ignore_errors=True)

    def _move(self) -> None:
        try:
            self.part.rename(self.target)
        except OSError as error:
            if not (self.target / "described.json").is_file():  # another process that was first wins
                raise places.no_room(self.target, error) from None


def _describe(part: Path, value: Any) -> None:
    """Written last: a folder that has it is whole."""
    with _own_file(part / "described.json") as file:
        file.write(json.dumps(value).encode())


def _own_file(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
