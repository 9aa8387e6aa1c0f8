"""From a source to records that can be trained on: read, checked, resized, split by unit, with a data card."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sfumato.data import card as cards
from sfumato.data import examples, media
from sfumato.data.card import public_card, stats
from sfumato.data.checking import check, leaks, readings, split_of
from sfumato.data.settings import DataSettings
from sfumato.data.sources import Source, missing_column, open_source
from sfumato.errors import DataError, UsageError
from sfumato.records import Record

__all__ = ["Prepared", "card", "check", "load", "public_card", "stats"]

_NAMED = 5  # bad records that an error names


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Attributes:
    private: what may be trained on; the guarantee protects its units.
    public: units set aside and declared public; never trained on.
    facts: closed label sets of ``record.metadata["facts"]``; {} where none are known.
    card: the data card (``public_card`` leaves out what was counted among private records).
    account_home: the folder where ``.sfumato/account.db`` of these data lives.
    """

    private: list[Record]
    public: list[Record]
    facts: dict[str, tuple[str, ...]]
    card: dict[str, Any]
    account_home: Path


def load(
    data: DataSettings, *, unit: Literal["record", "person"], need: tuple[str, ...] = ("text", "image")
) -> Prepared:
    """The records of ``data``, ready for a codec: square pictures of ``image_size``, views into one array.

    Public units are those with the smallest hash of (seed, name): taking a private unit away moves nobody else.
    Where the records declare splits, only ``train`` is trained on, and public units come from the others.

    Args:
      unit: what becomes ``record.unit``: the record itself, or the person that the unit column names.
      need: modalities that every record must have.

    Raises DataError naming the first bad records, if there is any: none is skipped.
    """
    _refuse_settings(data, unit)
    source = open_source(data)
    records = _read(source, data, need)
    official = examples.open_public(data)
    if official is None:
        private, public, unused = _split(records, data)
    else:
        private, unused = records, 0
        public = _read(official, data, need)
        if data.source != "clinic":
            chosen = set(_first_by_hash([record.unit for record in public], data.public_units, data.seed))
            public = [record for record in public if record.unit in chosen]
    if data.limit_units is not None:
        kept = set(_first_by_hash([record.unit for record in private], data.limit_units, data.seed))
        private = [record for record in private if record.unit in kept]
    if unit == "record":
        private, public = _own_units(private), _own_units(public)
    published = source.is_the_published_one if isinstance(source, examples.Labelled) else None
    return Prepared(
        private=private,
        public=public,
        facts=dict(source.facts),
        card=cards.card(
            data, name=source.name, private=private, public=public, unused=unused, unit=unit, published=published
        ),
        account_home=account_home(data),
    )


def card(prepared: Prepared) -> dict[str, Any]:
    """The data card that was made when the records were loaded."""
    return prepared.card


