"""With which probability each site is asked in a round: a function of public numbers, so that a verifier knows it too."""

from collections.abc import Mapping

from sfumato.errors import UsageError
from sfumato.federation.settings import ByChargedLoss, BySize, Everyone, Uniform

AnySelection = Everyone | Uniform | BySize | ByChargedLoss


def rates(selection: AnySelection, populations: Mapping[str, int]) -> dict[str, float]:
    """q_k by site: with which probability it is asked, by its own coin; 1 where there is no coin."""
    match selection:
        case Uniform(rate=rate):
            return dict.fromkeys(populations, rate)
        case BySize(expected_sites=expected):
            return _proportional(populations, expected)
        case _:
            return dict.fromkeys(populations, 1.0)


def _proportional(populations: Mapping[str, int], expected: float) -> dict[str, float]:
    """q_k = min(1, c N_k) with sum q_k = ``expected``: c grows until it is so, site after site that reaches 1."""
    if expected > len(populations):
        raise UsageError(
            f"expected_sites = {expected:g} · there are {len(populations)} sites", next="Ask for fewer on average."
        )
    certain: set[str] = set()
    while True:
        rest = {site: size for site, size in populations.items() if site not in certain}
        c = (expected - len(certain)) / sum(rest.values()) if rest else 0.0
        over = {site for site, size in rest.items() if c * size > 1.0}
        if not over:
            return {site: 1.0 if site in certain else c * size for site, size in populations.items()}
        certain |= over
