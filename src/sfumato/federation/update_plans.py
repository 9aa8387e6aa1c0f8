"""The plans of mechanisms whose unit is a whole site, from their settings and public numbers alone; no torch, so that a verifier makes
them anew. What each of them promises stands in its file under ``mechanisms``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as of
from sfumato.federation.rates import rates
from sfumato.federation.settings import BySize, FederationSettings
from sfumato.privacy.site_updates import SMOOTH, SiteUpdates, slack_of_sum

LARGEST = 2.0**31  # B and s, in steps of a grid
MOST_NUMBERS = 40  # log2 of how many numbers a secure sum may have, when its plan is made anew


def remade(federation: FederationSettings, kept: SiteUpdates, populations: Mapping[str, int] | None) -> SiteUpdates:
    """The plan that the settings make, to be held against one that a ledger was kept under. What depends on the model is taken
    from there: how many numbers (ldp_fl) or matrices (fed_lora) an update has, how wide the padded sum is (distributed).

    Args: populations: by site, where they are public; without them only selections whose rates do not depend on them.
    Raises: UsageError for settings that make no such plan.
    """
    sites, rounds = federation.sites, federation.rounds
    match federation.mechanism:
        case of.UpdateLevel() as chosen:
            return update_level(chosen, sites, rounds)
        case of.FedLora() as chosen:
            return fed_lora(chosen, sites, rounds, max(1, round((kept.max_update_norm or 1.0) ** 2)))
        case of.Central() as chosen:
            asked = rates(federation.selection, _known(federation, populations))
            return central(chosen, sites, rounds, max(asked.values()))
        case of.LocalAndGlobal() as chosen:
            return local_and_global(chosen, sites, rounds)[0]
        case of.LdpFl() as chosen:
            return ldp_fl(chosen, sites, rounds, kept.weights_per_round)
        case of.Distributed() as chosen:
            return _of_some_width(chosen, sites, rounds, kept)
        case _:
            raise UsageError(
                f"mechanism = {federation.mechanism.kind} · has no plan of whole updates",
                next="Take the plan of its sites.",
            )


def _known(federation: FederationSettings, populations: Mapping[str, int] | None) -> Mapping[str, int]:
    if isinstance(federation.selection, BySize) and not populations:
        raise UsageError(
            "selection = by_size · asks by numbers of units that the recipe does not say",
            next="Set federation.populations, so that everybody can make the plan anew.",
        )
    return populations or {str(number): 1 for number in range(federation.sites)}


def _of_some_width(chosen: of.Distributed, sites: int, rounds: int, kept: SiteUpdates) -> SiteUpdates:
    """Of all widths a sum may have the one whose plan is nearest to the kept one, by its slack."""
    made = []
    for width in range(MOST_NUMBERS):
        try:
            made.append(distributed(chosen, sites, rounds, 1 << width)[0])
        except UsageError:  # too wide for the bits
            break
    if not made:
        raise UsageError(f"bits = {chosen.bits} · too few for any sum", next="Use more bits.")
    return min(made, key=lambda plan: abs(math.log(plan.slack or 1e-300) - math.log(kept.slack or 1e-300)))


@lru_cache(maxsize=64)
def update_level(settings: of.UpdateLevel, sites: int, rounds: int) -> SiteUpdates:
    values: dict[str, Any] = {
        "form": "update_level",
        "population": sites,
        "rounds": rounds,
        "delta": settings.delta,
        "adjacency": settings.adjacency,
        "max_update_norm": settings.max_update_norm,
    }
    return with_noise(values, settings.noise_multiplier, settings.epsilon)


def with_noise(values: dict[str, Any], noise_multiplier: float | None, epsilon: float | None) -> SiteUpdates:
    """The plan with the noise that is given, or that an epsilon needs; the settings say exactly one of them."""
    if noise_multiplier is not None:
        return SiteUpdates(**values, noise_multiplier=noise_multiplier)
    assert epsilon is not None
    return SiteUpdates.calibrated(epsilon=epsilon, **values)


@lru_cache(maxsize=64)
def fed_lora(settings: of.FedLora, sites: int, rounds: int, matrices: int) -> SiteUpdates:
    """Of all matrices together: the update of matrices over their bounds has norm sqrt(matrices) at most."""
    norm = math.sqrt(matrices)
    values: dict[str, Any] = {
        "form": "fed_lora",
        "population": sites,
        "rounds": rounds,
        "delta": settings.delta,
        "adjacency": settings.adjacency,
        "max_update_norm": norm,
    }
    z = settings.noise_multiplier
    return with_noise(values, None if z is None else z / norm, settings.epsilon)


@lru_cache(maxsize=64)
def central(settings: of.Central, sites: int, rounds: int, rate: float) -> SiteUpdates:
    values: dict[str, Any] = {
        "form": "central",
        "population": sites,
        "rounds": rounds,
        "delta": settings.delta,
        "adjacency": settings.adjacency,
        "max_update_norm": settings.max_update_norm,
        "sampling_rate": rate,
    }
    return with_noise(values, settings.noise_multiplier, settings.epsilon)


@lru_cache(maxsize=64)
def local_and_global(settings: of.LocalAndGlobal, sites: int, rounds: int) -> tuple[SiteUpdates, SiteUpdates]:
    """(at the site, against everybody; at the server, against readers of the model)."""
    values: dict[str, Any] = {
        "form": "local_and_global",
        "population": sites,
        "rounds": rounds,
        "delta": settings.delta,
        "adjacency": settings.adjacency,
        "max_update_norm": settings.max_update_norm,
    }
    site = with_noise(values, settings.noise_multiplier, settings.epsilon)
    if settings.server_noise_multiplier is not None:
        both = math.hypot(site.noise_multiplier, settings.server_noise_multiplier)
        return site, SiteUpdates(**values, noise_multiplier=both)
    readers = with_noise(values, None, settings.server_epsilon)
    if readers.noise_multiplier < site.noise_multiplier:
        raise UsageError(
            f"server_epsilon = {settings.server_epsilon} · the sites' noise alone gives readers {site.epsilon():.4g}",
            next="Ask for less, or take update_level: the server need not add noise.",
        )
    return site, readers


@lru_cache(maxsize=64)
def ldp_fl(settings: of.LdpFl, sites: int, rounds: int, dimension: int) -> SiteUpdates:
    def at(epsilon_per_weight: float) -> SiteUpdates:
        return SiteUpdates(
            form="ldp_fl",
            population=sites,
            rounds=rounds,
            delta=settings.delta,
            adjacency=settings.adjacency,
            target_epsilon=settings.epsilon,
            noise_multiplier=2 / (math.exp(epsilon_per_weight) + 1),
            weights_per_round=dimension,
        )

    if settings.epsilon_per_weight is not None:
        return at(settings.epsilon_per_weight)
    assert settings.epsilon is not None  # the settings say one of them
    low, high = settings.epsilon / (rounds * dimension), settings.epsilon  # spends at most that, without any delta
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle).epsilon() <= settings.epsilon else (low, middle)
    return at(low)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The public numbers of a round.

    Attributes:
      dimension: D, padded.
      scale: steps of the grid in a unit of the update.
      bound: B, in steps.
      share_std: s, in steps.
      noise_multiplier: z.
    """

    dimension: int
    scale: float
    bound: float
    share_std: float
    noise_multiplier: float
    shares: int

    @property
    def slack(self) -> float | None:
        return slack_of_sum(self.shares, self.share_std, self.dimension) if self.noise_multiplier > 0 else None


