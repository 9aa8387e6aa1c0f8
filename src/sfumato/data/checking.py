"""``data check``: every problem of a data set, with the record and the next step. It changes and drops nothing."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data import media
from sfumato.data.entries import SPLITS, Entry, Source
from sfumato.data.settings import DataSettings
from sfumato.data.sources import open_source, settings_for
from sfumato.errors import DataError
from sfumato.records import Record

NEAR_BITS = 3  # of 64, that may differ between two difference hashes
NEAR_CORRELATION = 0.99  # of the 16x16 grey thumbnails: survives a change of brightness, scale and compression
HOW_NEAR = (
    f"64-bit difference hashes within {NEAR_BITS} bits, "
    f"and 16x16 grey thumbnails with a correlation of at least {NEAR_CORRELATION}"
)
_MAX_PAIRS = 100_000_000

Problem = dict[str, str]  # record, problem, next, code, level: "error" (load refuses) or "warning"


def check(target: str | Path | DataSettings, *, unit_column: str | None = None) -> dict[str, Any]:
    """Looks at every record. Raises DataError only for a source that cannot be opened at all.

    Returns: name, records, units, modalities {text, image, audio: how many}, problems, errors, warnings, sha256 (of the
    contents in order), near_duplicates (how they are sought, or why not all were; those of one unit are only counted, in
    near_duplicates_within_units).
    """
    settings = target if isinstance(target, DataSettings) else settings_for(target, unit_column=unit_column)
    source = open_source(settings)
    look = _Look()
    for record in readings(source):
        look.add(record)
    problems = look.finish()
    errors = sum(problem["level"] == "error" for problem in problems)
    return {
        "name": source.name,
        "records": look.count,
        "units": len(look.splits_of),
        "modalities": dict(look.modalities),
        "problems": problems,
        "errors": errors,
        "warnings": len(problems) - errors,
        "sha256": look.digest.hexdigest(),
        "near_duplicates": look.near,
        "near_duplicates_within_units": look.near_within,
    }


def readings(
    source: Source, *, units: Set[str] | None = None, modalities: Collection[str] | None = None
) -> Iterator[Record | tuple[Entry, DataError]]:
    """Each record, or the entry that cannot be read and why. Args: only of these units, only with these modalities;
    others are not decoded."""
    entries = getattr(source, "entries", None)
    if entries is None:
        yield from (record for record in source if units is None or record.unit in units)
        return
    for entry in entries():
        if units is not None and unit_of(entry) not in units:
            continue
        try:
            yield entry.only(modalities).read()
        except DataError as error:
            yield entry, error


def unit_of(entry: Entry) -> str:
    return entry.id if entry.unit is None else entry.unit


def first_by_hash(names: Iterable[str], count: int, seed: int) -> list[str]:
    """The ``count`` names with the smallest sha256 of "seed:name"."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count]


def first_units(source: Source, count: int, seed: int) -> Set[str]:
    """The units that a limit of ``count`` takes, by the hash of their name; nothing is decoded for it."""
    entries = getattr(source, "entries", None)
    names = (unit_of(e) for e in entries()) if entries is not None else (record.unit for record in source)
    return set(first_by_hash(names, count, seed))


def problem(record: str, error: DataError, level: str = "error") -> Problem:
    return {
        "record": record,
        "problem": error.message.removeprefix(f"{record}: ").removeprefix(f"{record} · "),
        "next": error.next,
        "code": error.code,
        "level": level,
    }


def split_of(metadata: Any) -> str | None:
    """The split that a record's metadata declare, in one spelling; None when they declare none."""
    given = metadata.get("split")
    return SPLITS.get(given.strip().lower()) if isinstance(given, str) else None


def leaks(splits_of: dict[str, dict[str, str]]) -> Iterator[tuple[str, DataError]]:
    """Units in more than one declared split, each with one of its records. Args: unit -> split -> a record."""
    for unit, splits in splits_of.items():
        if len(splits) > 1:
            *_, record = splits.values()
            yield (
                record,
                DataError(
                    f"{record}: unit = {unit!r} · is in the splits {', '.join(sorted(splits))}, but must be in one",
                    next="Move all records of a unit into one split.",
                    code="leak",
                ),
            )


def content_digest(record: Record) -> bytes:
    """32 bytes that are equal exactly when text, picture and sound are."""
    digest = hashlib.sha256()
    for part in (record.text, record.image, record.audio):
        if part is None:
            digest.update(b"-")
        elif isinstance(part, str):
            digest.update(b"t%d:" % len(part.encode()) + part.encode())
        else:
            digest.update(repr(part.shape).encode())
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()


def record_digest(reading: Record | tuple[Entry, DataError]) -> bytes:
    """What a record adds to the digest of a whole set; that of an unreadable one is a word."""
    return b"unreadable" if isinstance(reading, tuple) else content_digest(reading)


