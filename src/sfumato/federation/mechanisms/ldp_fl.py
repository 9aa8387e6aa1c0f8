"""LDP-FL: every weight of an update is told as one of two values, by a coin that the weight biases.

Claim. Unit: one site, all of its data, against everybody. A weight w is cut to [-r, r], r public and of its tensor, and sent as +A or -A,
A = r (e^eps + 1) / (e^eps - 1), plus with probability (w (e^eps - 1) + r (e^eps + 1)) / (2 r (e^eps + 1)). That is w on average. At the
ends of the range the coin is randomised response, plus with probability e^eps / (e^eps + 1) or 1 / (e^eps + 1), and between
them a mixture of the two: so each weight, each round, is eps-private for any two weights.

*The whole update is not.* A site's data move all d weights at once, and the server sees d coins of one site: d eps a round, d T eps in
all (less at delta > 0, by composition: the plan's epsilon). The paper's eps per weight is for a reader to whom a trusted
shuffler hides which weights came from one site: each weight is sent by itself, at a random time, under no name. No party here
could be one: whoever carries the messages knows whose they are. With ``shuffled`` the server does it (``split_and_shuffled``)
before it combines, compares or keeps anything: who reads its state or its report afterwards finds no site's update, but the server
had them, and so had its SuperLink. So no epsilon is smaller for it, and none is claimed: d of the weights still depend on the
same data, and what is known of amplification by shuffling is of one message a site, not of d at once.

Range: r is per tensor; it follows the size of the noisy mean, which is post-processing. Coins: whole numbers of 2^53, with the
extremes rounded towards 1/2, so that no rounding passes e^eps.

Charged: d coins a round, one event, to the site's ledger. A silent site changes nothing for the others: each value is private by itself,
so means, medians and compression are post-processing.

Source: Sun, Qian & Chen 2020, arXiv:2007.15789, algorithm 2. Differs: updates are sent in place of weights, so the range is around 0; its
adaptive rule is not the paper's, which sets c and r of a layer from the weights that are there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as settings
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Combine, Promise, Received, updates
from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.privacy.site_updates import SiteUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random

RANGE = 1e3  # r stays within this factor of where it began
WIDER = 3.0  # r, in root mean squares of the mean update

_WHOLE = 2**53


@dataclass(frozen=True)
class LdpFl:
    settings: settings.LdpFl
    name: ClassVar[str] = "ldp_fl"
    of_sum: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    def plan(self, public: Public) -> SiteUpdates:
        updates.check_shapes(public)
        if self.settings.shuffled and len({public.weights[site] / public.rates[site] for site in public.sites}) > 1:
            raise UsageError(
                "shuffled = true · a number that may be anyone's has no weight of its own, and these sites have different ones",
                next="Set federation.weights: equal, and a selection that asks all alike.",
            )
        return update_plans.ldp_fl(self.settings, len(public.sites), public.rounds, public.dimension)

    def epsilon_per_weight(self, public: Public) -> float:
        one = self.plan(public).epsilon_per_weight
        assert one is not None  # of ldp_fl it is there
        return one

    def promise(self, public: Public) -> Promise:
        plan = self.plan(public)
        return Promise(
            unit="site",
            trains="free",
            trust="local: each site noises every number before anything is sent; nobody is trusted",
            at_site=plan,
            composition=f"{plan.weights_per_round:,} numbers in each of {plan.rounds} rounds: {plan.pure_epsilon():,.6g} in all "
            "at delta 0; a trusted shuffler, which there is none of here, is what the paper's figure per number needs"
            + (
                "; the server shuffles what it has received, which is counted as nothing"
                if self.settings.shuffled
                else ""
            ),
            dropouts="A silent site has spent what it charged; the epsilon of the others does not depend on it.",
        )

    def begin(self, public: Public) -> Part:
        updates.check_shapes(public)
        return Part(values={"radius": dict.fromkeys(sorted(public.shapes), self.settings.radius)})

    def ask(self, memory: Part) -> dict[str, Json]:
        return {"radius": dict(_radii(memory.values))}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        radii = _radii(told)
        missing = sorted(set(update) - set(radii))
        if missing:
            raise UsageError(
                f"radius · is not told for {missing[0]}",
                next="Ask again, with a radius for every tensor.",
                code="update_shape",
            )
        epsilon = self.epsilon_per_weight(public)
        sent = {name: told_as(tensor, radii[name], epsilon, chance) for name, tensor in sorted(update.items())}
        return Part(tensors=updates.of_type(sent, update))

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        sent = received.updates
        step = combine(split_and_shuffled(sent, chance) if self.settings.shuffled else sent)
        if not self.settings.adaptive_range:
            return step, memory
        epsilon = self.epsilon_per_weight(public)
        weights = {site: public.weights[site] / public.rates[site] for site in received.sites}  # of the mean
        radii = {
            name: self._next(radius, epsilon, step[name], [weights[s] for s in weights if name in received.updates[s]])
            if name in step
            else radius
            for name, radius in _radii(memory.values).items()
        }
        return step, replace(memory, values={**memory.values, "radius": radii})

    def _next(self, radius: float, epsilon: float, mean: "Tensor", weights: list[float]) -> float:
        """The next r of a tensor: three root mean squares of its mean update, the coins' variance taken off."""
        told = amplitude(radius, epsilon)
        share = math.fsum(w * w for w in weights) / math.fsum(weights) ** 2  # 1 / n for equal weights
        if share >= 1:  # one site's coins have the same size whatever they say
            return radius
        # a coin has variance A^2 - w^2: the square of the mean is w^2 (1 - share) + A^2 share on average
        signal = math.sqrt(max(0.0, (float(mean.double().square().mean()) - told**2 * share) / (1 - share)))
        wanted = min(max(WIDER * signal, radius / 2), radius * 2)
        return min(max(wanted, self.settings.radius / RANGE), self.settings.radius * RANGE)

    def in_words(self, public: Public) -> str:
        plan = self.plan(public)
        return (
            f"Every number of an update is sent as one of two values, with {self.epsilon_per_weight(public):.4g} for one number. "
            f"All data of a "
            f"site move all {plan.weights_per_round:,} of them in each of {plan.rounds} rounds, and "
            f"{'the server itself shuffles' if self.settings.shuffled else 'nobody shuffles'}: "
            f"{plan.pure_epsilon():,.6g} in "
            f"all at delta 0, ({plan.epsilon():,.6g}, {plan.delta:g}) by composition ({plan.adjacency})."
        )


