"""What a recipe says of a federation: who is asked, what makes an update private, how updates become one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.federation.mechanism_settings import Aggregation, Compression, Mean, Mechanism, RecordLevel, check_together
from sfumato.federation.public import check_identities

# -- the server's step (averaging.py) --


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainStep:
    """state + learning_rate * mean; 1 is federated averaging."""

    kind: Literal["plain"] = "plain"
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(learning_rate=self.learning_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Momentum:
    """The mean of every round is added to ``momentum`` times what was added before: FedAvgM."""

    kind: Literal["momentum"] = "momentum"
    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        checks.positive(learning_rate=self.learning_rate)
        _below_one(momentum=self.momentum)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam:
    """FedAdam. ``tau``: added to the root of the second moment; how small an update is still followed."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        checks.positive(learning_rate=self.learning_rate, tau=self.tau)
        _below_one(beta1=self.beta1, beta2=self.beta2)


ServerStep = Annotated[PlainStep | Momentum | Adam, Field(discriminator="kind")]


# -- who is asked (selection.py) --


@dataclass(frozen=True, kw_only=True, slots=True)
class Everyone:
    """All sites in every round."""

    kind: Literal["everyone"] = "everyone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Every site by its own coin, with probability ``rate``."""

    kind: Literal["uniform"] = "uniform"
    rate: float = 0.5

    def __post_init__(self) -> None:
        checks.positive(rate=self.rate)
        checks.probability(rate=self.rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class BySize:
    """Every site by its own coin, with a probability proportional to its public population (at most 1)."""

    kind: Literal["by_size"] = "by_size"
    expected_sites: float = 1.0  # how many are asked in a round, on average

    def __post_init__(self) -> None:
        checks.positive(expected_sites=self.expected_sites)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByChargedLoss:
    """The sites whose noised, charged loss was highest when they told it last; who never told comes first.

    Attributes:
      asked: how many in a round.
      largest_loss: a unit's loss is clipped to [0, largest_loss]; public.
    """

    kind: Literal["by_charged_loss"] = "by_charged_loss"
    asked: int = 1
    largest_loss: float = 4.0

    def __post_init__(self) -> None:
        checks.positive(asked=self.asked, largest_loss=self.largest_loss)


Selection = Annotated[Everyone | Uniform | BySize | ByChargedLoss, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationSettings:
    """Attributes:
    local_steps: of one site in one round.
    populations: N of every site, public, in the order of their names; none: counted, and declared public.
    weights: of the sites in a mean: their public populations, or all equal.
    proximal: mu of FedProx; mu / 2 |w - w_t|^2 is added to the local loss (``training.rounds``).
    least_sites: a round with fewer usable replies is discarded; it stays charged, and counts. Where a coin draws the sites and the
      server's noise hides them, 1: how many were drawn is secret too, and no round is discarded for it.
    patience: rounds without a lower loss on public records after which no further one is opened; None: all rounds.
    holds: by site, which parameters it trains, sends and receives, as ``model.train_only`` names them; a site that is not
      named holds all. The parameters' names are the contract between sites with different parts. One that a single site
      holds stays there: the federation's model has it as it was built. Where the rounds begin with a release
      (``privacy.warm_start``), also what of it the site gives: ``released.mean`` of pictures, ``released.sounds``.
    identities: by site, its Ed25519 public key in 64 hexadecimal digits, for distributed noise over several machines; sites
      in one process make their own.
    home: names of parameters (or their beginnings, up to a dot) that every site trains for itself: they are kept in its folder, and
      neither sent nor averaged. What they cost is charged like all else.
    """

    sites: int = 3
    rounds: int = 3
    local_steps: int = 40
    populations: tuple[int, ...] = ()
    mechanism: Mechanism = field(default_factory=RecordLevel)
    aggregation: Aggregation = field(default_factory=Mean)
    server: ServerStep = field(default_factory=PlainStep)
    selection: Selection = field(default_factory=Everyone)
    compression: Compression = "none"
    weights: Literal["population", "equal"] = "population"
    proximal: float = 0.0
    least_sites: int = 1
    patience: int | None = None
    holds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    identities: Mapping[str, str] = field(default_factory=dict)
    home: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.positive(
            sites=self.sites, rounds=self.rounds, local_steps=self.local_steps, least_sites=self.least_sites
        )
        checks.non_negative(proximal=self.proximal)
        if self.patience is not None:
            checks.positive(patience=self.patience)
        checks.one_of(("population", "equal"), weights=self.weights)
        check_together(self.mechanism, self.aggregation, self.compression)
        check_identities(self.identities)
        for population in self.populations:
            checks.positive(populations=population)
        if len(self.populations) not in (0, self.sites):
            raise UsageError(
                f"populations = {len(self.populations)} numbers · must be one for each of the {self.sites} sites, or none",
                next="List the public number of units of every site, in the order of their names.",
            )
        if isinstance(self.selection, ByChargedLoss) and self.mechanism.kind != "record_level":
            raise UsageError(
                f"selection = by_charged_loss, mechanism = {self.mechanism.kind} · the choice depends on the sites' data, and here a "
                "whole site is what is hidden",
                next="Use uniform or by_size, or mechanism record_level.",
            )
        if self.least_sites > self.sites:
            raise UsageError(
                f"least_sites = {self.least_sites} · of {self.sites} sites: every round would be discarded",
                next="Ask for fewer replies.",
            )

    def stays_home(self, name: str) -> bool:
        """Whether the parameter of this name is never sent."""
        return any(name == home or name.startswith(f"{home}.") for home in self.home)

    @property
    def steps_per_round(self) -> int:
        """That a site is charged for in a round: the local steps, and one more where it tells its loss."""
        return self.local_steps + isinstance(self.selection, ByChargedLoss)


def _below_one(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name} = {value} · must be at least 0 and below 1", next="0.9 is usual.")
