"""A multimodal variational autoencoder: one latent for all modalities, so that any subset of them conditions any other.

Each modality m has an encoder, a Gaussian expert q_m(z | x_m), and a decoder p_m(x_m | z). Over a subset S of what a record
has, the experts make one posterior q_S: their product with the prior (Wu & Goodman 2018, MVAE, arXiv:1802.05335, section 2.2),
or their mixture (Shi et al. 2019, MMVAE, arXiv:1911.03393, eq. 2), or the mixture over all subsets of the products within each
(Sutter et al. 2021, MoPoE, arXiv:2105.02470, eq. 5). A record's loss is the mean over its subsets of

    - sum_m w_m log p_m(x_m | z) + beta (log q(z) - log p(z)),     z ~ q_S:

- product: the subsets are all that the record has, and each modality alone; what is reconstructed is what is in the subset
  (MVAE, eq. 5, without its random subsets);
- mixture: each modality alone; everything that is there is reconstructed; q is the mixture, at z (MMVAE, eq. 3, one sample);
- mixture of products: all subsets; everything is reconstructed; the mean of the products' divergences (MoPoE, eq. 6, a bound).

It is one record's ELBO: nothing is averaged over a batch, and no statistic of one is used. A modality that is missing leaves
the product, and is not reconstructed. Continuous entries are Gaussian around the decoder's output with their codec's public
scale; tokens are categorical. Of texts that are a condition only, what the codec made of them is reconstructed all the same, so
that the latent holds it: terms are three-valued, words are a draw from the vocabulary's buckets, sentence vectors are Gaussian.

Differs: MVAE's sum over subsets is a mean here, which clipping makes the same.

Shapes: R records, S subsets, K draws, L latent entries; P = S K passes through the decoders; O a decoder's output.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.families import likelihoods
from sfumato.models.families.likelihoods import Categorical, Gaussian, Inputs, Likelihood
from sfumato.models.generative import Direction, Generative, every_direction
from sfumato.models.settings import Mlp, ModelSettings, Sampling, Variational
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Batch, Modality, Record

WIDEST = 3.0  # log variances lie within +- this: under noise an encoder would sometimes say anything


class Encoder(nn.Module):
    """A modality's expert: encoded records (R, ...) -> mean and log variance, (R, L) each."""

    def __init__(self, inputs: Inputs, latent: int, mlp: Mlp) -> None:
        super().__init__()
        self.inputs = inputs
        self.stack = inputs.stack(2 * latent, mlp)

    def forward(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        told = self.inputs(encoded).to(self.stack.inward.weight.dtype)
        mean, spread = self.stack(told).chunk(2, dim=-1)
        return mean, WIDEST * torch.tanh(spread / WIDEST)


class VariationalModel(Generative):
    """Samples are the decoders' means (or likeliest tokens) at a draw of the posterior of what is told; of the prior where
    nothing is."""

    family = "variational"

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        assert isinstance(settings.objective, Variational)  # families.build has matched it
        self.objective = settings.objective
        mlp = settings.backbone
        if not isinstance(mlp, Mlp):
            raise UsageError(
                f"model.backbone.kind = {mlp.kind} · the networks of a variational model are fully connected",
                next="Set model.backbone: {kind: mlp}.",
            )
        if not self.codecs:
            raise UsageError(
                "model · has no modality", next="Set at least one of model.text, model.image, model.audio."
            )
        self.names: tuple[Modality, ...] = tuple(name for name in MODALITIES if name in self.codecs)
        weights: dict[Modality, float] = {
            "text": self.objective.text_weight,
            "image": self.objective.image_weight,
            "audio": self.objective.audio_weight,
        }
        self.weights: dict[Modality, float] = {name: weights[name] for name in self.names if weights[name] > 0}
        if not self.weights:
            raise UsageError("weights = 0 · nothing would be reconstructed", next="Raise model.objective.image_weight.")
        latent = self.objective.latent
        self.encoders = nn.ModuleDict(
            {name: Encoder(likelihoods.inputs_of(self.codecs[name]), latent, mlp) for name in self.names}
        )
        self.decoders = nn.ModuleDict({n: likelihoods.of(self.codecs[n], latent, mlp) for n in self.weights})
        self.subsets = _subsets(len(self.names), self.objective.experts)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return every_direction(self.codecs, list(self.weights))

    # -- the posterior --

    def experts(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Means and log variances of every modality's expert, (R, M, L) each, whether it is there or not."""
        both = [self.encoders[name](encoded[name]) for name in self.names]
        return torch.stack([mean for mean, _ in both], 1), torch.stack([spread for _, spread in both], 1)

    def product(self, means: Tensor, spreads: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the product of the chosen experts with the prior.

        Args: means, spreads (R, M, L); chosen (R, S, M) of 0 and 1. Returns: (R, S, L) each.
        """
        precision = (-spreads).exp()
        total = 1.0 + chosen @ precision
        return (chosen @ (precision * means)) / total, -total.log()

    def _chosen(self, present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(R, S, M) which experts take part in each subset; (R, S) whether it counts: each subset of a record once."""
        there = torch.stack([present[name] for name in self.names], 1)  # (R, M)
        subsets = self.subsets.to(there.device)
        if self.objective.experts == "product":  # the first is all that there is, whatever that is
            chosen = subsets[None] & there[:, None]
            counts = chosen.any(2) & (subsets.sum(1) == 1) & (there.sum(1, keepdim=True) > 1)
            counts[:, 0] = there.any(1)
        else:
            chosen = subsets[None].expand(len(there), -1, -1)
            counts = (chosen <= there[:, None]).all(2)
        return chosen, counts

    # -- the objective --

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,): minus each record's evidence bound, up to a constant."""
        means, spreads = self.experts(batch.tensors)
        chosen, counts = self._chosen(batch.present)
        rows, subsets, _ = chosen.shape
        if self.objective.experts == "mixture":  # one expert each, without the prior
            mean, spread = chosen.to(means) @ means, chosen.to(means) @ spreads
        else:
            mean, spread = self.product(means, spreads, chosen.to(means))
        shape = (rows, draws or self.objective.draws, subsets, self.objective.latent)
        noise = torch.randn(shape) if generator is None else torch.randn(shape, generator=generator)
        z = mean[:, None] + (spread / 2).exp()[:, None] * noise.to(mean)  # (R, K, S, L)
        if self.objective.experts == "mixture":
            there = torch.stack([batch.present[name] for name in self.names], 1)
            divergence = _log_mixture(z, means, spreads, there) + z.square().sum(-1) / 2  # (R, K, S)
        else:
            divergence = 0.5 * (mean.square() + spread.exp() - spread - 1).sum(-1)[:, None]
        losses = self.objective.beta * divergence.expand(shape[:3])
        for number, name in enumerate(self.names):
            if name not in self.weights:
                continue
            lost = self._decoder(name).lost(z.flatten(1, 2), batch.tensors[name]).unflatten(1, shape[1:3])  # (R, K, S)
            if self.objective.experts == "product":
                told = chosen[:, :, number]
            else:
                told = batch.present[name][:, None].expand(rows, subsets)
            losses = losses + self.weights[name] * lost * told[:, None]
        counted = counts.to(losses)
        return (losses.mean(1) * counted).sum(1) / counted.sum(1).clamp(min=1.0)

    # -- samples --

    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        named = {str(name): tensor for name, tensor in encoded.items()}
        mean, spread = self.posterior(named, {str(n): there for n, there in present.items()}, generator)
        z = mean + (spread / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        made: dict[Modality, Tensor] = {}
        for name in wanted:
            decoder = self._decoder(name)
            assert isinstance(decoder, Gaussian | Categorical)  # or it is in no direction
            made[name] = decoder.likeliest(z[:, None])[:, 0]
        return made

    def _decoder(self, name: str) -> Likelihood:
        decoder = self.decoders[name]
        assert isinstance(decoder, Likelihood)
        return decoder

    def posterior(
        self, encoded: Mapping[str, Tensor], present: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, told what is present, (R, L) each.

        Of a mixture: of one expert, drawn by ``generator``; without it, of the first that is there.
        """
        means, spreads = self.experts(encoded)
        there = torch.stack([present[name] for name in self.names], 1)  # (R, M)
        if self.objective.experts == "mixture":
            lots = there.to(means)
            if generator is not None:
                lots = lots * (torch.rand(there.shape, generator=generator).to(means) + 1e-6)
            one = (
                nn.functional.one_hot(lots.argmax(1), len(self.names)).to(means)[:, None] * there.any(1)[:, None, None]
            )
            return (one @ means)[:, 0], (one @ spreads)[:, 0]  # of none: mean 0, log variance 0
        mean, spread = self.product(means, spreads, there.to(means)[:, None])
        return mean[:, 0], spread[:, 0]

    @torch.no_grad()
    def embed(self, records: Sequence[Record], modality: Modality) -> Tensor:
        """The latent of each record as this modality alone tells it, (R, L) of unit length: near to that of its partner."""
        encoded, present = self._encoded(records)
        there = {str(name): present[name] & (name == modality) for name in present}
        mean, _ = self.posterior({str(name): tensor for name, tensor in encoded.items()}, there)
        return nn.functional.normalize(mean, dim=1)

    def parts(self) -> dict[str, nn.Module]:
        encoders = {f"{name}_encoder": self.encoders[name] for name in self.names}
        return {**encoders, **{f"{name}_decoder": self.decoders[name] for name in self.weights}}


def _subsets(modalities: int, experts: str) -> Tensor:
    """(S, M) bool."""
    singles = [[i == j for j in range(modalities)] for i in range(modalities)]
    whole = [[True] * modalities]
    match experts:
        case "product":
            chosen = whole + (singles if modalities > 1 else [])
        case "mixture":
            chosen = singles
        case _:
            every = [c for size in range(1, modalities + 1) for c in combinations(range(modalities), size)]
            chosen = [[i in c for i in range(modalities)] for c in every]
    return torch.tensor(chosen)


def _log_mixture(z: Tensor, means: Tensor, spreads: Tensor, there: Tensor) -> Tensor:
    """log of the equal mixture of the experts that are there, up to the constant that the prior has too.

    Args: z (R, K, S, L); means, spreads (R, M, L); there (R, M). Returns: (R, K, S); 0 where none is there.
    """
    away = z[:, :, :, None] - means[:, None, None]  # (R, K, S, M, L)
    spread = spreads[:, None, None]
    each = -0.5 * (away.square() * (-spread).exp() + spread).sum(-1)
    none = ~there.any(1, keepdim=True)
    each = each.masked_fill(~(there | none)[:, None, None], -torch.inf)
    count = there.sum(1).clamp(min=1).to(z).log()
    return torch.where(none[:, :, None], 0.0, each.logsumexp(-1) - count[:, None, None])
