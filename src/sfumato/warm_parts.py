"""What a warm start releases of records: sums of their pictures and, where the recipe says so, of their sounds, by one Gaussian.

Claim. Part i gives of every record a vector x_i of length at most C (``latents.release_mean``, ``release_class_sums``); a unit gives
the mean over at most k of its records. Side by side, as (sqrt(w_1) x_1, sqrt(w_2) x_2) with w_1 + w_2 = 1, they have length at most
C: one Gaussian of noise multiplier sigma on their sum is one event. To add noise sigma C to sqrt(w_i) x_i is to add
sigma C / sqrt(w_i) to x_i, which is what each part's own sum gets. The k records of a unit are drawn for each part anew, which
changes no length. Unit, adjacency, population and k are the plan's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.models.settings import ClassMoments, MelSpectrogram, ModelSettings, WarmStart
from sfumato.models.shapes import Shapes
from sfumato.privacy.releases import MeanEmbedding
from sfumato.randomness import Random
from sfumato.records import Record
from sfumato.training.settings import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

PICTURES, SOUNDS = "mean", "sounds"  # names of the parts, in the released file and in a federation's messages

Train = Callable[[Any, Any, TrainingSettings], bool]  # (model, table, settings) -> False where it was interrupted


class Maker(Protocol):
    """Makes one part's sums of records, and of the sums what is nobody's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the released tensor."""
        ...

    @property
    def dimension(self) -> int:
        """How many numbers are noised: of a symmetric matrix, half."""
        ...

    def release(self, records: Sequence[Record], plan: MeanEmbedding, random: Random) -> "Tensor":
        """The noisy sums over ``plan.population``."""
        ...

    def usable(self, prompts: Sequence[str]) -> list[str]:
        """The texts for which it can draw."""
        ...

    def draw(
        self, released: "Tensor", std: float, texts: Sequence[str], prompts: Sequence[str], seed: int, train: Train
    ) -> list[Record] | None:
        """A record for each of ``texts``, which are of ``prompts``; None where it was interrupted."""
        ...

    def in_words(self) -> str: ...


@dataclass(frozen=True)
class Part:
    """Attributes: weight: w_i of the claim above."""

    name: str
    maker: Maker
    weight: float

    def plan(self, of_all: MeanEmbedding) -> MeanEmbedding:
        """With which this part's own sum is noised."""
        return replace(
            of_all,
            dimension=self.maker.dimension,
            noise_multiplier=of_all.noise_multiplier / math.sqrt(self.weight),
        )

    def std(self, of_all: MeanEmbedding) -> float:
        """Of the noise on every number, over the population."""
        return self.plan(of_all).noise_multiplier * of_all.max_norm / of_all.population


def parts_of(asked: WarmStart, model: ModelSettings, shapes: Shapes, seed: int) -> tuple[Part, ...]:
    """The parts of a recipe's warm start; their weights add up to 1."""
    from sfumato.models.class_moments import ClassMomentsMaker

    if isinstance(asked.release, ClassMoments):
        pictures: Maker = _ClassPictures(ClassMomentsMaker(asked.release, shapes.of_picture()))
    else:
        pictures = _MeanPictures(asked, shapes, seed)
    if asked.sounds is None:
        return (Part(PICTURES, pictures, 1.0),)
    sounds = Part(SOUNDS, _Sounds(asked, model, shapes), asked.sound_share)
    return (Part(PICTURES, pictures, 1.0 - asked.sound_share), sounds)


def some_of(parts: Sequence[Part], names: Sequence[str]) -> tuple[Part, ...]:
    """Of one who has no more than these: they have the whole guarantee of the release."""
    own = [part for part in parts if part.name in names]
    total = sum(part.weight for part in own)
    return tuple(replace(part, weight=part.weight / total) for part in own)


def dimension(parts: Sequence[Part]) -> int:
    """How many numbers are released."""
    return sum(part.maker.dimension for part in parts)


def release(
    parts: Sequence[Part], records: Sequence[Record], plan: MeanEmbedding, random: Random
) -> "dict[str, Tensor]":
    """The noisy sums of every part. Charge ``plan.events()`` before."""
    return {part.name: part.maker.release(records, part.plan(plan), random) for part in parts}


def draw(
    parts: Sequence[Part],
    released: "dict[str, Tensor]",
    stds: dict[str, float],
    prompts: Sequence[str],
    count: int,
    seed: int,
    train: Train,
) -> list[Record] | None:
    """``count`` records that are nobody's, with every modality of which there is a part; None where it was interrupted.

    Args: released, stds: by part; one that was not released is not drawn. prompts: public texts, ``usable``.
    """
    texts = [prompts[i % len(prompts)] for i in range(count)]
    drawn = [Record(id=f"warm/{i}", unit=f"warm/{i:09d}", text=text) for i, text in enumerate(texts)]
    for number, part in enumerate(part for part in parts if part.name in released):
        made = part.maker.draw(released[part.name], stds[part.name], texts, prompts, seed + number, train)
        if made is None:
            return None
        drawn = [
            replace(record, image=of.image) if of.image is not None
            else replace(record, audio=of.audio, sample_rate=of.sample_rate)
            for record, of in zip(drawn, made, strict=True)
        ]  # fmt: skip
    return drawn


