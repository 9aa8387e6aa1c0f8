"""Noise at the site, on its whole update: the server sees nothing that was not noised.

Claim. Unit: one site, all of its data; whatever its local steps were. In every round the site scales its update to L2 norm at most
S over all tensors together and adds N(0, (sigma S)^2) to every coordinate, before anything is sent. For two data sets of the site the
clipped updates are at most 2 S apart (replace_one; S if one of them is a blank, zero_out), whatever the server sent and whatever was
sent before, so T rounds are a Gaussian mechanism of mu = 2 sqrt(T) / sigma, against everybody: server, sites, readers of the model.
No amplification: the server knows whom it asked. Means, medians, compression afterwards are post-processing.

Charged: one Gaussian event a round, to the site's own ledger, before its data are read; also where the reply is then lost.
Silent sites change nothing for the others; a round that is discarded stays charged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sfumato.federation import mechanism_settings as settings
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Combine, Promise, Received, updates
from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.privacy.settings import NoiseSource
from sfumato.privacy.site_updates import SiteUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random


@dataclass(frozen=True)
class UpdateLevel:
    settings: settings.UpdateLevel
    name: ClassVar[str] = "update_level"
    of_sum: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    def plan(self, public: Public) -> SiteUpdates:
        return update_plans.update_level(self.settings, len(public.sites), public.rounds)

    def promise(self, public: Public) -> Promise:
        return Promise(
            unit="site",
            trains="free",
            trust="local: each site noises its update before anything is sent; nobody is trusted",
            at_site=self.plan(public),
            composition=f"{public.rounds} Gaussian mechanisms on the same data, one a round; not amplified",
            dropouts="A silent site has spent what it charged; the epsilon of the others does not depend on it.",
        )

    def begin(self, public: Public) -> Part:
        return Part()

    def ask(self, memory: Part) -> dict[str, Json]:
        return {}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        plan = self.plan(public)
        own = {name: tuple(tensor.shape) for name, tensor in update.items()}
        private = privatised(updates.flat(update, own), plan, self.settings.noise, chance)
        return Part(tensors=updates.of_type(updates.shaped(private, own), update))

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        return combine(received.updates), memory

    def in_words(self, public: Public) -> str:
        plan = self.plan(public)
        return (
            f"Every site scales its update to length {plan.max_update_norm:g} at most and adds noise of standard deviation "
            f"{plan.noise_multiplier * (plan.max_update_norm or 0):.4g} to every number before sending. Over {plan.rounds} rounds all data "
            f"of a site are ({plan.epsilon():.4g}, {plan.delta:g})-private ({plan.adjacency}) against everybody, the server too."
        )


def privatised(vector: "Tensor", plan: SiteUpdates, noise: NoiseSource, chance: "Random") -> "Tensor":
    """(d,) float64: clipped, then noised, in this order: noise before the clip would be cut away with the signal."""
    from sfumato.privacy.discrete import source_named

    bound = plan.max_update_norm
    assert bound is not None  # SiteUpdates sees to it
    return updates.noisy_sum(
        [updates.clipped(vector, bound)],
        number=1,
        count=len(vector),
        std=plan.noise_multiplier * bound,
        bound=bound,
        source=source_named(noise),
        chance=chance,
    )
