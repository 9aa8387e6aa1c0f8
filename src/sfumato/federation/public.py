"""What everybody in a federation may know. Weights, denominators and noise are made of this, never of who replied."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from sfumato import checks
from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Public:
    """The public constants of a run.

    Attributes:
      populations: N_k by site: declared, not counted in secret. Its keys are the sites, in the order of their names.
      holders: by parameter name, the sites that hold it (partial models), sorted. All sites, where it is not said.
      rounds: T, planned.
      rates: q_k by site: with which probability it is asked in a round; 1 where every site always is.
      weights: w_k by site, for a mean: public, so neither a private count nor a loss.
      shapes: of every trained parameter of the federation, by name; the keys of ``holders``.
      released, releasing: of what sites release before the first round (``opening``), the shape, and the sites that hold it, by
        name; empty where there is no opening. release_noise: by site and name, the standard deviation of what it noises every
        number with, over its population.
      identities: Ed25519 public keys of the sites (64 hexadecimal digits), for secure aggregation; empty without.
    """

    populations: Mapping[str, int]
    rounds: int
    holders: Mapping[str, tuple[str, ...]]
    rates: Mapping[str, float]
    weights: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    released: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    releasing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    release_noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    identities: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.positive(rounds=self.rounds)
        if (
            not self.populations
            or set(self.rates) != set(self.populations)
            or set(self.weights) != set(self.populations)
        ):
            raise UsageError(
                f"populations, rates, weights of {sorted(self.populations)}, {sorted(self.rates)}, {sorted(self.weights)} · "
                "must be of the same sites, at least one",
                next="Give each site all three.",
            )
        for site in self.populations:
            checks.positive(population=self.populations[site], rate=self.rates[site], weight=self.weights[site])
            checks.probability(rate=self.rates[site])
        if self.identities:
            check_identities(self.identities)
            if set(self.identities) != set(self.populations):
                raise UsageError(
                    f"identities of {sorted(self.identities)} · must be of the same sites as the populations",
                    next="Give every site its public key, or none.",
                )
        if set(self.released) != set(self.releasing):
            raise UsageError(
                f"released, releasing of {sorted(self.released)}, {sorted(self.releasing)} · must be of the same parts",
                next="Give each its shape and its sites.",
            )
        for name, sites in (*self.holders.items(), *self.releasing.items()):
            if not sites or not set(sites) <= set(self.populations):
                raise UsageError(
                    f"holders[{name!r}] = {list(sites)} · must be sites of the federation, at least one",
                    next="Name the sites that train this parameter.",
                )

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.populations))

    @property
    def expected_sites(self) -> float:
        """sum_k q_k: how many sites are asked in a round, on average."""
        return sum(self.rates.values())

    @property
    def largest_rate(self) -> float:
        """max_k q_k: what a site's amplification is charged at; every site's is at least as good."""
        return max(self.rates.values())

    @property
    def dimension(self) -> int:
        """d: how many numbers a whole update has."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def largest_weight(self) -> float:
        """max_k w_k."""
        return max(self.weights.values())

    def expected_weight(self, name: str) -> float:
        """sum of q_k w_k over the holders of a parameter: the constant denominator of its noisy sum."""
        return sum(self.rates[site] * self.weights[site] for site in self.holders[name])


def check_identities(identities: Mapping[str, str]) -> None:
    """Raises UsageError unless each is 64 hexadecimal digits, and no two are the same."""
    for site, key in identities.items():
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise UsageError(
                f"identities[{site!r}] = {key[:80]!r} · must be an Ed25519 public key, 64 hexadecimal digits",
                next="Ask that site for it.",
            )
    if len(set(identities.values())) < len(identities):
        raise UsageError("identities · two sites have one key", next="Ask them for their own keys.")
