"""Sounds of every public class, drawn from the mean that one noisy sum over the class tells.

A heart may beat at any moment of a recording, and the mean over recordings that begin anywhere is a hum. So each sound is first
moved to where it is loudest, by itself: z, its bands' lowest cosine frequencies frame by frame, counted from a public level, is
laid upon a canvas of 2N - 1 frames whose middle is that frame. A record's feature is x = (a m, b z), where m says where on the
canvas it lies and z is shortened to a public length, each of length at most 1, and a^2 + b^2 = 1. The sum over a class of x tells how
many records cover each frame (noisily), and so the mean of those that do; how many cover each frame tells where sounds begin, too.
A sound is of one class of each of G aspects: its x, over sqrt(G), is in the sum over each of them, and what they tell is added. What is
made of the sums is post-processing: the noise is taken out of the matrix of all classes, which is of low rank but for it; where few
records are, the mean is that of all classes; a sound is the window of a canvas at a drawn beginning.

Moving a sound by what is heard in it is a function of that record alone: what a unit can move the sum by stays the same. Sounds of the
same classes differ by where they begin, and by no more: their loudness and their hiss are the mean's.

Sources: noisy sums per class as a start: DP-FETA, arXiv:2504.01395; singular values under Gaussian noise: Gavish & Donoho 2017, eq. 7,
arXiv:1405.7511. Differs: aligned by a public rule; where a record lies is summed too; over public constants.

Shapes: R records, G aspects, K classes of all of them together, B bands, L outline entries of a frame, N frames of a sound,
M = 2N - 1 frames of a canvas (N unless sounds are aligned), E = M (1 + L) entries of a feature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.models.class_moments import NOTHING, classes_of
from sfumato.models.codecs.audio import SoundCodec
from sfumato.models.codecs.image import cosine_matrix
from sfumato.models.settings import Aspect, MelSpectrogram, SoundMoments
from sfumato.records import Batch, Record, UnitTable

_WHERE = 0.5  # a: of a feature of length 1, what tells where a sound lies
_WHAT = math.sqrt(1 - _WHERE**2)  # b
_PRIOR = 0.25  # noise's standard deviations: as many records' worth of the mean of all classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What is drawn from. Attributes:
    shares: (K,) of all units that are records of a class, noisy, not below 0.
    middle: (L, M), the mean of all sounds, counted from the public level; effects: (K, L, M), by which a class's mean differs.
    begins: (N,) how probable it is that the n-th frame of a sound is its loudest; (1,) where sounds are not aligned.
    """

    shares: Tensor
    middle: Tensor
    effects: Tensor
    begins: Tensor


