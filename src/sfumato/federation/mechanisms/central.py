"""Noise at the server, on the sum of clipped updates: the server is trusted, the readers of the model are not.

Claim. Unit: one site, all of its data. In every round each site is asked with probability q_k; the server scales each update that
arrives to L2 norm at most S (again, whatever the site did), weights it by a public w_k, adds up, adds N(0, (z S max w)^2) to every
coordinate of every parameter, and divides by sum q_k w_k over the holders of that parameter: constants all, that neither who was
drawn nor who replied changes. A site moves the sum by w_k S at most, so a round is a Gaussian mechanism of noise multiplier z, on a
Poisson sample at rate max q_k where the draw is random and *stays secret*: a list of the sites of a round, published, takes the
amplification away. With a fixed choice of sites nothing is amplified.

Adaptive clip (Andrew et al. 2021, arXiv:1905.03871): each reply counts 1/2 where its update was no longer than S, else -1/2; that sum
with N(0, b^2) moves S to the quantile (``privacy.adaptive`` has the formulas). Sum and count together have the noise multiplier that
is charged, so the sum's own is z = (sigma^-2 - (2 b)^-2)^(-1/2); sigma >= 2 b is refused. Ends: b = m / 20 for m expected sites is
refused for four hospitals; give ``count_noise``.

Charged: one event a round, to the server's ledger, before a site is asked. A site that is silent, late or broken adds nothing;
the noise and the denominator stay, so the step is shorter and not less private. A round that is discarded stays charged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sfumato import checks
from sfumato.federation import mechanism_settings as settings
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Combine, Promise, Received, updates
from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.privacy.adaptive import AdaptiveClip
from sfumato.privacy.settings import NoiseSource
from sfumato.privacy.site_updates import SiteUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random


@dataclass(frozen=True)
class Central:
    settings: settings.Central
    name: ClassVar[str] = "central"
    of_sum: ClassVar[bool] = False  # every update is clipped at the server, which must see it
    robust: ClassVar[bool] = False

    def plan(self, public: Public) -> SiteUpdates:
        return update_plans.central(self.settings, len(public.sites), public.rounds, public.largest_rate)

    def adaptive(self) -> AdaptiveClip:
        return AdaptiveClip(
            quantile=self.settings.quantile,
            learning_rate=self.settings.clip_learning_rate,
            count_noise=self.settings.count_noise,
        )

    def sum_noise_multiplier(self, public: Public) -> float:
        """z, of the sum. Raises PrivacyRefused where the count alone costs as much as is planned."""
        charged = self.plan(public).noise_multiplier
        if self.settings.clipping == "fixed":
            return charged
        return self.adaptive().gradient_noise_multiplier(charged, public.expected_sites)

    def promise(self, public: Public) -> Promise:
        self.sum_noise_multiplier(public)  # or it refuses
        updates.check_shapes(public)
        plan = self.plan(public)
        amplified = (
            "not amplified: the choice of sites is not random"
            if plan.sampling_rate == 1
            else f"amplified by drawing each site with probability {plan.sampling_rate:g} at most, as long as who was drawn stays secret"
        )
        return Promise(
            unit="site",
            trains="free",
            trust="central: the server sees every update and adds the noise; it is trusted, readers of the model are not",
            at_server=plan,
            composition=f"{public.rounds} Gaussian mechanisms, one a round; {amplified}",
            dropouts="A silent site adds nothing to the sum; noise and denominator stay as planned.",
        )

    def begin(self, public: Public) -> Part:
        return Part(values={"max_update_norm": self.settings.max_update_norm})

    def ask(self, memory: Part) -> dict[str, Json]:
        return {"max_update_norm": bound_of(memory.values)}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        bound = bound_of(told)
        own = {name: tuple(tensor.shape) for name, tensor in update.items()}
        vector = updates.flat(update, own)
        values: dict[str, Json] = {}
        if self.settings.clipping == "adaptive":
            values["short"] = updates.norm(vector) <= bound
        sent = updates.shaped(updates.clipped(vector, bound), own)
        return Part(tensors=updates.of_type(sent, update), values=values)

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        from sfumato.privacy.discrete import source_named

        bound = bound_of(memory.values)
        largest = public.largest_weight
        clipped = (  # one at a time: as float64 a thousand of them need their room
            updates.clipped(updates.flat(received.updates[site], public.shapes), bound) * public.weights[site]
            for site in received.sites
        )
        total = updates.noisy_sum(
            clipped,
            number=len(received.sites),
            count=public.dimension,
            std=self.sum_noise_multiplier(public) * bound * largest,
            bound=bound * largest,
            source=source_named(self.settings.noise),
            chance=chance,
        )
        step = {
            name: tensor / public.expected_weight(name) for name, tensor in updates.shaped(total, public.shapes).items()
        }
        like = {name: tensor for update in received.updates.values() for name, tensor in update.items()}
        return updates.of_type(step, like), self._next(received, public, memory, chance)

    def _next(self, received: Received, public: Public, memory: Part, chance: "Random") -> Part:
        if self.settings.clipping == "fixed":
            return memory
        clip, expected = self.adaptive(), public.expected_sites
        noisy = noisy_count(
            [received.values.get(site, {}).get("short") is True for site in received.sites],
            std=clip.count_std(self.plan(public).noise_multiplier, expected),
            noise=self.settings.noise,
            chance=chance,
        )
        bound = clip.next_bound(bound_of(memory.values), noisy, expected, self.settings.max_update_norm)
        return replace(memory, values={**memory.values, "max_update_norm": bound})

    def in_words(self, public: Public) -> str:
        plan = self.plan(public)
        clip = (
            f"length {self.settings.max_update_norm:g} at most"
            if self.settings.clipping == "fixed"
            else f"a length that follows the {self.settings.quantile:g} quantile of the updates' and begins at "
            f"{self.settings.max_update_norm:g}"
        )
        return (
            f"The server scales every update to {clip}, adds up by public weights, adds noise of {self.sum_noise_multiplier(public):.4g} "
            f"times the largest part that a site can have, and divides by a public constant. Over {plan.rounds} rounds all data "
            f"of a site are "
            f"({plan.epsilon():.4g}, {plan.delta:g})-private ({plan.adjacency}) against readers of the model; the server is trusted."
        )


def bound_of(values: Mapping[str, Json]) -> float:
    """S, from what the server told or kept."""
    bound = values.get("max_update_norm")
    value = float(bound) if isinstance(bound, int | float) and not isinstance(bound, bool) else float("nan")
    checks.positive(max_update_norm=value, next="Ask again: the server must tell its clipping bound.")
    return value


def noisy_count(short: list[bool], *, std: float, noise: NoiseSource, chance: "Random") -> float:
    """The sum over the replies of 1[short] - 1/2, plus N(0, std^2); one reply moves it by 1/2."""
    import torch

    from sfumato.privacy.discrete import source_named

    parts = [torch.tensor([0.5 if one else -0.5], dtype=torch.float64) for one in short]
    return float(
        updates.noisy_sum(
            parts, number=len(parts), count=1, std=std, bound=0.5, source=source_named(noise), chance=chance
        )
    )
