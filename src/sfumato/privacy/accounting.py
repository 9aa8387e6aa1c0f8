"""From events to epsilon, and from a target epsilon to noise. The arithmetic is that of dp_accounting.

An event says what happened to the data, and nothing else does: the plan, the ledger, the report and the verifier all
compute epsilon from the same ``Event`` values.

PLD (privacy-loss distributions, Koskela et al. 2020; Doroshenko et al. 2022, "connect the dots", always an upper bound)
decides, on a grid of 1e-4 or finer. RDP (Mironov 2017; Wang et al. 2019) is computed beside it: PLD above RDP would
mean that one of the two is wrong, so that stops. zCDP (Bun & Steinke 2016) has no useful form for Poisson sampling and
is given for unsampled Gaussians only. Adjacency is add-or-remove throughout; under replace-one the two accountants of
dp_accounting disagree about who doubles the sensitivity (docs/pitfalls.md).
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from sfumato import checks
from sfumato.errors import PrivacyRefused, SfumatoError, UsageError

Mechanism = Literal["poisson_gaussian", "gaussian"]
Accountant = Literal["pld", "rdp", "zcdp"]

GRID = 1e-4  # PLD value discretisation wherever a budget is decided
FINEST_GRID = 1.01e-7  # where many steps each lose much less than 1e-4, the grid is refined until PLD <= RDP
FINE_UP_TO = 64.0  # above this epsilon the grid grows in proportion, to bound the memory (640,000 cells and a few)
PLD_UP_TO = 1e4  # above this the RDP bound is given: both are valid, and neither says anything
LARGEST_NOISE_MULTIPLIER = 1e5
SMALLEST_NOISE_MULTIPLIER = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """``count`` times the same mechanism on the same data.

    Attributes:
      mechanism: poisson_gaussian: every unit joins with ``sampling_rate``, the contributions, each of L2 norm at most
        C, are summed, and N(0, (noise_multiplier C)^2) is added to every coordinate; gaussian: the same with all units.
      sampling_rate: in (0, 1]; 1 for gaussian.
      noise_multiplier: standard deviation / C; 0 is no noise, and no guarantee.
      count: how many times.
    """

    mechanism: Mechanism = "poisson_gaussian"
    sampling_rate: float
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        checks.one_of(("poisson_gaussian", "gaussian"), mechanism=self.mechanism)
        checks.probability(sampling_rate=self.sampling_rate)
        checks.positive(sampling_rate=self.sampling_rate)
        checks.non_negative(noise_multiplier=self.noise_multiplier)
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise UsageError(f"count = {self.count!r} · must be a whole number >= 0", next="Give the number of steps.")
        if self.mechanism == "gaussian" and self.sampling_rate != 1.0:
            raise UsageError(
                f"sampling_rate = {self.sampling_rate} · must be 1 for mechanism gaussian",
                next="Use poisson_gaussian, which is what Poisson sampling makes of it.",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Event":
        """Reads what ``to_dict`` wrote. Raises UsageError for any other key, type or value."""
        expected = {"mechanism": str, "sampling_rate": float, "noise_multiplier": float, "count": int}
        if not isinstance(values, dict) or set(values) != set(expected):
            given = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise UsageError(
                f"event = {given} · must have exactly {', '.join(sorted(expected))}",
                next="The event was written by something else, or changed.",
            )
        for key, kind in expected.items():
            if type(values[key]) is not kind:
                raise UsageError(f"event.{key} = {values[key]!r} · must be of type {kind.__name__}", next="Correct it.")
        return cls(**values)

    def to_dp_event(self) -> Any:
        """The same as a dp_accounting.DpEvent."""
        import dp_accounting as dpa

        event = dpa.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1.0:  # with rate 1 both mechanisms are the Gaussian one
            event = dpa.PoissonSampledDpEvent(self.sampling_rate, event)
        return dpa.SelfComposedDpEvent(event, self.count)


def merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """Equal events as one with the sum of their counts, in order of first appearance; composition is commutative."""
    counts: dict[Event, int] = {}
    for event in events:
        key = replace(event, count=1)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(replace(event, count=count) for event, count in counts.items() if count)


def joint_noise_multiplier(noise_multipliers: Sequence[float]) -> float:
    """(sum sigma_i^-2)^(-1/2): of Gaussian mechanisms on the same sample of units, seen as one.

    The Gaussians may be asked one after another, each question chosen after the earlier answers: their trade-off
    function is that of one Gaussian (composition of mu-GDP: Dong, Roth, Su 2022, arXiv:1905.02383, section 3), and by
    Blackwell's theorem the answers can be made from its answer, under Poisson sampling too. 0, no guarantee, if one of them has no noise.
    """
    if len(noise_multipliers) == 1:
        return noise_multipliers[0]
    if any(value == 0 for value in noise_multipliers):
        return 0.0
    return sum(value**-2 for value in noise_multipliers) ** -0.5


def epsilon(events: Sequence[Event], delta: float, accountant: str = "pld") -> float | None:
    """The smallest epsilon that the accountant can prove for all events together, at ``delta``.

    Guarantee: an upper bound, for parameters that were fixed before the first event. No events give 0, an event without
    noise gives infinity. None: zCDP does not apply (an event is sampled).
    """
    checks.one_of(("pld", "rdp", "zcdp"), accountant=accountant)
    _check_delta(delta)
    events = merged(events)
    if not events:
        return 0.0
    if accountant == "zcdp" and any(event.sampling_rate < 1 for event in events):
        return None
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    match accountant:
        case "pld":
            return _pld_epsilon(events, delta)
        case "rdp":
            return _rdp_epsilon(events, delta)
        case _:
            return _zcdp_epsilon(events, delta)


def accountants(events: Sequence[Event], delta: float) -> dict[str, float | None]:
    """Epsilon by each accountant; null where one does not apply. ``pld`` is the one that decides."""
    return {name: epsilon(events, delta, name) for name in ("pld", "rdp", "zcdp")}


def curve(
    events: Sequence[Event], deltas: Sequence[float] = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
) -> list[list[float]]:
    """[[delta, epsilon], ...] by PLD: a guarantee holds for every delta at once."""
    points = [(delta, epsilon(events, delta)) for delta in deltas]
    return [[delta, value] for delta, value in points if value is not None]


@lru_cache(maxsize=256)
def calibrate(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier, to about 5 digits, whose PLD epsilon on the fine grid is at most ``epsilon``.

    RDP, which is cheap and never below PLD, says where to begin; a grid ten times coarser comes near; the answer itself
    is confirmed on the 1e-4 grid: it spends between 0.9998 ``epsilon`` and ``epsilon``, or a digit less is too little.
    """
    checks.positive(epsilon=epsilon, steps=steps)
    _check_delta(delta)

    def spent(noise_multiplier: float, bound: Callable[..., float]) -> float:
        event = Event(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, count=steps)
        return bound((event,), delta)

    if spent(SMALLEST_NOISE_MULTIPLIER, _rdp_epsilon) <= epsilon:
        raise PrivacyRefused(
            f"epsilon = {epsilon:g} · even a noise multiplier of {SMALLEST_NOISE_MULTIPLIER:g} would spend less",
            next="Ask for an epsilon of 100 or less, or set privacy.mechanism: none.",
            code="epsilon_too_large",
        )
    if spent(LARGEST_NOISE_MULTIPLIER, _pld_epsilon) > epsilon:
        raise PrivacyRefused(
            f"epsilon = {epsilon:g} · not reachable with a noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g}",
            next="Ask for a larger epsilon, or take fewer steps or smaller batches.",
            code="epsilon_unreachable",
        )
    start = _enough_by_rdp(lambda noise: spent(noise, _rdp_epsilon) <= epsilon)
    near, slope = _least_noise(lambda noise: spent(noise, _coarse_pld_epsilon), start, -1.5, epsilon)
    return _least_noise(lambda noise: spent(noise, _pld_epsilon), near, slope, epsilon)[0]


