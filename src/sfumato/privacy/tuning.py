"""What it costs to train several times and keep the best: private selection with a random number of trials.

Keeping the best of a *fixed* number of runs costs as much as all of them. If how many runs there are is itself random, and
told to nobody, the best one alone costs little more than one (Liu & Talwar 2019; Papernot & Steinke 2022,
arXiv:2110.03620, Theorems 2 and 6).

**What is assumed.** The number of trials K is drawn once, before the first, from a secret source (``Trials.draw``). Every
trial picks its settings at random from a list that was fixed beforehand, runs a mechanism of which ``events`` is a bound
whatever it picked, and is scored by something that the events cover: by public data, or by its own noisy output. The best
is released; K, the other trials, their scores and how long it all took are not. The figures of a trial that a person has
looked at are released to that person: then composition, not this, is the cost.

Otherwise the tuning is charged run by run to the account of the data set, or its budget is named public.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Adjacency, Event
from sfumato.randomness import Random

MOST_TRIALS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """How many trials there are, K: a truncated negative binomial distribution, or Poisson.

    Attributes:
      mean: E[K], at least 1.
      shape: eta; 0 is the logarithmic distribution, 1 the geometric one, infinity Poisson, which may be 0. A smaller eta
        costs less, and is more often one trial.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= MOST_TRIALS / 100:
            raise UsageError(
                f"mean = {self.mean} · must be between 1 and {MOST_TRIALS // 100:,}", next="Give about 10 trials."
            )
        if not self.shape >= 0:
            raise UsageError(f"shape = {self.shape} · must be at least 0", next="Give 0, 1 or infinity, for example.")

    @property
    def gamma(self) -> float:
        """gamma of the truncated negative binomial (Definition 1), of which ``mean`` is the mean; by bisection."""
        if self.mean == 1:
            return 1.0
        low, high = -80.0, 0.0  # of log gamma; the mean falls as gamma grows
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean(middle, self.shape) > self.mean else (low, middle)
        return math.exp(high)

    def probability(self, trials: int) -> float:
        """P[K = trials]. Source: arXiv:2110.03620, Definition 1; Poisson: section 3.3."""
        if trials < (0 if math.isinf(self.shape) else 1):
            return 0.0
        if math.isinf(self.shape):
            return math.exp(-self.mean + trials * math.log(self.mean) - math.lgamma(trials + 1))
        gamma, shape = self.gamma, self.shape
        if gamma == 1:
            return float(trials == 1)
        log = trials * math.log1p(-gamma)
        if shape == 0:
            return math.exp(log - math.log(trials) - math.log(-math.log(gamma)))
        log += math.lgamma(trials + shape) - math.lgamma(shape) - math.lgamma(trials + 1)
        return math.exp(log) / math.expm1(-shape * math.log(gamma))

    def draw(self, random: Random) -> int:
        """K, from a secret source: draw once, tell nobody. 0 (Poisson only) releases what does not depend on the data.

        By inversion of a uniform number of 53 bits: off by less than 1e-13 in total variation, which is part of delta.
        """
        chance, below = float(random.uniform(1)[0]), 0.0
        for trials in range(MOST_TRIALS):
            below += self.probability(trials)
            if chance < below:
                return trials
        return MOST_TRIALS


def epsilon(
    events: Sequence[Event], delta: float, trials: Trials, adjacency: Adjacency = "add_or_remove"
) -> float | None:
    """Of the best of the trials, each of which spends at most ``events``. See the module's text for what is assumed.

    Returns: by RDP; None where RDP has no bound for an event. Infinite with an event without noise.
    """
    from dp_accounting.dp_event import RepeatAndSelectDpEvent

    events = accounting.merged(events)
    checks.probability(delta=delta)
    checks.positive(delta=delta)
    accounting.check_adjacency(events, adjacency)
    if not all(event.protects for event in events):
        return math.inf
    if any(accounting.renyi(event, 2, adjacency) is None for event in events):
        return None
    accountant = accounting.rdp_accountant(adjacency)
    accountant.compose(RepeatAndSelectDpEvent(accounting.rdp_event(events, adjacency), trials.mean, trials.shape))
    return float(accountant.get_epsilon(delta))


def _mean(log_gamma: float, shape: float) -> float:
    """E[K] of the truncated negative binomial: eta (1 - gamma) / (gamma (1 - gamma^eta)), or its limit at eta = 0."""
    rest = -math.expm1(log_gamma)  # 1 - gamma
    if rest == 0:
        return 1.0
    if shape == 0:
        return rest * math.exp(-log_gamma) / -log_gamma
    return shape * rest * math.exp(-log_gamma) / -math.expm1(shape * log_gamma)