def account_home(data: DataSettings) -> Path:
    """Beside the user's data; the user's data folder for built-in sets and where the data cannot be written to."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sfumato"
    if data.path is None:
        return home / (f"clinic-{data.seed}" if data.source == "clinic" else data.source)
    path = Path(data.path).resolve()
    folder = path if path.is_dir() else path.parent
    if os.access(folder, os.W_OK):
        return folder
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:12]  # of the place, not of the data
    return home / f"{folder.name}-{place}"


def _refuse_settings(data: DataSettings, unit: str) -> None:
    """Settings that this source cannot honour."""
    own = data.source in ("folder", "parquet")
    if not own and data.unit_column is not None:
        raise UsageError(
            f"data.unit_column = {data.unit_column} · {data.source} has no columns",
            next="Leave it out; clinic has its patients.",
        )
    if own and data.languages != ("en",):
        raise UsageError(
            f"data.languages = {', '.join(data.languages)} · only built-in sets are told in chosen languages",
            next="Leave it out.",
        )
    if unit == "person" and own and data.unit_column is None:
        raise UsageError("privacy.unit = person · needs the column that names the person", next="Set data.unit_column.")
    if unit == "person" and data.source in ("emoji", "mnist", "fashion-mnist"):
        raise UsageError(f"privacy.unit = person · {data.source} names no persons", next="Set privacy.unit: record.")
    if data.source == "clinic" and data.image_size > 128:
        raise UsageError(f"data.image_size = {data.image_size} · clinic draws up to 128", next="Choose 32 to 128.")


def _read(source: Source, data: DataSettings, need: tuple[str, ...]) -> list[Record]:
    """All records, their pictures resized and views into one array. Raises DataError at bad ones."""
    size, channels = data.image_size, data.channels
    records: list[Record] = []
    pictures: list[np.ndarray] = []
    bad: list[DataError] = []
    for reading in readings(source):
        try:
            record = _complete(reading, need)
        except DataError as error:
            bad.append(error)
            if len(bad) == _NAMED:
                break
            continue
        if record.image is not None:
            pictures.append(media.fit(record.image, size=size, channels=channels))
            record = replace(record, image=pictures[-1])  # lets go of the large one
        records.append(record)
    rates = {record.sample_rate for record in records if record.sample_rate is not None}
    if len(rates) > 1:
        shown = ", ".join(str(rate) for rate in sorted(rates))
        bad.append(DataError(f"sample_rate = {shown} · must be one rate", next="Resample the sounds.", code="rate"))
    if bad:
        raise _refusal(bad, source)
    if not records:
        raise DataError(f"{source.name}: records = 0 · must have some", next="Check data.path.", code="empty")
    if not pictures:
        return records
    stacked = iter(np.stack(pictures))
    return [record if record.image is None else replace(record, image=next(stacked)) for record in records]


def _complete(reading: Any, need: Iterable[str]) -> Record:
    if isinstance(reading, tuple):
        raise reading[1]
    for name in need:
        if getattr(reading, name) is None:
            raise missing_column(
                name, [n for n in ("text", "image", "audio") if getattr(reading, n) is not None], reading.id
            )
    return reading


def _refusal(bad: list[DataError], source: Source) -> DataError:
    if len(bad) == 1:
        return bad[0]
    many = f"{'at least ' if len(bad) >= _NAMED else ''}{len(bad)} bad records"
    where = getattr(source, "path", source.name)
    return DataError(
        f"{many}: {'; '.join(error.message for error in bad)}",
        next=f"See them all with `sfumato data check {where}`. {bad[0].next}",
        code=bad[0].code,
    )


def _split(records: list[Record], data: DataSettings) -> tuple[list[Record], list[Record], int]:
    """Private records, public ones, and how many belong to a held-out split but are not needed."""
    emoji = data.source == "emoji"
    group = [str(record.metadata["concept"]) if emoji else record.unit for record in records]
    declared = [split_of(record.metadata) for record in records]
    splits_of: dict[str, dict[str, str]] = {}
    for record, name, split in zip(records, group, declared, strict=True):
        splits_of.setdefault(name, {}).setdefault(split or "train", record.id)
    for _, error in leaks(splits_of):
        raise error
    held_out = {name for name, splits in splits_of.items() if "train" not in splits}
    candidates = held_out or set(group)
    trainable = len(splits_of) - (len(held_out) if held_out else data.public_units)
    if data.public_units > len(candidates) or trainable < 1:
        what = "concepts" if emoji else "held-out units" if held_out else "units"
        raise UsageError(
            f"data.public_units = {data.public_units} · there are {len(candidates)} {what}; some must be left to train",
            next=f"Set data.public_units, for example to {max(1, len(candidates) // 10)}.",
        )
    chosen = set(_first_by_hash(candidates, data.public_units, data.seed))
    private = [r for r, name in zip(records, group, strict=True) if name not in held_out and name not in chosen]
    public = [r for r, name in zip(records, group, strict=True) if name in chosen]
    return private, public, len(records) - len(private) - len(public)


def _first_by_hash(names: Iterable[str], count: int, seed: int) -> list[str]:
    """The ``count`` names with the smallest sha256 of "seed:name"."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count]


def _own_units(records: list[Record]) -> list[Record]:
    return [record if record.unit == record.id else replace(record, unit=record.id) for record in records]
