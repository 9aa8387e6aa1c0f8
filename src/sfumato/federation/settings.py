"""A federation in one process: how many sites, rounds and local steps."""

from dataclasses import dataclass

from sfumato import checks
from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationSettings:
    sites: int = 3
    rounds: int = 3
    local_steps: int = 40  # DP-SGD steps of one site in one round
    populations: tuple[
        int, ...
    ] = ()  # N of every site, public, in the order of their names; none: counted, and declared public

    def __post_init__(self) -> None:
        checks.positive(sites=self.sites, rounds=self.rounds, local_steps=self.local_steps)
        for population in self.populations:
            checks.positive(populations=population)
        if len(self.populations) not in (0, self.sites):
            raise UsageError(
                f"populations = {len(self.populations)} numbers · must be one for each of the {self.sites} sites, or none",
                next="List the public number of units of every site, in the order of their names.",
            )
