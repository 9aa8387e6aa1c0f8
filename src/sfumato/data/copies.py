"""Copies among records, exact and near, and which of them are left out of a training.

Of the three rules of ``Deduplicate`` the first two look at one unit at a time, and at public records:

- *within units*: of a unit's records, those that copy an earlier one of the same unit. If the unit is away, nobody
  else's records change.
- *against public*: records that copy a public one. The public records are the same with and without the unit.
- *across units*: one unit's record decides whether another's stays, along chains of near copies as far as they reach.
  One unit less changes an unknown number of others, so this is for trainings that are not private only
  (``prepare.refuse_coupled``).

Public records are never left out because of private ones: what is public would then tell of what is private.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from sfumato.data import media
from sfumato.data.checking import NEAR_BITS, NEAR_CORRELATION, content_digest, near_pairs
from sfumato.data.settings import Deduplicate
from sfumato.records import Record

_WORD = re.compile(r"\w+")


def without(
    private: Sequence[Record], public: Sequence[Record], rule: Deduplicate
) -> tuple[np.ndarray, dict[str, int]]:
    """Places of the private records that stay, ascending; and how many were left out by each rule."""
    looks = _Looks(near=rule.near)
    for record in private:
        looks.add(record)
    count = len(looks.units)
    left_out = np.zeros(count, dtype=bool)
    counts: dict[str, int] = {}
    if rule.against_public:
        theirs = _Looks(near=rule.near)
        for record in public:
            theirs.add(record)
        copies = theirs.then(looks).copies(before=len(theirs.units))
        mine = copies[len(theirs.units) :]
        counts["copies of public records"] = int(mine.sum())
        left_out |= mine
    if rule.within_units:
        mine = looks.copies(groups=looks.units) & ~left_out
        counts["copies within a unit"] = int(mine.sum())
        left_out |= mine
    if rule.across_units:
        mine = looks.copies() & ~left_out
        counts["copies across units"] = int(mine.sum())
        left_out |= mine
    return np.flatnonzero(~left_out), counts


class _Looks:
    """What is remembered of records: 32 bytes each; for near copies also hashes and thumbnails."""

    def __init__(self, *, near: bool) -> None:
        self.near = near
        self.units: list[str] = []
        self.keys: list[bytes] = []  # equal for whatever may be copies of each other
        self.hashes: dict[str, list[int]] = {"image": [], "audio": []}
        self.thumbnails: dict[str, list[np.ndarray | None]] = {"image": [], "audio": []}

    def add(self, record: Record) -> None:
        self.units.append(record.unit)
        if not self.near:
            self.keys.append(content_digest(record))
            return
        # records with different words, or with other modalities, are no copies
        kinds = f"{record.image is not None} {record.audio is not None} {record.text is not None} "
        self.keys.append(hashlib.sha256((kinds + plain_words(record.text or "")).encode()).digest())
        pictures = {"image": record.image, "audio": None if record.audio is None else outline(record.audio)}
        for kind, picture in pictures.items():
            bits, thumbnail = (0, None) if picture is None else media.difference_hash(picture)
            self.hashes[kind].append(bits)
            self.thumbnails[kind].append(thumbnail)

    def then(self, later: "_Looks") -> "_Looks":
        """These, followed by others."""
        both = _Looks(near=self.near)
        both.units, both.keys = self.units + later.units, self.keys + later.keys
        for kind in both.hashes:
            both.hashes[kind] = self.hashes[kind] + later.hashes[kind]
            both.thumbnails[kind] = self.thumbnails[kind] + later.thumbnails[kind]
        return both

    def copies(self, *, groups: Sequence[str] | None = None, before: int | None = None) -> np.ndarray:
        """(N,) bool: True for a record that copies an earlier one: of its group; one of the first ``before``."""
        found = np.zeros(len(self.keys), dtype=bool)
        buckets: defaultdict[tuple[bytes, str], list[int]] = defaultdict(list)
        for place, key in enumerate(self.keys):
            buckets[key, "" if groups is None else groups[place]].append(place)
        for places in buckets.values():
            if len(places) < 2 or (before is not None and places[0] >= before):
                continue
            for later, earlier in self._pairs(places):
                if before is None or earlier < before:
                    found[later] = True
        return found

    def _pairs(self, places: list[int]) -> list[tuple[int, int]]:
        """(later, the earliest that it copies) among places whose keys are equal."""
        kinds = [kind for kind, pictures in self.thumbnails.items() if pictures and pictures[places[0]] is not None]
        if not kinds:
            return [(later, places[0]) for later in places[1:]]
        first, *others = kinds
        pairs, complete = near_pairs(
            np.array([self.hashes[first][place] for place in places], np.uint64),
            [self._thumbnail(first, place) for place in places],
        )
        assert complete or len(pairs)  # a group too large to compare whole is still compared in its smaller parts
        return [
            (places[later], places[earlier])
            for later, earlier in pairs
            if all(self._alike(kind, places[later], places[earlier]) for kind in others)
        ]

    def _alike(self, kind: str, a: int, b: int) -> bool:
        bits = (self.hashes[kind][a] ^ self.hashes[kind][b]).bit_count()
        return bits <= NEAR_BITS and correlation(self._thumbnail(kind, a), self._thumbnail(kind, b)) >= NEAR_CORRELATION

    def _thumbnail(self, kind: str, place: int) -> np.ndarray:
        thumbnail = self.thumbnails[kind][place]
        assert thumbnail is not None  # the key says which modalities there are
        return thumbnail


def plain_words(text: str) -> str:
    """Words without case, punctuation, spacing and compatibility forms."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def outline(samples: np.ndarray) -> np.ndarray:
    """A sound as a small picture, (64, 64, 1) uint8: loudness over time and frequency, in decibels below its loudest.

    So a change of volume leaves it as it is. Args: samples (T,).
    """
    size = 256
    padded = np.pad(np.asarray(samples, np.float32), (0, max(0, 2 * size - len(samples))))
    starts = np.linspace(0, len(padded) - size, 64).astype(int)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    bands = power[:, 1:].reshape(64, 64, 2).sum(2).T  # 128 frequencies as 64
    loud = float(bands.max())
    level = 10 * np.log10(np.maximum(bands / loud, 1e-6)) if loud > 0 else np.full_like(bands, -60.0)
    return ((level + 60) * (255 / 60)).round().astype(np.uint8)[:, :, None]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two thumbnails; two flat ones are alike."""
    x, y = (value.astype(float).ravel() - value.mean() for value in (a, b))
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if min(lengths) < 16.0:
        return 1.0 if max(lengths) < 16.0 else 0.0
    return float(x @ y / (lengths[0] * lengths[1]))
