"""What a recipe says of updates: what makes one private (``mechanisms``), how they are combined (``robust``), how they travel
(``compression``). A part of ``federation.settings``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy.settings import NoiseSource


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordLevel:
    """DP-SGD in the local steps, by the recipe's ``privacy``; the update is sent as it is."""

    kind: Literal["record_level"] = "record_level"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateLevel:
    """Each site clips its update to L2 norm ``max_update_norm`` and adds noise before sending; unit: the site, all its data.

    Attributes:
      noise_multiplier: standard deviation / max_update_norm, in every round; or
      epsilon: of all rounds together, from which it is found. One of the two.
      noise: gaussian, on a grid of powers of two; or discrete, sampled exactly on whole numbers.
      adjacency: replace_one (the site's data for any others) or zero_out (for none).
    """

    kind: Literal["update_level"] = "update_level"
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["replace_one", "zero_out"] = "replace_one"
    noise: NoiseSource = "gaussian"

    def __post_init__(self) -> None:
        checks.positive(max_update_norm=self.max_update_norm)
        _one_of_two(self.kind, self.noise_multiplier, self.epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class FedLora:
    """Each site clips A and B of every low-rank adapter by themselves and adds noise to each before sending; unit: the site.

    Attributes:
      max_a_norm, max_b_norm: bounds on the L2 (Frobenius) norm of the update of one A, and of one B.
      noise_multiplier: standard deviation of the noise on a matrix / that matrix's bound, in every round; or
      epsilon: of all matrices and all rounds together, from which it is found. One of the two.
      adjacency, noise: as above.
    """

    kind: Literal["fed_lora"] = "fed_lora"
    max_a_norm: float = 1.0
    max_b_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["replace_one", "zero_out"] = "replace_one"
    noise: NoiseSource = "gaussian"

    def __post_init__(self) -> None:
        checks.positive(max_a_norm=self.max_a_norm, max_b_norm=self.max_b_norm)
        _one_of_two(self.kind, self.noise_multiplier, self.epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class Central:
    """The server clips every update and adds noise to their sum; unit: the site; the server is trusted.

    Attributes:
      clipping: fixed, at max_update_norm; or adaptive, beginning there: the bound follows ``quantile`` of the norms.
      noise_multiplier, epsilon: as above, of sum and count together where adaptive.
      count_noise: standard deviation of the noise on the count of short updates, in sites; None is a 20th of the sites asked.
    """

    kind: Literal["central"] = "central"
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["zero_out", "add_or_remove", "replace_one"] = "zero_out"
    noise: NoiseSource = "gaussian"
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: float = 0.5
    clip_learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        checks.positive(max_update_norm=self.max_update_norm, clip_learning_rate=self.clip_learning_rate)
        checks.probability(quantile=self.quantile)
        _one_of_two(self.kind, self.noise_multiplier, self.epsilon)
        if self.clipping == "fixed" and self.count_noise is not None:
            raise UsageError("count_noise · is of adaptive clipping", next="Set clipping: adaptive, or leave it out.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalAndGlobal:
    """Noise at the site, and at the server. Two guarantees, one against the server, one against whoever gets the model.

    Attributes:
      noise_multiplier: at the site, over max_update_norm; or
      epsilon: against everybody, of all rounds together, from which it is found. One of the two.
      server_noise_multiplier: at the server, over max_update_norm times the largest weight; or
      server_epsilon: against readers of the model, of both noises, not above ``epsilon``. One of the two.
    """

    kind: Literal["local_and_global"] = "local_and_global"
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    server_noise_multiplier: float | None = None
    server_epsilon: float | None = None
    delta: float = 1e-5
    noise: NoiseSource = "gaussian"
    adjacency: Literal["replace_one", "zero_out"] = "replace_one"

    def __post_init__(self) -> None:
        checks.positive(max_update_norm=self.max_update_norm)
        _one_of_two(self.kind, self.noise_multiplier, self.epsilon)
        _one_of_two(f"the server of {self.kind}", self.server_noise_multiplier, self.server_epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class LdpFl:
    """Every weight of an update is told as one of two values, by a coin that the weight biases.

    Attributes:
      epsilon_per_weight: of one coin; or
      epsilon: of all weights in all rounds together, from which it is found. One of the two.
      radius: r: every weight is cut to [-r, r]; of each tensor its own, where adaptive.
      adaptive_range: r of a tensor follows the size of the noisy mean.
      shuffled: the server splits what it got into single numbers, and puts those of one place in random order before anything is
        made of them, so that afterwards none says whose it is. It is the server that does it: no epsilon counts on it.
    """

    kind: Literal["ldp_fl"] = "ldp_fl"
    epsilon_per_weight: float | None = None
    epsilon: float | None = None
    radius: float = 0.01
    adaptive_range: bool = True
    shuffled: bool = False
    delta: float = 1e-5
    adjacency: Literal["replace_one", "zero_out"] = "replace_one"

    def __post_init__(self) -> None:
        checks.positive(radius=self.radius)
        _one_of_two(self.kind, self.epsilon_per_weight, self.epsilon, "epsilon_per_weight")
        if self.epsilon_per_weight is not None:
            checks.positive(epsilon_per_weight=self.epsilon_per_weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distributed:
    """Each site adds a share of discrete noise to its whole numbers, and a secure aggregation shows the server their sum only.

    Attributes:
      noise_multiplier, epsilon: of the sum, with the shares of all but ``dropouts + colluders`` sites.
      bits: of one number in the sum, which is taken modulo 2^bits.
      dropouts: so many sites may be silent in a round; with more the round is discarded, and charged.
      colluders: so many sites may tell their noise to the server.
      rounding: beta, the chance that a rounding is tried again at most; the smaller, the larger the bound.
      wrap: the probability that a number of a round's sum wraps around, at most; it costs accuracy, not privacy.
    """

    kind: Literal["distributed"] = "distributed"
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["replace_one", "zero_out"] = "replace_one"
    bits: int = 20
    dropouts: int = 0
    colluders: int = 0
    rounding: float = 0.6
    wrap: float = 1e-6

    def __post_init__(self) -> None:
        checks.positive(max_update_norm=self.max_update_norm, rounding=self.rounding, wrap=self.wrap)
        if not max(self.rounding, self.wrap) < 1:
            raise UsageError(
                f"rounding = {self.rounding}, wrap = {self.wrap} · must be below 1", next="0.6 and 1e-6 are usual."
            )
        checks.non_negative(dropouts=self.dropouts, colluders=self.colluders)
        _one_of_two(self.kind, self.noise_multiplier, self.epsilon)
        if not 2 <= self.bits <= 48:
            raise UsageError(f"bits = {self.bits} · must be from 2 to 48", next="20 is enough for most sums.")


def _one_of_two(kind: str, given: float | None, epsilon: float | None, name: str = "noise_multiplier") -> None:
    if (given is None) == (epsilon is None):
        raise UsageError(
            f"{name} = {given}, epsilon = {epsilon} · {kind} needs exactly one of the two",
            next="Give an epsilon, of all rounds together.",
        )
    if epsilon is not None:
        checks.positive(epsilon=epsilon)
    if given is not None:
        checks.non_negative(next="Give zero or more.", **{name: given})  # 0 is no noise, and no guarantee


Mechanism = Annotated[
    RecordLevel | UpdateLevel | FedLora | Central | LocalAndGlobal | LdpFl | Distributed,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean, by public weights."""

    kind: Literal["mean"] = "mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedMean:
    """By coordinate, without the ``trimmed`` largest and as many smallest."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trimmed: int

    def __post_init__(self) -> None:
        checks.positive(trimmed=self.trimmed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Median:
    """By coordinate."""

    kind: Literal["median"] = "median"


@dataclass(frozen=True, kw_only=True, slots=True)
class Krum:
    """The ``selected`` updates that are nearest to most others, their mean; ``hostile`` sites are withstood."""

    kind: Literal["krum"] = "krum"
    hostile: int
    selected: int = 1

    def __post_init__(self) -> None:
        checks.positive(hostile=self.hostile, selected=self.selected)


Aggregation = Annotated[Mean | TrimmedMean | Median | Krum, Field(discriminator="kind")]

ROBUST_UNDER = (
    "record_level",
    "update_level",
    "fed_lora",
    "ldp_fl",
)  # mechanisms whose every update is private by itself
Compression = Literal["none", "bf16", "int8"]


def check_together(mechanism: Mechanism, aggregation: Aggregation, compression: str) -> None:
    """Raises UsageError for what does not go together."""
    checks.one_of(("none", "bf16", "int8"), compression=compression)
    if aggregation.kind != "mean" and mechanism.kind not in ROBUST_UNDER:
        raise UsageError(
            f"aggregation = {aggregation.kind}, mechanism = {mechanism.kind} · the noise is on the sum of bounded updates: a median or a "
            "choice among updates has another sensitivity, or needs updates that nobody may see",
            next="Set federation.aggregation: {kind: mean}, or a mechanism that noises every update at its site.",
        )
    if isinstance(mechanism, LdpFl) and mechanism.shuffled and aggregation.kind == "krum":
        raise UsageError(
            "aggregation = krum, shuffled = true · chooses among whole updates, and shuffled numbers belong to none",
            next="Use mean, median or trimmed_mean, or leave shuffled out.",
        )
    if compression != "none" and mechanism.kind in ("distributed", "central", "local_and_global"):
        why = {
            "distributed": "what is sent are whole numbers, to be added modulo 2^bits",
            "central": "the update is not private before the server's noise, and neither is its scale; rounding moves it past its bound",
            "local_and_global": "the site's noise and the server's are one Gaussian only where nothing is rounded between them",
        }[mechanism.kind]
        raise UsageError(
            f"compression = {compression}, mechanism = {mechanism.kind} · {why}",
            next="Set federation.compression: none.",
        )