class _Look:
    """What is remembered of the records seen: hashes, not the records."""

    def __init__(self) -> None:
        self.count = 0
        self.modalities: Counter[str] = Counter(text=0, image=0, audio=0)
        self.digest = hashlib.sha256()
        self.problems: list[Problem] = []
        self.splits_of: dict[str, dict[str, str]] = defaultdict(dict)  # unit -> split -> its first record
        self.first_with: dict[bytes, str] = {}
        self.rates: defaultdict[int, list[str]] = defaultdict(list)
        self.depths: defaultdict[int, list[str]] = defaultdict(list)
        self.pictures: list[str] = []
        self.units: list[str] = []
        self.hashes: list[int] = []
        self.thumbnails: list[np.ndarray] = []
        self.near = HOW_NEAR
        self.near_within = 0

    def add(self, reading: Record | tuple[Entry, DataError]) -> None:
        self.count += 1
        if isinstance(reading, tuple):
            self.digest.update(record_digest(reading))
            entry, error = reading
            self.problems.append(problem(entry.id, error))
            if entry.unit:
                self._unit(entry.unit, entry.metadata, entry.id)
            return
        record = reading
        for name in self.modalities:
            self.modalities[name] += getattr(record, name) is not None
        self._unit(record.unit, record.metadata, record.id)
        content = content_digest(record)
        self.digest.update(content)
        first = self.first_with.setdefault(content, record.id)
        if first != record.id:
            error = DataError(
                f"{record.id} · is an exact copy of {first}",
                next="Remove one, unless they are two events; a copy under another unit weakens the guarantee.",
                code="duplicate",
            )
            self.problems.append(problem(record.id, error, "warning"))
        elif record.image is not None:
            bits, thumbnail = media.difference_hash(record.image)
            self.pictures.append(record.id)
            self.units.append(record.unit)
            self.hashes.append(bits)
            self.thumbnails.append(thumbnail)
        if record.image is not None:
            self.depths[record.image.shape[2]].append(record.id)
        if record.sample_rate is not None:
            self.rates[record.sample_rate].append(record.id)

    def _unit(self, unit: str, metadata: Any, record: str) -> None:
        self.splits_of[unit].setdefault(split_of(metadata) or "", record)

    def finish(self) -> list[Problem]:
        """All problems, those of the whole set last."""
        self.problems += [problem(record, error) for record, error in leaks(self.splits_of)]
        self.problems += _odd(self.rates, "sample_rate", "Resample it.", "rate", "error")
        self.problems += _odd(self.depths, "channels", "Convert it, or let data.channels do so.", "channels", "warning")
        if self.modalities["image"] and not self.modalities["text"]:
            error = DataError(
                "all · no record has a caption",
                next="Add a text column, for text-to-image training.",
                code="missing_column",
            )
            self.problems.append(problem("all", error, "warning"))
        if not self.count:
            self.problems.append(
                problem("all", DataError("all · there is no record", next="Check the path.", code="empty"))
            )
        pairs, complete = near_pairs(np.array(self.hashes, np.uint64), self.thumbnails)
        if not complete:
            self.near += "; not all pairs were compared, because too many pictures share an outline"
        for later, earlier in pairs:
            if self.units[later] == self.units[earlier]:
                self.near_within += 1  # one person twice: what the guarantee already treats as one
                continue
            error = DataError(
                f"{self.pictures[later]} · looks like {self.pictures[earlier]}, a picture of another unit",
                next="Look at both; if they are one event, remove one; if one person, give both the same unit.",
                code="near_duplicate",
            )
            self.problems.append(problem(self.pictures[later], error, "warning"))
        return self.problems


def _odd(groups: dict[int, list[str]], name: str, next: str, code: str, level: str) -> Iterable[Problem]:
    """Records whose value differs from the commonest."""
    if len(groups) < 2:
        return
    usual = max(groups, key=lambda value: len(groups[value]))
    for value, records in groups.items():
        for record in records if value != usual else ():
            error = DataError(f"{record}: {name} = {value} · most records have {usual}", next=next, code=code)
            yield problem(record, error, level)


def standardised(thumbnails: list[np.ndarray]) -> np.ndarray:
    """(N, 257) unit rows whose inner products are correlations; flat pictures (the last column) are like each other."""
    rows = np.array(thumbnails, np.float32).reshape(len(thumbnails), 256)
    rows -= rows.mean(1, keepdims=True)
    length = np.linalg.norm(rows, axis=1)
    flat = length < 16.0  # a standard deviation below one grey level
    rows[flat] = 0.0
    rows /= np.where(flat, 1.0, length)[:, None]
    return np.concatenate([rows, flat[:, None].astype(np.float32)], axis=1)


_BITS_OF = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


def bits_set(values: np.ndarray) -> np.ndarray:
    """How many bits of each are set."""
    words = np.ascontiguousarray(values).view(np.uint16).reshape(len(values), 4)
    return _BITS_OF[words].sum(1)


def near_pairs(hashes: np.ndarray, thumbnails: list[np.ndarray]) -> tuple[list[tuple[int, int]], bool]:
    """For every picture like an earlier one, the pair (later, the earliest found); and whether all were compared.

    Two hashes within 3 bits agree on one of their four 16-bit bands, so only pictures that share a band are compared.
    """
    found: dict[int, int] = {}
    rows = standardised(thumbnails)
    left = _MAX_PAIRS
    complete = True
    for band in range(4):
        keys = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):  # ascending: the sort is stable
            if len(group) < 2:
                continue
            left -= len(group) ** 2 // 2
            if left < 0:
                complete = False
                continue
            for position in range(1, len(group)):
                later, before = int(group[position]), group[:position]
                close = before[bits_set(hashes[before] ^ hashes[later]) <= NEAR_BITS]
                close = close[close < found.get(later, later)]
                alike = close[rows[close] @ rows[later] >= NEAR_CORRELATION]
                if len(alike):
                    found[later] = int(alike[0])
    return sorted(found.items()), complete
