"""What a source gives: entries, which are read into records.

An entry is a record that has not been decoded; reading it may fail, with a reason. So a check can look at all of them
and report every problem, and a load can stop at the first bad ones; neither drops a record silently.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from sfumato.data import media
from sfumato.data.settings import MODALITIES, DataSettings
from sfumato.errors import DataError
from sfumato.records import Record

TEXT_COLUMNS = ("text", "caption")
_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLITS = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}

Picture = media.Media | Callable[[], np.ndarray]
"""Where a picture comes from; a function where it is not a file of its own (a drawing, a DICOM object)."""
Sound = media.Media | Callable[[], tuple[np.ndarray, int]]
"""Where a sound comes from; a function, of the samples and their rate, where it is prepared first."""


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
class Columns:
    """How rows are read.

    Attributes:
      unit: the column that names the person; None makes every record its own unit.
      text: the column that holds the text; None takes ``text`` or ``caption``.
      modalities: those that are read; the others are not looked at.
      may_lack: whether a row may have nothing in a column of these.
    """

    unit: str | None = None
    text: str | None = None
    modalities: tuple[str, ...] = MODALITIES
    may_lack: bool = False

    @classmethod
    def of(cls, settings: DataSettings) -> "Columns":
        return cls(
            unit=settings.unit_column,
            text=settings.text_column,
            modalities=settings.modalities or MODALITIES,
            may_lack=settings.may_lack,
        )

    def text_among(self, columns: Iterable[str], where: str) -> str | None:
        """The column of the text; raises DataError where the one that was asked for is not there."""
        if "text" not in self.modalities:
            return None
        there = set(columns)
        if self.text is not None:
            if self.text not in there:
                raise missing_column(self.text, there, where)
            return self.text
        return next((column for column in TEXT_COLUMNS if column in there), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record before it is decoded. ``problem`` is set where the source already knows that it is bad."""

    id: str
    unit: str | None  # None: the source names no units
    text: str | None = None
    image: Picture | None = None
    audio: Sound | None = None
    others: tuple[tuple[str, media.Media], ...] = ()  # further pictures and sounds, which only need to be readable
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: DataError | None = None

    def only(self, modalities: Collection[str] | None) -> "Entry":
        """The same with these modalities alone, so that the others are not decoded; None: with all."""
        gone = [] if modalities is None else [name for name in MODALITIES if name not in modalities]
        given = [name for name in gone if getattr(self, name) is not None]
        return replace(self, **dict.fromkeys(given)) if given else self

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
        if self.text is None and self.image is None and self.audio is None and not self.others:
            raise DataError(
                f"{self.id} · has neither text nor image nor audio", next="Take the record out.", code="empty"
            )
        for kind, further in self.others:
            read = media.read_image if kind == "image" else media.read_audio
            read(further, name=f"{self.id}: {media.shown(further)}")
        image = None if self.image is None else self._picture(self.image)
        audio, rate = (None, None) if self.audio is None else self._sound(self.audio)
        return Record(
            id=self.id,
            unit=self.id if self.unit is None else self.unit,
            text=self.text,
            image=image,
            audio=audio,
            sample_rate=rate,
            metadata=self.metadata,
        )

    def _picture(self, picture: Picture) -> np.ndarray:
        return picture() if callable(picture) else media.read_image(picture, name=self.id)

    def _sound(self, sound: Sound) -> tuple[np.ndarray, int]:
        return sound() if callable(sound) else media.read_audio(sound, name=self.id)


class Entries:
    """What most sources share: iteration reads the entries."""

    name: str
    facts: Mapping[str, tuple[str, ...]] = {}

    def entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def __iter__(self) -> Iterator[Record]:
        for entry in self.entries():
            yield entry.read()


def missing_column(name: str, columns: Any, where: str) -> DataError:
    return DataError(
        f"{where}: column {name} · is missing",
        next=f"There are: {', '.join(sorted(columns)) or 'none'}.",
        code="missing_column",
    )


def kind_of(name: str) -> str | None:
    """image or audio, by the suffix."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in media.IMAGE_SUFFIXES else "audio" if suffix in media.AUDIO_SUFFIXES else None


def unknown_kind(name: str) -> DataError:
    return DataError(
        f"{name} · is neither a picture nor a sound by its suffix",
        next=f"Use one of {' '.join(media.IMAGE_SUFFIXES + media.AUDIO_SUFFIXES)}, or take it out.",
        code="suffix",
    )


def inside(root: Path, value: str, name: str) -> Path:
    """``root``/``value``, which must not leave ``root``: neither by itself nor through a link."""
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts or "\x00" in value:
        raise _outside(f"{name} = {value!r} · must be a path inside the folder")
    path = root / relative
    stay_inside(root, path, name)
    return path


def stay_inside(root: Path, path: Path, name: str) -> None:
    """Raises DataError where ``path`` is, or goes through, a link that leaves ``root``."""
    top, real = os.path.realpath(root), os.path.realpath(path)
    if real != top and not real.startswith(top.rstrip(os.sep) + os.sep):
        raise _outside(f"{name} = {path.name!r} · is a link out of the folder")


def _outside(message: str) -> DataError:
    return DataError(message, next="Copy the file into the folder.", code="outside")


def text_of(value: Any, name: str) -> str:
    if value is None:
        return ""  # reading refuses an empty text
    if not isinstance(value, str):
        raise DataError(f"{name}: text = {str(value)[:60]} · must be a string", next="Correct the record.", code="text")
    return value
