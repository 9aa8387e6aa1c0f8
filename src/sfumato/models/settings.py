"""A model as values: codecs + backbone + objective. ``model.build`` turns them into modules."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.models.codec_settings import AudioCodec as AudioCodec
from sfumato.models.codec_settings import Bytes as Bytes
from sfumato.models.codec_settings import Cosine as Cosine
from sfumato.models.codec_settings import FrozenSentence as FrozenSentence
from sfumato.models.codec_settings import HashedWords as HashedWords
from sfumato.models.codec_settings import ImageCodec as ImageCodec
from sfumato.models.codec_settings import MelSpectrogram as MelSpectrogram
from sfumato.models.codec_settings import MelTokens as MelTokens
from sfumato.models.codec_settings import MuLaw as MuLaw
from sfumato.models.codec_settings import PatchTokens as PatchTokens
from sfumato.models.codec_settings import PictureNumbers as PictureNumbers
from sfumato.models.codec_settings import Pixels as Pixels
from sfumato.models.codec_settings import Question as Question
from sfumato.models.codec_settings import SoundNumbers as SoundNumbers
from sfumato.models.codec_settings import SoundTokens as SoundTokens
from sfumato.models.codec_settings import TermAxis as TermAxis
from sfumato.models.codec_settings import Terms as Terms
from sfumato.models.codec_settings import TextCondition as TextCondition
from sfumato.models.codec_settings import TextEncoder as TextEncoder
from sfumato.models.codec_settings import TextTokens as TextTokens
from sfumato.models.codec_settings import Tokenizer as Tokenizer
from sfumato.models.codec_settings import VaeLatents as VaeLatents
from sfumato.models.codec_settings import Waveform as Waveform
from sfumato.models.codec_settings import Words as Words
from sfumato.models.prompt_settings import Prompts as Prompts
from sfumato.models.release_settings import MOST_DIRECTIONS as MOST_DIRECTIONS
from sfumato.models.release_settings import Aspect as Aspect
from sfumato.models.release_settings import Changes as Changes
from sfumato.models.release_settings import ClassMoments as ClassMoments
from sfumato.models.release_settings import RandomFeatures as RandomFeatures
from sfumato.models.release_settings import SoundMoments as SoundMoments


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


Target = Literal["image", "audio"]
PictureKind = Literal["flip", "shift", "crop", "rotate", "brightness"]  # ``augmentation``


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
class Diffusion:
    """Diffusion with EDM preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1).

    Attributes:
      target: what is drawn; the other modalities of the model are conditions.
      noise_multiplicity: K draws of noise level and noise inside one example's loss (DPDM, eq. 6).
      augmentations: what is done to a picture that is the target, anew in every loss (``augmentation``); public, and only what leaves
        true what the conditions say of it.
      augmentation_multiplicity: M copies of a record's own picture inside its loss, the first of them unchanged where M > 1, each
        with K draws (De et al. 2022).
      sigma_data: of a pixel; the other codecs bring their own scale.
      prediction: what the network is asked for. v: EDM's own, the velocity of Salimans & Ho 2022 up to its sign; x0: the clean
        latent; eps: the noise. The loss weighs each so that the network's error counts alike at every level.
      condition_dropout: chance, of each condition by itself, that a row's is dropped: for guidance, and for prompts without it.
      condition_width: of what is made of a condition that is a picture or a sound; a text's width is its encoder's.
    """

    kind: Literal["diffusion"] = "diffusion"
    target: Target = "image"
    noise_multiplicity: int = 2
    augmentations: tuple[PictureKind, ...] = ()
    augmentation_multiplicity: int = 1
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.2
    sigma_data: float = 0.5
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    prediction: Literal["v", "x0", "eps"] = "v"
    condition_dropout: float = 0.1
    condition_width: int = 64

    def __post_init__(self) -> None:
        checks.positive(
            noise_multiplicity=self.noise_multiplicity, log_sigma_std=self.log_sigma_std, sigma_data=self.sigma_data,
            sigma_min=self.sigma_min, condition_width=self.condition_width,
        )  # fmt: skip
        checks.probability(condition_dropout=self.condition_dropout)
        _check_copies(self.target, self.augmentations, self.augmentation_multiplicity)
        if self.sigma_max <= self.sigma_min:
            raise UsageError(
                f"sigma_max = {self.sigma_max} · must be above sigma_min = {self.sigma_min}",
                next="Raise model.objective.sigma_max.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """Flow matching on straight paths (rectified flow: Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747).

    Attributes: target, noise_multiplicity, augmentations, augmentation_multiplicity, condition_dropout, condition_width: as
        ``Diffusion`` has them.
      logit_time_mean, logit_time_std: of the time of a draw, logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19); 0 is
        data, 1 is noise.
    """

    kind: Literal["flow"] = "flow"
    target: Target = "image"
    noise_multiplicity: int = 2
    augmentations: tuple[PictureKind, ...] = ()
    augmentation_multiplicity: int = 1
    logit_time_mean: float = 0.0
    logit_time_std: float = 1.0
    condition_dropout: float = 0.1
    condition_width: int = 64

    def __post_init__(self) -> None:
        checks.positive(
            noise_multiplicity=self.noise_multiplicity, logit_time_std=self.logit_time_std,
            condition_width=self.condition_width,
        )  # fmt: skip
        checks.probability(condition_dropout=self.condition_dropout)
        _check_copies(self.target, self.augmentations, self.augmentation_multiplicity)


def _check_copies(target: Target, kinds: tuple[PictureKind, ...], copies: int) -> None:
    checks.positive(augmentation_multiplicity=copies)
    if (copies > 1 and not kinds) or len(set(kinds)) < len(kinds) or (kinds and target != "image"):
        raise UsageError(
            f"augmentations = {list(kinds)}, augmentation_multiplicity = {copies}, target = {target} · copies of a picture that "
            "differ by what is named, each kind once",
            next="Name kinds, such as [shift, rotate], where pictures are drawn; or draw more noise with noise_multiplicity.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Variational:
    """A multimodal variational autoencoder: any subset of the modalities conditions any other. All of it public constants.

    Attributes:
      experts: how the modalities' posteriors become one: their "product" (Wu & Goodman 2018, arXiv:1802.05335), their
        "mixture" (Shi et al. 2019, arXiv:1911.03393), or the "mixture_of_products" of all subsets (Sutter et al. 2021,
        arXiv:2105.02470).
      latent: entries of the shared latent.
      beta: weight of the divergence from the prior.
      text_weight, image_weight, audio_weight: of each modality's log-likelihood; 4 makes the assumed standard deviation of
        a continuous entry half its codec's scale. 0: it is a condition, never reconstructed.
      draws: of the latent, averaged inside one record's loss.
    """

    kind: Literal["variational"] = "variational"
    experts: Literal["product", "mixture", "mixture_of_products"] = "product"
    latent: int = 32
    beta: float = 1.0
    text_weight: float = 1.0
    image_weight: float = 1.0
    audio_weight: float = 1.0
    draws: int = 1

    def __post_init__(self) -> None:
        checks.positive(latent=self.latent, draws=self.draws)
        checks.non_negative(
            beta=self.beta, text_weight=self.text_weight, image_weight=self.image_weight, audio_weight=self.audio_weight
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Adversarial:
    """A generator against a discriminator, whose size is the backbone's. The discriminator is trained on the records, as
    ``training`` says; the generator after it, on public texts, at no cost of privacy.

    Attributes:
      loss: of both: "logistic", not saturating for the generator (Goodfellow et al. 2014), "hinge" (Lim & Ye 2017,
        arXiv:1705.02894), or "wasserstein", which needs ``weight_bound``.
      noise: entries of the generator's noise.
      fakes: made for each record, averaged inside its loss.
      discriminator_steps: for each time that the generator is updated (Bie et al. 2023, arXiv:2302.02936: many).
      generator_updates: each time.
      weight_bound: largest absolute weight of a Wasserstein discriminator.
    """

    kind: Literal["adversarial"] = "adversarial"
    loss: Literal["logistic", "hinge", "wasserstein"] = "logistic"
    noise: int = 16
    fakes: int = 1
    discriminator_steps: int = 5
    generator: Mlp = field(default_factory=lambda: Mlp(width=256, depth=2))
    generator_updates: int = 1
    generator_batch_size: int = 512
    generator_learning_rate: float = 1e-3
    weight_bound: float | None = None

    def __post_init__(self) -> None:
        checks.positive(
            noise=self.noise,
            fakes=self.fakes,
            discriminator_steps=self.discriminator_steps,
            generator_updates=self.generator_updates,
            generator_batch_size=self.generator_batch_size,
            generator_learning_rate=self.generator_learning_rate,
        )
        if (self.loss == "wasserstein") != (self.weight_bound is not None):
            raise UsageError(
                f"loss = {self.loss}, weight_bound = {self.weight_bound} · a Wasserstein discriminator has one, and only it",
                next="Give wasserstein a weight_bound such as 0.1, and the others null.",
            )
        if self.weight_bound is not None:
            checks.positive(weight_bound=self.weight_bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """A shared latent by contrast with public records; answers are records of that public bank.

    Attributes:
      width: entries of the latent, which is on the unit sphere.
      temperature: of the softmax over the record's own partner and the bank.
      bank: at most so many public records.
    """

    kind: Literal["alignment"] = "alignment"
    width: int = 64
    temperature: float = 0.1
    bank: int = 512

    def __post_init__(self) -> None:
        checks.positive(width=self.width, temperature=self.temperature, bank=self.bank)


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
class Adapter:
    """A language model of ``transformers`` that exists already, public and frozen, and a low-rank adapter beside it, which is trained.

    Texts are read by the model's own tokenizer, so ``model.text`` and the other modalities are null. A record that is a conversation
    (data.source: messages) teaches what the assistant says in it; any other teaches its text.

    Attributes:
      path: a folder that ``save_pretrained`` has written, with its tokenizer. Declared public.
      sha256: of its files (``families.adapter.fingerprint``), so that all sites stand on the same model; none: not looked at.
      rank, alpha, targets: of W + (alpha / rank) B A, and which layers; none: all linear layers but the head.
      trained: a_and_b; or b alone, A being what ``training.seed`` makes of it, the same at every site and public.
      longest: tokens of a record; what is longer is cut.
      prompt: what the user says where the model is asked for a text; none: it begins a text of its own.
    """

    path: str
    sha256: str | None = None
    kind: Literal["adapter"] = "adapter"
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()
    trained: Literal["a_and_b", "b"] = "a_and_b"
    longest: int = 256
    prompt: str = ""

    def __post_init__(self) -> None:
        checks.positive(rank=self.rank, alpha=self.alpha, longest=self.longest)
        checks.one_of(("a_and_b", "b"), trained=self.trained)


Solver = Literal["heun", "euler", "midpoint", "dpmpp_2m", "ancestral"]
_SOLVERS = {"diffusion": ("heun", "euler", "dpmpp_2m", "ancestral"), "flow": ("heun", "euler", "midpoint")}
_CHURNING = ("heun", "euler")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How records are drawn from the trained model; post-processing, changes no guarantee.

    Attributes:
      steps: of the solver; heun and midpoint look at the network twice in each.
      guidance: 0 is the conditional model alone.
      solver: diffusion: heun, euler, dpmpp_2m (Lu et al. 2022), ancestral (adds noise in each step); flow: heun, euler, midpoint.
      churn, churn_min, churn_max, churn_noise: of a diffusion by heun or euler, noise that is added and taken away again:
        S_churn, S_tmin, S_tmax, S_noise of EDM, algorithm 2; churn 0 adds none.
      temperature: of tokens, and of the texts that a reader answers with; 0 takes the likeliest.
      top_k, top_p: of tokens, the likeliest k alone (0: all), and of these those that have this probability together.
      candidates: pictures drawn for each text, of which a reader takes one (``model.reader``).
    """

    steps: int = 24
    guidance: float = 1.5
    solver: Solver = "heun"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    candidates: int = 1

    def __post_init__(self) -> None:
        checks.non_negative(temperature=self.temperature, top_k=self.top_k)
        checks.positive(candidates=self.candidates)
        checks.positive(top_p=self.top_p)
        checks.probability(top_p=self.top_p)
        checks.positive(steps=self.steps, churn_noise=self.churn_noise)
        checks.non_negative(guidance=self.guidance, churn=self.churn, churn_min=self.churn_min)

    def check_for(self, objective: str) -> None:
        """Raises UsageError where the solver is not one of the objective's, or cannot churn."""
        known = _SOLVERS.get(objective)
        if known is None:
            return
        if self.solver not in known:
            raise UsageError(
                f"model.sampling.solver = {self.solver} · of objective {objective} one of {', '.join(known)}",
                next="Choose one of these.",
            )
        if self.churn > 0 and (objective != "diffusion" or self.solver not in _CHURNING):
            raise UsageError(
                f"model.sampling.churn = {self.churn} · is of a diffusion's solvers {' and '.join(_CHURNING)} only, not of "
                f"{objective} by {self.solver}",
                next="Set it to 0, or take another solver.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads, of a picture, what a text would say of it (``families.reading``); of diffusion and flow only. All of it public.

    Attributes:
      questions: written by somebody who knows the field and has seen none of the records.
      weight: of its loss in a record's.
    """

    questions: tuple[Question, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(weight=self.weight)
        names = [one.name for one in self.questions]
        if not names or len(set(names)) < len(names):
            raise UsageError(
                f"questions = {names} · must be at least one, each with a name of its own",
                next="Fill model.reader.questions.",
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
      release: of pictures; sounds: of sounds too, if it is given.
      sound_share: of the release's guarantee (of 1/sigma^2) that sounds have.
      records: drawn from the release.
      steps, records_at_once, learning_rate: of the training on them.
    """

    release: WarmRelease
    sounds: SoundMoments | None = None
    sound_share: float = 0.5
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
        if not 0 < self.sound_share < 1:
            raise UsageError(
                f"sound_share = {self.sound_share} · must be between 0 and 1, both excluded", next="Take 0.5."
            )


Backbone = Annotated[Mlp | UNet | Transformer, Field(discriminator="kind")]
Objective = Annotated[
    Diffusion | Flow | Variational | Adversarial | Alignment | Autoregressive | Adapter | Prompts,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    image: ImageCodec | None = field(default_factory=Pixels)
    text: TextEncoder | None = field(default_factory=HashedWords)
    audio: AudioCodec | None = None
    backbone: Backbone = field(default_factory=Mlp)
    objective: Objective = field(default_factory=Diffusion)
    sampling: Sampling = field(default_factory=Sampling)
    random_features: RandomFeatures = field(default_factory=RandomFeatures)  # of a mean embedding only
    warm_start: WarmStart | None = None  # with privacy.warm_start
    reader: Reader | None = None
    class_moments: ClassMoments | None = None  # of mechanism mean_embedding: what is released, and drawn from
    sound_moments: SoundMoments | None = None  # of mechanism mean_embedding, too

    def __post_init__(self) -> None:
        self.sampling.check_for(self.objective.kind)
        if isinstance(self.objective, Adapter | Prompts) and (self.text or self.image or self.audio):
            raise UsageError(
                f"model.text, image, audio · {self.objective.kind}: read by a model that has its own tokenizer, and nothing else",
                next="Set model.text, model.image and model.audio to null.",
            )
        if (
            self.warm_start is not None
            and isinstance(self.warm_start.release, ClassMoments)
            and self.warm_start.release.directions
        ):
            raise UsageError(
                f"directions = {self.warm_start.release.directions} · take a release of their own before, and a warm start is one",
                next="Set model.warm_start.release.directions: 0.",
            )
        if self.warm_start is not None and self.warm_start.sounds is not None:
            of = self.warm_start.sounds
            if not isinstance(self.audio, MelSpectrogram) or of.outline > self.audio.bands:
                raise UsageError(
                    f"model.audio = {self.audio}, warm_start.sounds.outline = {of.outline} · sounds are summed by cosine "
                    "frequencies over all bands of a mel spectrogram",
                    next="Set model.audio: {kind: mel}, and no more outline than bands.",
                )
        if self.sound_moments is not None:
            self._check_sound_moments(self.sound_moments)
        if self.reader is not None and (
            not isinstance(self.objective, Diffusion | Flow) or self.objective.target != "image" or self.text is None
        ):
            raise UsageError(
                f"model.reader · reads the pictures that a diffusion or a flow draws for texts, not {self.objective.kind}",
                next="Leave it out, or set model.objective.kind: diffusion, its target: image, and model.text.",
            )
        if self.sampling.candidates > 1 and self.reader is None:
            raise UsageError(
                f"model.sampling.candidates = {self.sampling.candidates} · one of them is taken by a reader, and there is none",
                next="Set it to 1, or give the model a reader.",
            )

    def _check_sound_moments(self, of: SoundMoments) -> None:
        if self.class_moments is not None:
            raise UsageError("model.class_moments, sound_moments · a model draws of one", next="Leave one out.")
        if not isinstance(self.audio, MelSpectrogram) or self.audio.kept is not None or of.outline > self.audio.bands:
            raise UsageError(
                f"model.audio = {self.audio}, sound_moments.outline = {of.outline} · sounds are summed frame by frame, by cosine "
                "frequencies over all bands of a mel spectrogram",
                next="Set model.audio: {kind: mel}, without kept, and no more outline than bands.",
            )
