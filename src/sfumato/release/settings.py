"""What the release gate asks before it approves."""

from dataclasses import dataclass

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseSettings:
    max_epsilon: float = 10.0  # a bundle above this is refused
    require_audit: bool = True
    require_quality: bool = True

    def __post_init__(self) -> None:
        checks.positive(max_epsilon=self.max_epsilon)