class SoundMomentsMaker:
    """Features of private sounds; and, of their noisy sums, sounds that are nobody's."""

    def __init__(self, settings: SoundMoments, audio: MelSpectrogram, samples: int, sample_rate: int) -> None:
        self.settings = settings
        self.codec = SoundCodec(audio, samples, sample_rate)
        self.bands, self.frames = self.codec.shape
        self.canvas = self.frames if settings.aligned_below is None else 2 * self.frames - 1
        self.longest = settings.longest * math.sqrt(self.bands * self.frames)  # of z
        if settings.aligned_below is not None and not len(self._low):
            raise UsageError(
                f"sound_moments.aligned_below = {settings.aligned_below} · is below every band: the first is loudest at "
                f"{float(self.codec.peaks[0]):.0f} hertz",
                next="Raise it, or leave it out.",
            )

    @property
    def classes(self) -> int:
        """Of all aspects together."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> list[int]:
        """How many classes each aspect has: combinations of answers, each divided by the band of a sound's loudest tone."""
        return [
            math.prod(len(question.answers) for question in aspect.questions) * max(1, len(tones))
            for aspect, tones in zip(self.settings.aspects, self._tones, strict=True)
        ]

    @cached_property
    def firsts(self) -> list[int]:
        """The number of each aspect's first class."""
        return [sum(self.sizes[:number]) for number in range(len(self.sizes))]

    @property
    def entries(self) -> int:
        return self.canvas * (1 + self.settings.outline)

    @property
    def dimension(self) -> int:
        """How many numbers are released."""
        return self.classes * self.entries

    # -- what is summed --

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """z (R, L N), the loudest frame, and the class that each text says: private, as the records are."""
        bands, has_sound = self.codec.encode(records)
        pictures = bands.unflatten(1, (self.bands, self.frames))
        z = (self._cosines @ (pictures - self.settings.level)).flatten(1)
        classes = self._classes_of([record.text for record in records], pictures)
        return UnitTable(
            {"audio": z, "loudest": self._loudest(pictures), "class": classes},
            [record.unit for record in records],
            {"audio": has_sound, "loudest": has_sound, "class": (classes != NOTHING).any(dim=1)},
        )

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x (R, E), of length at most 1, and its class of every aspect, (R, G), -1 for none; zero for a record without a sound."""
        z = batch.tensors["audio"].double()
        z = z * (1 / z.norm(dim=1, keepdim=True).clamp(min=self.longest))
        where = z.new_full((len(z), 1, self.frames), 1 / math.sqrt(self.frames))
        parts = torch.cat([_WHERE * where, _WHAT * z.unflatten(1, (-1, self.frames))], dim=1)
        rows = self._laid(parts, batch.tensors["loudest"]).flatten(1)
        there = batch.present["audio"][:, None]
        return torch.where(there, rows, 0.0), torch.where(there, batch.tensors["class"], NOTHING)

    def fitting(self, texts: Sequence[str | None]) -> list[Tensor]:
        """Of each aspect, (R, classes) bool: those that contradict no answer of a text. A text without answers fits all."""
        found = []
        for aspect, tones in zip(self.settings.aspects, self._tones, strict=True):
            grids = torch.meshgrid(*(torch.arange(len(q.answers)) for q in aspect.questions), indexing="ij")
            answers = _answers(texts, aspect)
            fits = torch.ones(len(answers), grids[0].numel(), dtype=torch.bool)
            for grid, given in zip(grids, answers.T, strict=True):
                fits &= (given[:, None] == NOTHING) | (given[:, None] == grid.flatten()[None])
            found.append(fits.repeat_interleave(max(1, len(tones)), dim=1))
        return found

    def _classes_of(self, texts: Sequence[str | None], pictures: Tensor) -> Tensor:
        """(R, G) int64: the answers to all questions of an aspect, then the loudest tone, in mixed radix; -1 where one is missing."""
        columns = []
        for aspect, tones, first in zip(self.settings.aspects, self._tones, self.firsts, strict=True):
            answers = _answers(texts, aspect)
            number = torch.zeros(len(answers), dtype=torch.int64)
            for question, given in zip(aspect.questions, answers.T, strict=True):
                number = number * len(question.answers) + given
            if len(tones):
                number = number * len(tones) + pictures[:, tones].mean(dim=2).argmax(dim=1)
            columns.append(torch.where((answers == NOTHING).any(dim=1), NOTHING, first + number))
        return torch.stack(columns, dim=1)

    # -- what is made of the sums --

    def fit(self, released: Tensor, std: float) -> Heard:
        """Post-processing. Args: released: (K, E), each aspect's sums, over N; std: of the noise on every entry, over N too."""
        aspects = len(self.sizes)
        clean = low_rank(released, std).unflatten(1, (-1, self.canvas)) * math.sqrt(aspects)
        std = std * math.sqrt(aspects)
        covered = (clean[:, 0] * (math.sqrt(self.frames) / _WHERE)).clamp(min=0)  # (K, M), shares of N
        sums = clean[:, 1:] * (self.longest / _WHAT)
        prior = max(_PRIOR * std * math.sqrt(self.frames) / _WHERE, 1e-9)
        together = covered.sum(0).clamp(min=prior)
        middle = sums.sum(0) / together  # (L, M)
        means = (torch.where(covered[:, None] > 0, sums, 0.0) + prior * middle) / (covered[:, None] + prior)
        effects = means - middle
        shares = covered[:, self.canvas // 2]  # every record covers the middle
        begins = self._begins(covered.sum(0))
        return Heard(shares=shares, middle=middle, effects=effects, begins=begins)

    def draw(self, found: Heard, numbers: Tensor, generator: torch.Generator) -> Sequence[np.ndarray]:
        """A sound of each row of classes. Args: numbers (R, G), one of every aspect. Returns: (T,) float32 each."""
        if not len(numbers):
            return []
        begins = torch.multinomial(found.begins, len(numbers), replacement=True, generator=generator)
        start = self.canvas // 2 - begins if self.settings.aligned_below is not None else torch.zeros_like(begins)
        frames = (start[:, None] + torch.arange(self.frames))[:, None].expand(-1, self.settings.outline, -1)
        of_class = (found.middle + found.effects[numbers].sum(1)).gather(2, frames)
        pictures = self._cosines.T @ of_class.float() + self.settings.level
        return self.codec.decode(pictures.clamp(-1, 1).flatten(1))

    def in_words(self) -> str:
        """What is released, for the claim's boundary."""
        asked = "; ".join(
            f"{aspect.name}: {size} classes by {', '.join(question.name for question in aspect.questions)}"
            + (
                ""
                if aspect.tones is None
                else f" and the loudest tone of {aspect.tones[0]:g} to {aspect.tones[1]:g} hertz"
            )
            for aspect, size in zip(self.settings.aspects, self.sizes, strict=True)
        )
        moved = (
            ""
            if self.settings.aligned_below is None
            else f", each moved to its own loudest frame below {self.settings.aligned_below:g} hertz, with where it then lies"
        )
        return (
            f"one noisy sum over all units: for each of {self.classes} public classes (what a text answers to a public list of "
            f"questions, written without looking at private records; {asked}) how many its records are, and the sum of their "
            f"sounds, frame by frame{moved}, all over public constants"
        )

    # -- the parts --

    @cached_property
    def _cosines(self) -> Tensor:
        """(L, B), orthonormal rows."""
        return cosine_matrix(self.bands, self.settings.outline).float()

    @cached_property
    def _tones(self) -> list[Tensor]:
        """Of each aspect the bands whose middle is in ``tones``; none where classes are not divided."""
        found = []
        for aspect in self.settings.aspects:
            low, high = aspect.tones or (math.inf, math.inf)
            found.append(torch.nonzero((self.codec.peaks >= low) & (self.codec.peaks <= high))[:, 0])
            if aspect.tones is not None and len(found[-1]) < 2:
                raise UsageError(
                    f"aspect {aspect.name!r}: tones = {aspect.tones} · holds {len(found[-1])} of {self.bands} bands",
                    next="Widen it, or set model.audio.bands higher.",
                )
        return found

    @cached_property
    def _low(self) -> Tensor:
        """Bands whose middle is not above ``aligned_below``."""
        below = math.inf if self.settings.aligned_below is None else self.settings.aligned_below
        return torch.nonzero(self.codec.peaks <= below)[:, 0]

    def _loudest(self, pictures: Tensor) -> Tensor:
        """(R,) int64: the frame that lies in the middle of the canvas. Args: pictures (R, B, N), decibels mapped to [-1, 1]."""
        if self.settings.aligned_below is None:
            return torch.zeros(len(pictures), dtype=torch.int64)
        return self.codec.loudest(pictures, self._low)

    def _laid(self, parts: Tensor, loudest: Tensor) -> Tensor:
        """(R, P, N) -> (R, P, M): the loudest frame in the middle of the canvas, zero where there is no sound."""
        if self.settings.aligned_below is None:
            return parts
        laid = parts.new_zeros(*parts.shape[:2], self.canvas)
        frames = self.frames - 1 - loudest[:, None] + torch.arange(self.frames)
        return laid.scatter_(2, frames[:, None].expand(-1, parts.shape[1], -1), parts)

    def _begins(self, covered: Tensor) -> Tensor:
        """How probable each frame is to be the loudest: one after which the canvas is covered by fewer records ended there.

        Args: covered (M,), of all classes. Frame 2N - 2 - n is covered by sounds whose loudest frame is at most n; frame N - 1 - n
        by those whose it is at least n.
        """
        if self.settings.aligned_below is None:
            return torch.ones(1, dtype=torch.float64)
        zero = covered.new_zeros(1)
        at_most = covered[self.frames - 1 :].flip(0)
        at_least = covered[: self.frames].flip(0)
        both = at_most - torch.cat([zero, at_most[:-1]]) + at_least - torch.cat([at_least[1:], zero])
        return both.clamp(min=0) + 1e-9


def _answers(texts: Sequence[str | None], aspect: Aspect) -> Tensor:
    """(R, questions) int64, -1 for none."""
    return torch.stack([classes_of(texts, question.answers) for question in aspect.questions], dim=1)


def low_rank(matrix: Tensor, std: float) -> Tensor:
    """A matrix whose entries bear noise of ``std``, with its singular values shrunk, and those of the noise set to 0: the best for
    squared error as both sides grow (Gavish & Donoho 2017, eq. 7). Args: matrix (K, E), K <= E or not."""
    if not std:
        return matrix
    rows, columns = sorted(matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    beta, y = rows / columns, values / (std * math.sqrt(columns))
    inside = ((y.square() - beta - 1).square() - 4 * beta).clamp(min=0).sqrt() / y.clamp(min=1e-300)
    kept = torch.where(y > 1 + math.sqrt(beta), inside, 0.0) * std * math.sqrt(columns)
    return (left * kept) @ right
