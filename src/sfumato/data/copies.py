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
from sfumato.data.checking import NEAR_BITS, NEAR_CORRELATION, bits_set, content_digest, near_pairs, standardised
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
        mine = looks.copies_of(theirs)
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

    def copies_of(self, others: "_Looks") -> np.ndarray:
        """(N,) bool: True for a record that copies one of ``others``; each is compared for itself, whatever the rest are."""
        found = np.zeros(len(self.keys), dtype=bool)
        buckets: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, key in enumerate(others.keys):
            buckets[key].append(place)
        known: dict[bytes, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for place, key in enumerate(self.keys):
            if key not in buckets:
                continue
            if key not in known:
                known[key] = {kind: others._rows(kind, buckets[key]) for kind in others._kinds(buckets[key][0])}
            alike = np.ones(len(buckets[key]), dtype=bool)
            for kind, (hashes, rows) in known[key].items():
                mine = self._rows(kind, [place])
                alike &= (bits_set(hashes ^ mine[0]) <= NEAR_BITS) & (rows @ mine[1][0] >= NEAR_CORRELATION)
            found[place] = alike.any()
        return found

    def copies(self, *, groups: Sequence[str] | None = None) -> np.ndarray:
        """(N,) bool: True for a record that copies an earlier one, of its group where there are groups."""
        found = np.zeros(len(self.keys), dtype=bool)
        buckets: defaultdict[tuple[bytes, str], list[int]] = defaultdict(list)
        for place, key in enumerate(self.keys):
            buckets[key, "" if groups is None else groups[place]].append(place)
        for places in buckets.values():
            found[self._pairs(places)] = True
        return found

    def _kinds(self, place: int) -> list[str]:
        """What else than the key must be near: pictures and sounds, where the record has them."""
        return [kind for kind, pictures in self.thumbnails.items() if pictures and pictures[place] is not None]

    def _rows(self, kind: str, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (P,), and thumbnails (P, 257) whose inner products are correlations."""
        hashes = np.array([self.hashes[kind][place] for place in places], np.uint64)
        return hashes, standardised([self._thumbnail(kind, place) for place in places])

    def _pairs(self, places: list[int]) -> list[int]:
        """Those of some places with equal keys that copy an earlier one of them."""
        kinds = self._kinds(places[0])
        if not kinds or len(places) < 2:
            return places[1:]
        pairs, _ = near_pairs(
            np.array([self.hashes[kinds[0]][place] for place in places], np.uint64),
            [self._thumbnail(kinds[0], place) for place in places],
        )
        return [
            places[later]
            for later, earlier in pairs
            if all(self._alike(kind, places[later], places[earlier]) for kind in kinds[1:])
        ]

    def _alike(self, kind: str, a: int, b: int) -> bool:
        hashes, rows = self._rows(kind, [a, b])
        return bool(bits_set(hashes[:1] ^ hashes[1:])[0] <= NEAR_BITS and rows[0] @ rows[1] >= NEAR_CORRELATION)

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