def _enough_by_rdp(enough: Callable[[float], bool]) -> float:
    """A noise multiplier that is enough, and at most 5 % too large."""
    low, high = SMALLEST_NOISE_MULTIPLIER, SMALLEST_NOISE_MULTIPLIER * 2
    while not enough(high) and high < LARGEST_NOISE_MULTIPLIER:
        low, high = high, high * 2
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return min(high, LARGEST_NOISE_MULTIPLIER)


def _least_noise(spent: Callable[[float], float], guess: float, slope: float, target: float) -> tuple[float, float]:
    """The least noise of 5 digits that spends at most ``target``, and the slope there of log epsilon over log noise.

    A secant search between what is known to be too little and to be enough; every fourth step halves that range, so it
    ends whatever the curve looks like.
    """
    low, high = 0.0, math.inf
    before: tuple[float, float] | None = None
    for trial in itertools.count(1):
        digit = 10.0 ** (math.floor(math.log10(guess)) - 4)
        noise = float(f"{math.ceil(guess / digit - 1e-6) * digit:.5g}")
        if noise >= high:  # rounded up to what is known already
            noise = float(f"{high - digit:.5g}")
        value = spent(noise)
        low, high = (low, noise) if value <= target else (noise, high)
        here = (math.log(noise), math.log(max(value, 1e-300) / target))
        if before is not None and before[0] != here[0]:
            secant = (here[1] - before[1]) / (here[0] - before[0])
            slope = secant if -50 < secant < -0.1 else slope
        if target * (1 - 2e-4) <= value <= target or high - low <= 1.5 * digit:
            return high, slope
        before = here
        step = (-1e-4 - here[1]) / slope  # aims a little below the target
        guess = noise * math.exp(min(max(step, -0.5), 0.5))
        if low > 0 and high < math.inf and (trial % 4 == 0 or not low < guess < high):
            guess = math.sqrt(low * high)
    raise AssertionError("unreachable")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta = {delta} · must be between 0 and 1, both excluded", next="Give about 1/(N ln N).")


