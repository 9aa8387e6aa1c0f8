"""DP-FedLoRA: noise at the site, on A and on B of every low-rank adapter; W + (alpha / r) B A is the layer that is trained.

Claim. Unit: one site, all of its data; whatever its local steps were. In every round the site scales the update of each A to L2 norm
at most C_A, of each B to at most C_B, each matrix by itself, and adds N(0, (z C)^2) to every number of it, C its own bound, before
anything is sent. **Accounted jointly**: divided by its bound, each of the m matrices of the federation has norm at most 1, so the
whole update has norm at most sqrt(m), and noise of standard deviation z on every number. For two data sets of the site the whole
updates are at most 2 sqrt(m) apart (replace_one; sqrt(m) if one of them is a blank, zero_out), whatever the server sent, so T rounds
are one Gaussian mechanism of mu = 2 sqrt(m T) / z, against everybody: server, sites, readers of the model. Calibrating z for one
matrix alone, as if A and B were not of the same data, understates mu by sqrt(m). No amplification: the server knows whom it asked.
m is of public shapes, not of what a site sends.

Charged: one Gaussian event a round, of multiplier z / sqrt(m), to the site's own ledger, before its data are read; also where the
reply is then lost. Silent sites change nothing for the others; a round that is discarded stays charged.

**What averaging does to the product.** The server averages each name, so A and B by themselves, and the mean of products is not the
product of means: over K sites of weights 1/K, mean(B_k A_k) - mean(B) mean(A) = mean((B_k - mean B)(A_k - mean A)). Noise in both
gives (B + N_B)(A + N_A) - BA = B N_A + N_B A + N_B N_A. For B (p, r), A (r, q) and noises of standard deviations s_B, s_A these
have the expected squared Frobenius norms s_A^2 q |B|^2, s_B^2 p |A|^2, and p r q s_A^2 s_B^2 (``noise_of_product``): the last grows as
the fourth power of the noise. Where A is a public constant (``model.objective.trained: b``; Sun et al. 2024, arXiv:2403.12313), it is
not sent, the mean of the products is the product with the mean exactly, and N_B A is all that noise adds.

Source: Xu et al. 2025, arXiv:2509.09097 (abstract, and a review of the text). Differs: clipped and noised are updates (new minus
global), not the matrices; the loss is accounted over all matrices and rounds; the server averages factors, so that a reply and an ask
are as large as one adapter. The paper's server stacks the sites' noisy factors, so that its sum of B_k A_k has no gap; the terms of
noise are in each of them, and what is sent back grows with the number of sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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


@dataclass(frozen=True)
class FedLora:
    settings: settings.FedLora
    name: ClassVar[str] = "fed_lora"
    of_sum: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    def plan(self, public: Public) -> SiteUpdates:
        return update_plans.fed_lora(self.settings, len(public.sites), public.rounds, len(self.bounds(public)))

    def bounds(self, public: Public) -> dict[str, float]:
        """The bound of every matrix that is exchanged. Raises UsageError for what is no A and no B."""
        other = sorted(name for name in public.shapes if side_of(name) is None)
        if other or not public.shapes:
            raise UsageError(
                f"mechanism = fed_lora, trained = {', '.join(other[:3]) or 'nothing'} · bounds A and B of low-rank adapters, "
                "and nothing else",
                next="Set model.objective.kind: adapter, or federation.mechanism: {kind: update_level}.",
            )
        of = {"A": self.settings.max_a_norm, "B": self.settings.max_b_norm}
        return {name: of[side] for name in sorted(public.shapes) if (side := side_of(name)) is not None}

    def promise(self, public: Public) -> Promise:
        return Promise(
            unit="site",
            trains="free",
            trust="local: each site noises its adapter before anything is sent; nobody is trusted",
            at_site=self.plan(public),
            composition=f"{public.rounds} Gaussian mechanisms on the same data, one a round, each of {len(self.bounds(public))} matrices "
            "together; not amplified",
            dropouts="A silent site has spent what it charged; the epsilon of the others does not depend on it.",
        )

    def begin(self, public: Public) -> Part:
        return Part()

    def ask(self, memory: Part) -> dict[str, Json]:
        return {}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        import torch

        from sfumato.privacy.discrete import source_named

        plan, bounds = self.plan(public), self.bounds(public)
        own = {name: tuple(tensor.shape) for name, tensor in update.items()}
        whole = updates.shaped(updates.flat(update, own), own)
        unknown = sorted(set(own) - set(bounds))
        if unknown:
            raise UsageError(
                f"update[{unknown[0]!r}] · is no matrix of the federation", next="Build the same model everywhere."
            )
        # Each over its own bound, then clipped to 1: noise comes after, or it would be cut away with the signal.
        parts = [updates.clipped((whole[name] / bounds[name]).flatten(), 1.0) for name in sorted(own)]
        norm = plan.max_update_norm
        assert norm is not None  # SiteUpdates sees to it
        vector = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        noised = updates.noisy_sum(
            [vector],
            number=1,
            count=len(vector),
            std=plan.noise_multiplier * norm,
            bound=norm,
            source=source_named(self.settings.noise),
            chance=chance,
        )
        scaled = {name: tensor * bounds[name] for name, tensor in updates.shaped(noised, own).items()}
        return Part(tensors=updates.of_type(scaled, update))

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        return combine(received.updates), memory

    def in_words(self, public: Public) -> str:
        plan, of = self.plan(public), self.settings
        z = plan.noise_multiplier * (plan.max_update_norm or 0)
        return (
            f"Every site scales its update of each of {len(self.bounds(public))} low-rank matrices by itself to length "
            f"{of.max_a_norm:g} (A) or {of.max_b_norm:g} (B) at most, and adds noise of {z:.4g} times that to every number before "
            f"sending. Over all matrices and {plan.rounds} rounds together all data of a site are ({plan.epsilon():.4g}, "
            f"{plan.delta:g})-private ({plan.adjacency}) against everybody, the server too."
        )


def side_of(name: str) -> str | None:
    """ "A" or "B", by the name that ``peft`` gives a low-rank matrix; None for another parameter."""
    parts = name.split(".")
    return "A" if "lora_A" in parts else "B" if "lora_B" in parts else None


def noise_of_product(b: "Tensor", a: "Tensor", std_b: float, std_a: float) -> dict[str, float]:
    """Expected squared Frobenius norms of what noise in B (p, r) and A (r, q) adds to BA: B N_A, N_B A, N_B N_A."""
    (p, r), q = b.shape, a.shape[1]
    return {
        "B N_A": std_a**2 * q * float(b.double().square().sum()),
        "N_B A": std_b**2 * p * float(a.double().square().sum()),
        "N_B N_A": p * r * q * std_a**2 * std_b**2,
    }