# ---- the numbers of the grid ----


def rounded_bound(norm: float, dimension: int, beta: float) -> float:
    """B: the norm that a random rounding to whole numbers keeps with probability 1 - beta at least. arXiv:2102.06387, Theorem 1."""
    narrow = norm**2 + dimension / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(dimension) / 2)
    return math.sqrt(min(narrow, (norm + math.sqrt(dimension)) ** 2))


def grid_of(settings: of.Distributed, sites: int, dimension: int, noise_multiplier: float) -> Grid:
    """The finest grid on which a round's sum wraps around with probability ``wrap`` at most.

    A number of the sum: the rotated sum of the updates, sub-Gaussian over the signs with variance (n S scale)^2 / D (Hoeffding);
    n roundings, each off by less than 1; n shares, sub-Gaussian with variance s^2 each (Canonne, Kamath & Steinke 2020, arXiv:2004.00010).
    """
    silent = settings.dropouts + settings.colluders
    if sites - silent < 1:
        raise UsageError(
            f"dropouts + colluders = {silent} · of {sites} sites nobody is left whose noise counts",
            next="Allow for fewer, or take more sites.",
        )
    padded_dimension = 1 << max(0, dimension - 1).bit_length()
    half = 2.0 ** (settings.bits - 1)
    deviations = math.sqrt(2 * math.log(2 * padded_dimension / settings.wrap))

    def at(scale: float) -> Grid:
        bound = rounded_bound(settings.max_update_norm * scale, padded_dimension, settings.rounding)
        extra = SMOOTH**2 if noise_multiplier > 0 else 0.0
        share_std = math.sqrt(((noise_multiplier * bound) ** 2 + extra) / (sites - silent))
        return Grid(
            dimension=padded_dimension,
            scale=scale,
            bound=bound,
            share_std=share_std,
            noise_multiplier=noise_multiplier,
            shares=sites,
        )

    def fits(grid: Grid) -> bool:
        signal = (sites * settings.max_update_norm * grid.scale) ** 2 / padded_dimension
        if max(grid.bound, grid.share_std) >= LARGEST:  # what is squared, and drawn, in 64 bits
            return False
        return deviations * math.sqrt(signal + sites * grid.share_std**2) + sites < half

    low, high = 2.0**-60 / settings.max_update_norm, 2.0**60 / settings.max_update_norm
    if not fits(at(low)):
        raise UsageError(
            f"bits = {settings.bits} · too few: the noise of {sites} sites on {padded_dimension:,} numbers alone wraps around",
            next="Use more bits.",
        )
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


@lru_cache(maxsize=16)
def distributed(settings: of.Distributed, sites: int, rounds: int, dimension: int) -> tuple[SiteUpdates, Grid]:
    values: dict[str, Any] = {
        "form": "distributed",
        "population": sites,
        "rounds": rounds,
        "delta": settings.delta,
        "adjacency": settings.adjacency,
        "max_update_norm": settings.max_update_norm,
    }
    if settings.noise_multiplier is not None:
        grid = grid_of(settings, sites, dimension, settings.noise_multiplier)
        return SiteUpdates(**values, noise_multiplier=grid.noise_multiplier, slack=grid.slack), grid
    assert settings.epsilon is not None  # the settings say one of them
    slack = None
    for _ in range(8):  # the slack of one noise is a little more than that of the next
        sought = SiteUpdates.calibrated(epsilon=settings.epsilon, slack=slack, **values)
        grid = grid_of(settings, sites, dimension, sought.noise_multiplier)
        plan = replace(sought, slack=grid.slack)
        if plan.epsilon() <= settings.epsilon:
            return plan, grid
        slack = 1.1 * (grid.slack or 0.0)
        if 2 * slack * rounds >= settings.epsilon:
            break
    raise UsageError(
        f"bits = {settings.bits} · too few for epsilon = {settings.epsilon:g}: on so coarse a grid the shares' sum is no Gaussian",
        next="Use more bits.",
    )