@lru_cache(maxsize=4096)
def _pld_epsilon(events: tuple[Event, ...], delta: float) -> float:
    rdp = _rdp_epsilon(events, delta)
    if not rdp < PLD_UP_TO:
        return rdp
    grid = _grid(rdp)
    pld = float(_distribution(events, grid).get_epsilon(delta))
    while pld > rdp and grid > FINEST_GRID and rdp / grid < 1e5:  # losses of one step far below the grid: refine it
        grid /= 10
        pld = float(_distribution(events, grid).get_epsilon(delta))
    if pld > rdp * (1 + 1e-3) + 1e-3:
        raise SfumatoError(
            f"epsilon = {pld:.6g} by PLD, {rdp:.6g} by RDP at delta = {delta:g} · PLD must not be above RDP",
            next="Do not use this figure; please report the events: " + str([event.to_dict() for event in events]),
            code="accountants_disagree",
        )
    return min(pld, rdp)


def _coarse_pld_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """On a grid ten times coarser: quick, above the truth, and good for a search only."""
    rdp = _rdp_epsilon(events, delta)
    return rdp if not rdp < PLD_UP_TO else float(_distribution(events, 10 * _grid(rdp)).get_epsilon(delta))


def _grid(rdp: float) -> float:
    return GRID * max(1.0, rdp / FINE_UP_TO)


@lru_cache(maxsize=4)
def _distribution(events: tuple[Event, ...], grid: float) -> Any:
    """A PLDAccountant that has composed all events; kept, because a curve asks it for several deltas."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    for event in events:
        accountant.compose(event.to_dp_event())
    return accountant


@lru_cache(maxsize=4096)
def _rdp_epsilon(events: tuple[Event, ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _without_order_warnings():
        for event in events:
            accountant.compose(event.to_dp_event())
        return float(accountant.get_epsilon(delta))


def _zcdp_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), Corollary 13, for rho = sum of count / (2 sigma^2)."""
    rho = sum(event.count / (2 * event.noise_multiplier**2) for event in events)

    def at(log_order: float) -> float:  # alpha - 1 = exp(log_order)
        excess = math.exp(log_order)
        alpha = 1 + excess
        return alpha * rho + (math.log(1 / delta) - math.log(alpha)) / excess + math.log1p(-1 / alpha)

    orders = [
        at(-7 + 25 * i / 20_000) for i in range(20_001)
    ]  # any order is valid, so a grid loses a little, never lies
    return max(0.0, min(orders))


@contextlib.contextmanager
def _without_order_warnings() -> Iterator[None]:
    """dp_accounting warns of every RDP order that did not converge and leaves it out, which keeps the bound valid."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