def usable(parts: Sequence[Part], prompts: Sequence[str]) -> list[str]:
    """The texts for which every part can draw."""
    for part in parts:
        prompts = part.maker.usable(prompts)
    return list(prompts)


@dataclass(frozen=True)
class _ClassPictures:
    of: Any  # ClassMomentsMaker

    @property
    def shape(self) -> tuple[int, ...]:
        entries = self.of.entries
        return (self.of.classes, entries, entries) if self.of.settings.products else (self.of.classes, entries)

    @property
    def dimension(self) -> int:
        return self.of.dimension

    def release(self, records: Sequence[Record], plan: MeanEmbedding, random: Random) -> "Tensor":
        from sfumato.privacy import latents

        return latents.release_class_sums(
            self.of.encode(records), self.of.features, plan, random,
            classes=self.of.classes, products=self.of.settings.products,
        )  # fmt: skip

    def usable(self, prompts: Sequence[str]) -> list[str]:
        return self.of.usable(prompts)

    def draw(
        self, released: "Tensor", std: float, texts: Sequence[str], prompts: Sequence[str], seed: int, train: Train
    ) -> list[Record] | None:
        return self.of.draw(released, std, prompts, len(texts), seed)

    def in_words(self) -> str:
        return self.of.in_words()


class _MeanPictures:
    """One mean of features of pictures and texts together, and a generator fitted to it."""

    def __init__(self, asked: WarmStart, shapes: Shapes, seed: int) -> None:
        from sfumato.models import model as models
        from sfumato.models.from_mean import FromMean

        of: Any = asked.release
        self.settings = of
        settings = ModelSettings(image=of.image, text=of.text, backbone=of.backbone, random_features=of.random_features)
        self.of = models.build_for_release(FromMean.kind, settings, picture_shape=shapes.of_picture(), seed=seed)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dimension,)

    @property
    def dimension(self) -> int:
        return self.of.dimensions["mean"]

    def release(self, records: Sequence[Record], plan: MeanEmbedding, random: Random) -> "Tensor":
        from sfumato.privacy import latents

        return latents.release_mean(self.of.encode(records), self.of.record_features, plan, random)

    def usable(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def draw(
        self, released: "Tensor", std: float, texts: Sequence[str], prompts: Sequence[str], seed: int, train: Train
    ) -> list[Record] | None:
        table, of = self.of.receive(released, prompts), self.settings
        steps = TrainingSettings(
            steps=of.steps, expected_batch_size=of.texts_at_once, learning_rate=of.learning_rate, seed=seed
        )
        if not train(self.of, table, steps):
            return None
        pictures = self.of.generate(texts, seed=seed)
        return [Record(id=str(i), unit=str(i), image=picture) for i, picture in enumerate(pictures)]

    def in_words(self) -> str:
        terms = ", ".join(axis.name for axis in self.settings.text.axes)
        return (
            f"one noisy mean of random features of pictures and of terms of texts together (a public list of "
            f"terms, written without looking at private records: {terms})"
        )


class _Sounds:
    """Sums of sounds by public classes, and sounds of their means."""

    def __init__(self, asked: WarmStart, model: ModelSettings, shapes: Shapes) -> None:
        from sfumato.models import model as models
        from sfumato.models.from_sound_moments import FromSoundMoments

        assert isinstance(model.audio, MelSpectrogram)  # the settings see to it
        frames = replace(model.audio, kept=None, aligned_below=None)
        settings = ModelSettings(image=None, audio=frames, sound_moments=asked.sounds)
        self.of = models.build_for_release(FromSoundMoments.kind, settings, shapes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.maker.classes, self.of.maker.entries

    @property
    def dimension(self) -> int:
        return self.of.maker.dimension

    def release(self, records: Sequence[Record], plan: MeanEmbedding, random: Random) -> "Tensor":
        from sfumato.privacy import latents

        return latents.release_class_sums(
            self.of.encode(records), self.of.features, plan, random, classes=self.of.maker.classes, products=False
        )

    def usable(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def draw(
        self, released: "Tensor", std: float, texts: Sequence[str], prompts: Sequence[str], seed: int, train: Train
    ) -> list[Record] | None:
        self.of.receive(released, std)
        self.of.fit(seed)
        told = [Record(id=str(i), unit=str(i), text=text) for i, text in enumerate(texts)]
        return self.of.sample(told, ("audio",), seed=seed)

    def in_words(self) -> str:
        return self.of.maker.in_words()
