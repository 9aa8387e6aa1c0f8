"""How hard the attacks try."""

from dataclasses import dataclass

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSettings:
    members: int = 1_000  # units of each side, members and non-members
    draws: int = 8  # noise levels and noises averaged in the membership score of one record
    confidence: float = 0.95

    def __post_init__(self) -> None:
        checks.positive(members=self.members, draws=self.draws)
        checks.probability(confidence=self.confidence)