def amplitude(radius: float, epsilon: float) -> float:
    """A = r (e^eps + 1) / (e^eps - 1)."""
    return radius / math.tanh(epsilon / 2)


def told_as(tensor: "Tensor", radius: float, epsilon: float, chance: "Random") -> "Tensor":
    """float64, of the same shape: +A or -A; what is not finite counts as zero.

    Guarantee: every number is epsilon-private for any two values of it, and its mean is the number, cut to [-r, r].
    """
    import torch

    w = torch.nan_to_num(tensor.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-radius, radius).flatten()
    plus = 0.5 + 0.5 * math.tanh(epsilon / 2) * (w / radius)  # of the sign +
    least = (
        math.ceil(_WHOLE / (math.exp(epsilon) + 1)) + 4
    )  # of 2^53: above 1 / (e^eps + 1), whatever exp was rounded to
    bound = (plus * _WHOLE).round().clamp(least, _WHOLE - least)
    coins = torch.from_numpy(chance.uniform(w.numel())) * _WHOLE  # whole numbers below 2^53
    return torch.where(coins < bound, 1.0, -1.0).mul(amplitude(radius, epsilon)).to(torch.float64).reshape(tensor.shape)


def split_and_shuffled(sent: Mapping[str, State], chance: "Random") -> "dict[str, dict[str, Tensor]]":
    """What a shuffler does: every number is taken by itself, and those of one place are given to the sites that hold it in random
    order, so that none says whose it was. Sums, means and medians of a place are unchanged.

    Args: sent: by site; a name has the same shape wherever it occurs.
    """
    import torch

    out: dict[str, dict[str, Tensor]] = {site: {} for site in sorted(sent)}
    for name in sorted({name for state in sent.values() for name in state}):
        holders = [site for site in out if name in sent[site]]
        stacked = torch.stack([sent[site][name].flatten() for site in holders])  # (n, numbers)
        order = torch.from_numpy(chance.uniform(stacked.numel())).reshape(stacked.shape).argsort(dim=0)
        for site, row in zip(holders, stacked.gather(0, order), strict=True):
            out[site][name] = row.reshape(sent[site][name].shape)
    return out


def _radii(values: Mapping[str, Json]) -> dict[str, float]:
    radii = values.get("radius")
    if not isinstance(radii, dict):
        raise UsageError("radius · is not told", next="Ask again, with a radius for every tensor.")
    out = {}
    for name, radius in radii.items():
        value = float(radius) if isinstance(radius, int | float) and not isinstance(radius, bool) else float("nan")
        checks.positive(radius=value, next="Ask again: every radius must be a number above 0.")
        out[name] = value
    return out
