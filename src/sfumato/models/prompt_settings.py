"""Prompts for a frozen pair of encoders, as values: what is told apart, by which encoders, and how the prompt is learnt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sfumato import checks
from sfumato.errors import UsageError

Blocks = tuple[str, ...]  # whose gradients are released in a step, each a part of the plan

EVERYWHERE = "*"  # in ``Prompts.classes``: of the sites that are not named


# -- methods --


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFL:
    """One prompt, shared. Guo et al. 2023, arXiv:2208.11625."""

    kind: Literal["promptfl"] = "promptfl"
    blocks: ClassVar[Blocks] = ("p_G",)
    home: ClassVar[Blocks] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FedOTP:
    """A shared prompt and one of the site, with a text feature each; a picture's likeness to a class is the partial optimal transport
    between its patches and the two. Li et al. 2024, arXiv:2403.00041.

    Attributes:
      mass: gamma, how much of the patches is transported, in (0, 1].
      entropy: lambda of the regularised problem.
      iterations: of its solver, always so many: a stop that looked at a whole batch would tie its examples together.
    """

    kind: Literal["fedotp"] = "fedotp"
    mass: float = 0.8
    entropy: float = 0.1
    iterations: int = 50
    blocks: ClassVar[Blocks] = ("p_G", "p_L")
    home: ClassVar[Blocks] = ("p_L",)

    def __post_init__(self) -> None:
        checks.positive(mass=self.mass, entropy=self.entropy, iterations=self.iterations)
        checks.probability(mass=self.mass)


@dataclass(frozen=True, kw_only=True, slots=True)
class FedPGP:
    """A shared prompt plus u v of the site, both kept from step to step. Cui et al. 2024, arXiv:2405.09771.

    Attributes:
      contrast: mu: pulls the shared prompt's text features towards those of the hand-written prompt, away from the site's own.
      temperature: of that term.
    """

    kind: Literal["fedpgp"] = "fedpgp"
    rank: int = 8
    contrast: float = 1.0
    temperature: float = 0.5
    blocks: ClassVar[Blocks] = ("p_G", "u", "v")
    home: ClassVar[Blocks] = ("u", "v")

    def __post_init__(self) -> None:
        checks.positive(rank=self.rank, temperature=self.temperature)
        checks.non_negative(contrast=self.contrast)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpFpl:
    """A shared prompt plus p_L = u v + r of the site, factorised before every step. Tran et al. 2025, arXiv:2501.13904.

    Attributes:
      residual: kept: the prompt is p_G + u v + r. dropped: p_G + u u^T p_L, what the columns of u can say of p_L. replaced: p_G + u v, as
        the paper's code compares: v has rows of length 1, so u v is of another size than p_L.
      power_iterations: after the first half; 0 is the paper's.
    """

    kind: Literal["dpfpl"] = "dpfpl"
    rank: int = 8
    residual: Literal["kept", "dropped", "replaced"] = "kept"
    power_iterations: int = 0
    blocks: ClassVar[Blocks] = ("p_G", "u", "v")
    home: ClassVar[Blocks] = ("p_L",)

    def __post_init__(self) -> None:
        checks.positive(rank=self.rank)
        checks.non_negative(power_iterations=self.power_iterations)
        checks.one_of(("kept", "dropped", "replaced"), residual=self.residual)


Method = Annotated[PromptFL | FedOTP | FedPGP | DpFpl, Field(discriminator="kind")]


def check_rank(method: PromptFL | FedOTP | FedPGP | DpFpl, tokens: int) -> None:
    if isinstance(method, FedPGP | DpFpl) and method.rank > tokens:
        raise UsageError(
            f"rank = {method.rank} · a prompt of {tokens} tokens has no higher rank than that",
            next="Take a lower rank.",
        )


# -- encoders --


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallPair:
    """Small encoders, trained by contrast on the half of the public records that measures nothing; one channel. Made once, and kept
    beside the account of the data.

    Attributes:
      steps, batch, learning_rate: of that training, by AdamW, on pairs of picture and text.
      width: of a token; features: of a picture and of a text; longest: tokens of a text, what is longer is cut.
    """

    kind: Literal["small"] = "small"
    steps: int = 600
    batch: int = 128
    learning_rate: float = 2e-3
    width: int = 32
    features: int = 32
    longest: int = 64

    def __post_init__(self) -> None:
        checks.positive(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate)
        checks.positive(width=self.width, features=self.features, longest=self.longest)
        if self.width % 4:
            raise UsageError(f"width = {self.width} · must be a multiple of the 4 heads", next="Take 32 or 64.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFolder:
    """A CLIP checkpoint of ``transformers`` with its tokenizer and its picture processor. Declared public; nothing is downloaded.

    Attributes:
      path: the folder. sha256: of its files (``federation.prompts.encoders.fingerprint``), so that all sites stand on the same one;
        none: not looked at.
    """

    path: str
    kind: Literal["clip"] = "clip"
    sha256: str | None = None


# -- what is told apart --


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """What pictures are told apart by, at one site. Public.

    Attributes:
      columns: facts or metadata columns that say a record's class, joined by "+".
      names: from what they say to the words that the text encoder reads, in the order of the classes. A record that says anything else
        is not trained on.
    """

    columns: tuple[str, ...]
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.columns or len(self.names) < 2 or len(set(self.names.values())) < len(self.names):
            raise UsageError(
                f"columns = {list(self.columns)}, names = {dict(self.names)} · at least one column, and two classes of different names",
                next="For example {columns: [kind], names: {nodule: a nodule, cavity: a cavity}}.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Sites learn a prompt together, and each a part of its own, for encoders of pictures and texts that are frozen and public: pictures
    are told apart by the class whose text is nearest. Nothing is generated. `sfumato federate` alone trains it.

    The encoders read pictures and texts by themselves, so ``model.image``, ``model.text`` and ``model.audio`` are null.

    Attributes:
      classes: by site, what it tells apart; "*": at all that are not named.
      method: what of the prompt is shared, and what is a site's own.
      tokens: M, context vectors of the prompt.
      local_learning_rate: of what is a site's own; None: ``training.learning_rate``, which the shared prompt has.
      releases: each: the gradient of every part is clipped to ``privacy.max_grad_norm`` and noised by itself, the paper's form. once: the
        gradient of the prompt is, and the parts' gradients are computed from what came out.
      initial_std: of every number of a prompt before the first step, from ``training.seed``, public.
    """

    classes: Mapping[str, Classes]
    kind: Literal["prompts"] = "prompts"
    method: Method = field(default_factory=lambda: DpFpl(rank=4))
    encoders: Annotated[SmallPair | ClipFolder, Field(discriminator="kind")] = field(default_factory=SmallPair)
    tokens: int = 8
    local_learning_rate: float | None = None
    releases: Literal["each", "once"] = "each"
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        checks.positive(tokens=self.tokens, initial_std=self.initial_std)
        if self.local_learning_rate is not None:
            checks.positive(local_learning_rate=self.local_learning_rate)
        checks.one_of(("each", "once"), releases=self.releases)
        check_rank(self.method, self.tokens)
        if not self.classes:
            raise UsageError("classes = none · what are pictures told apart by?", next='Name them by site, or for "*".')

    def of(self, site: str) -> Classes:
        """Raises UsageError for a site without classes."""
        found = self.classes.get(site, self.classes.get(EVERYWHERE))
        if found is None:
            raise UsageError(
                f"model.objective.classes · names {', '.join(self.classes)}, and not {site}",
                next=f'Give {site} its classes, or all sites under "{EVERYWHERE}".',
            )
        return found
