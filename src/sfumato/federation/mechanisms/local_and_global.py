"""Noise at the site and at the server: two guarantees, of one unit, against two different readers.

Claim. Unit of both: one site, all of its data; bound S on its update, kept by the site itself.

1. *Against everybody, the server included* (local): the site adds N(0, (sigma S)^2) to its clipped update before sending. T rounds are
   a Gaussian mechanism of noise multiplier sigma each. What the server does afterwards is post-processing, not composition: its
   noise neither adds to this epsilon nor is charged for it.
2. *Against readers of the model* (central; the server trusted): the server adds N(0, (z S max w)^2) to the weighted sum. What a reader
   learns of site j has w_j S of signal, and its own noise and the server's together: variance w_j^2 sigma^2 S^2 + z^2 S^2 max w^2, so
   the noise multiplier is sqrt(sigma^2 + z^2) at least. The noise of other sites is not counted: they may collude.

Not amplified, even where sites are drawn at random: a site's own noise, which no clip follows, shows that it was there, so the sum with
it and without are no longer neighbours by its clipped update alone. Neighbours are replace_one or zero_out, whose noise is there on both
sides; the joint variance needs it.

The update is sent in float64 and never compressed: rounding between the two noises would not be the sum of two Gaussians. (The sum is
rounded to the server's grid of 2^-30 standard deviations.) Charged: (1) to each site's ledger, (2) to the server's, before the round.
The denominator is public; a silent site takes its part and its own noise away, the server's noise stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sfumato.federation import mechanism_settings as settings
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Combine, Promise, Received, updates
from sfumato.federation.mechanisms.update_level import privatised
from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.privacy.site_updates import SiteUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random


@dataclass(frozen=True)
class LocalAndGlobal:
    settings: settings.LocalAndGlobal
    name: ClassVar[str] = "local_and_global"
    of_sum: ClassVar[bool] = False  # what a sum of float64 could be aggregated securely is not offered
    robust: ClassVar[bool] = False

    def plan(self, public: Public) -> SiteUpdates:
        """Against everybody: at the site."""
        return update_plans.local_and_global(self.settings, len(public.sites), public.rounds)[0]

    def plan_of_readers(self, public: Public) -> SiteUpdates:
        """Against readers of the model: at the server, of the joint variance."""
        return update_plans.local_and_global(self.settings, len(public.sites), public.rounds)[1]

    def server_noise_multiplier(self, public: Public) -> float:
        """z, that makes the site's noise up to what readers are promised."""
        both, site = (plan.noise_multiplier for plan in (self.plan_of_readers(public), self.plan(public)))
        given = self.settings.server_noise_multiplier
        return math.sqrt(both**2 - site**2) if given is None else given

    def promise(self, public: Public) -> Promise:
        updates.check_shapes(public)
        return Promise(
            unit="site",
            trains="free",
            trust="local against the server, by the site's noise; central against readers of the model, by both noises, the server trusted",
            at_site=self.plan(public),
            at_server=self.plan_of_readers(public),
            composition=f"{public.rounds} Gaussian mechanisms for each of the two readers; the two are not composed, and not amplified",
            dropouts="A silent site takes away its part and its own noise; the server's noise and the denominator stay as planned.",
        )

    def begin(self, public: Public) -> Part:
        return Part()

    def ask(self, memory: Part) -> dict[str, Json]:
        return {}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        own = {name: tuple(tensor.shape) for name, tensor in update.items()}
        private = privatised(updates.flat(update, own), self.plan(public), self.settings.noise, chance)
        return Part(tensors=updates.shaped(private, own))

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        from sfumato.privacy.discrete import source_named

        bound = self.settings.max_update_norm * public.largest_weight
        total = updates.noisy_sum(
            (
                updates.finite(updates.flat(received.updates[site], public.shapes)) * public.weights[site]
                for site in received.sites
            ),
            number=len(received.sites),
            count=public.dimension,
            std=self.server_noise_multiplier(public) * bound,
            bound=bound,
            source=source_named(self.settings.noise),
            chance=chance,
        )
        step = {
            name: tensor / public.expected_weight(name) for name, tensor in updates.shaped(total, public.shapes).items()
        }
        return updates.of_type(step, {}), memory

    def in_words(self, public: Public) -> str:
        site, readers = self.plan(public), self.plan_of_readers(public)
        return (
            f"All data of a site, over {site.rounds} rounds ({site.adjacency}): ({site.epsilon():.4g}, {site.delta:g})-private against "
            f"everybody, the server too, by the noise that the site adds to its update of length {site.max_update_norm:g} at most; "
            f"({readers.epsilon():.4g}, {readers.delta:g})-private against readers of the model, if the server adds its noise too. "
            "Two readers, not a composition."
        )
