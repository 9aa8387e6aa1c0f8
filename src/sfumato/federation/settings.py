"""A federation in one process: how many sites, rounds and local steps."""

from dataclasses import dataclass

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationSettings:
    sites: int = 3
    rounds: int = 3
    local_steps: int = 40  # DP-SGD steps of one site in one round

    def __post_init__(self) -> None:
        checks.positive(sites=self.sites, rounds=self.rounds, local_steps=self.local_steps)
