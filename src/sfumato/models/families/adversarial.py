"""A conditional generator against a private discriminator (Goodfellow et al. 2014, arXiv:1406.2661).

What sees what, and what each network's privacy is:

- *The discriminator* D(x | text) is trained on private records, by the engine: DP-SGD. A record's loss is that of its own
  picture or sound being taken for real, and of what the generator makes for its own text being taken for made. It holds this
  record and chance, and no other record. D is private as the plan says, stays in the checkpoints, and is not released.
- *The generator* G(text, noise) is made of frozen parameters, which no engine trains. After every ``discriminator_steps``
  steps it takes a step of Adam of its own, from D's weights, from texts of public records and from chance that is a function of
  the step's number alone. No private record, text, batch size or random state reaches it: it is post-processing of D, at no
  cost. Its weights, and their moving average, are what is sampled and released.

Many discriminator steps for each of the generator's, and large batches, are what private adversarial training lives on (Bie,
Kamath & Zhang 2023, arXiv:2302.02936): noise weakens D, and a G that runs ahead of it learns nothing.

There is no batch norm, and no gradient penalty: the engine's records do not go backward twice. A "wasserstein" D is kept
Lipschitz by clipping its weights after each step (Arjovsky et al. 2017, arXiv:1701.07875), a function of the weights alone.
The text enters D by its inner product with what D sees (Miyato & Koyama 2018, arXiv:1802.05637).

Differs from Bie et al.: fully connected; the fakes of a record's loss are of its own text.

Shapes: R records, K fakes of each, D numbers of all continuous modalities side by side, F of a text, Z of noise, P public texts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.errors import UsageError
from sfumato.models.backbones.mlp import Stack, normalised
from sfumato.models.families import likelihoods
from sfumato.models.families.likelihoods import Inputs
from sfumato.models.generative import Direction, Generative, Origin
from sfumato.models.settings import Adversarial, Mlp, ModelSettings, Sampling
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Batch, Modality, Record

BETAS, EPS = (0.5, 0.99), 1e-8  # of the generator's Adam


class Discriminator(nn.Module):
    """(R, K, D) numbers and (R, F) texts -> (R, K): above 0 for what looks real."""

    def __init__(self, numbers: int, texts: int, mlp: Mlp) -> None:
        super().__init__()
        self.inward = nn.Linear(numbers, mlp.width)
        self.layers = nn.ModuleList(nn.Linear(mlp.width, mlp.width) for _ in range(mlp.depth))
        self.head = nn.Linear(mlp.width, 1)
        self.told = nn.Linear(texts, mlp.width, bias=False) if texts else None

    def forward(self, numbers: Tensor, texts: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.inward(numbers))
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(normalised(hidden)))
        hidden = normalised(hidden)
        score = self.head(hidden)[..., 0]
        if self.told is not None:
            score = score + (hidden * self.told(texts)[:, None]).sum(-1) / hidden.shape[-1] ** 0.5
        return score


class AdversarialModel(Generative):
    """``discriminator`` is trained by the engine, ``generator`` by ``after_step``."""

    family = "adversarial"
    needs_public = True
    first: Tensor
    second: Tensor
    taken: Tensor

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        assert isinstance(settings.objective, Adversarial)  # families.build has matched it
        self.objective = settings.objective
        self.made: tuple[Modality, ...] = tuple(
            name for name in MODALITIES if name in self.codecs and self.codecs[name].kind == "continuous"
        )
        others = [name for name in self.codecs if name not in self.made and name != "text"]
        if not self.made or others or not isinstance(settings.backbone, Mlp):
            raise UsageError(
                f"model: {', '.join([*self.made, *others]) or 'nothing'} · an adversarial model makes continuous pictures and "
                "sounds, with model.backbone.kind: mlp",
                next="Set model.image: {kind: pixels} or {kind: cosine}, and model.backbone: {kind: mlp}.",
            )
        scales = [self.codecs[name].scale.flatten() for name in self.made]
        self.scale, self.sizes = torch.cat(scales), [len(scale) for scale in scales]
        self.texts: Inputs | None = None
        if "text" in self.codecs:
            if self.codecs["text"].kind != "features":
                raise UsageError(
                    f"model.text.kind = {settings.text and settings.text.kind} · an adversarial model is told texts as features",
                    next="Set model.text: {kind: terms}, {kind: hashed_words} or {kind: frozen_sentence}.",
                )
            self.texts = likelihoods.inputs_of(self.codecs["text"])
        width = self.texts.width if self.texts is not None else 0
        self.discriminator = Discriminator(len(self.scale), width, settings.backbone)
        asked = self.objective.generator
        self.generator = Stack(width + self.objective.noise, len(self.scale), width=asked.width, depth=asked.depth)
        self.generator.requires_grad_(False)  # no engine, and no optimizer of the loop, trains it
        count = sum(p.numel() for p in self.generator.parameters())
        self.register_buffer("first", torch.zeros(count))  # of Adam, beside the weights in every checkpoint
        self.register_buffer("second", torch.zeros(count))
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self._public: Tensor | None = None if self.texts is not None else torch.zeros(1, 0)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return (Direction(("text",) if self.texts is not None else (), self.made),)

    def parts(self) -> dict[str, nn.Module]:
        """The generator: the discriminator does not leave the run."""
        return {"generator": self.generator}

    def origin(self, part: str) -> Origin:
        return "released"

    def averaged(self) -> dict[str, nn.Parameter]:
        return {f"generator.{name}": parameter for name, parameter in self.generator.named_parameters()}

    def boundary(self) -> list[str]:
        told = "texts of public units" if self.texts is not None else "random numbers"
        return [
            "Trained on private records, by DP-SGD: the discriminator. It stays in the run and is not in the model.",
            f"Post-processing: the generator, which is the model. Each of its steps is computed from the discriminator, from {told} "
            "and from chance that does not depend on the records; no private record reaches it.",
            *(
                ["Declared public: the texts of half of the public units, which the generator is trained on."]
                if self.texts is not None
                else []
            ),
        ]

    # -- the discriminator: private records --

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,): the discriminator's loss on each record and on K fakes for the record's own text."""
        real, there = self._numbers(batch)
        told = self._told(batch.tensors, batch.present)
        shape = (batch.num_rows, draws or self.objective.fakes, self.objective.noise)
        noise = torch.randn(shape) if generator is None else torch.randn(shape, generator=generator)
        with torch.no_grad():
            fake = self.generator(_beside(told, noise.to(real))) * there[:, None]
        scores = self.discriminator(torch.cat([real[:, None], fake], 1), told)
        of_real, of_fake = scores[:, 0], scores[:, 1:]
        match self.objective.loss:
            case "logistic":
                lost = nn.functional.softplus(-of_real) + nn.functional.softplus(of_fake).mean(1)
            case "hinge":
                lost = nn.functional.relu(1 - of_real) + nn.functional.relu(1 + of_fake).mean(1)
            case "wasserstein":
                lost = of_fake.mean(1) - of_real
        return lost * there.any(1)

    def row_losses(self, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
        """(R,): how far the nearest of ``draws`` samples for a record's text is from it, in scales, squared: what an attacker
        can see, who has the generator and not the discriminator (Chen et al. 2020, GAN-Leaks, arXiv:1909.03935)."""
        real, there = self._numbers(batch)
        told = self._told(batch.tensors, batch.present)
        nearest = real.new_full((batch.num_rows,), torch.inf)
        for _ in range(draws):
            noise = torch.randn(batch.num_rows, 1, self.objective.noise, generator=generator)
            away = ((self.generator(_beside(told, noise.to(real)))[:, 0] - real) * there).square().sum(1)
            nearest = torch.minimum(nearest, away / there.sum(1).clamp(min=1))
        return nearest

    def _numbers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(R, D) in scales, 0 where a modality is missing; (R, D) 1 where it is there."""
        real = torch.cat([batch.tensors[name].flatten(1) for name in self.made], 1)
        there = [batch.present[n][:, None].expand(-1, size) for n, size in zip(self.made, self.sizes, strict=True)]
        mask = torch.cat(there, 1).to(real)
        return real / self.scale.to(real) * mask, mask

    def _told(self, encoded: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """(R, F); 0 where a text is missing, no column where there are no texts."""
        weight = self.discriminator.inward.weight
        if self.texts is None:
            return weight.new_zeros(len(encoded[self.made[0]]), 0)
        return self.texts(encoded["text"]).to(weight.dtype) * present["text"][:, None]

    # -- the generator: public texts --

    @torch.no_grad()
    def tell_public(self, records: Sequence[Record]) -> None:
        """Takes the records' texts, and nothing else of them."""
        if self.texts is not None:
            encoded, present = self.codecs["text"].encode(records)
            self._public = self.texts(encoded)[present].to(self.scale)

    def after_step(self, step: int) -> None:
        if self.objective.weight_bound is not None:
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-self.objective.weight_bound, self.objective.weight_bound)
        if step % self.objective.discriminator_steps == 0:
            chance = torch.Generator().manual_seed(step)
            for _ in range(self.objective.generator_updates):
                self._update(chance)

    def _update(self, chance: torch.Generator) -> None:
        if self._public is None or not len(self._public):
            raise UsageError(
                "public texts = none · the generator learns for public texts, and never sees private ones",
                next="Set data.public_units, or model.text: null; in a loop of your own, call tell_public(records) before it.",
            )
        rows = self.objective.generator_batch_size
        told = self._public[torch.randint(len(self._public), (rows,), generator=chance)]
        noise = torch.randn(rows, 1, self.objective.noise, generator=chance)
        weights = {name: p.detach().requires_grad_() for name, p in self.generator.named_parameters()}
        with torch.enable_grad():
            fake: Tensor = functional_call(self.generator, weights, (_beside(told, noise),))
            scores = self.discriminator(fake, told)
            lost = nn.functional.softplus(-scores) if self.objective.loss == "logistic" else -scores
            gradients = torch.autograd.grad(lost.mean(), list(weights.values()))
        self._adam(torch.cat([gradient.flatten() for gradient in gradients]))

    @torch.no_grad()
    def _adam(self, gradient: Tensor) -> None:
        """Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1."""
        self.taken += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        taken = int(self.taken)
        size = (self.second / (1 - BETAS[1] ** taken)).sqrt() + EPS
        change = self.first / (1 - BETAS[0] ** taken) / size * self.objective.generator_learning_rate
        parameters = list(self.generator.parameters())
        for parameter, moved in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
            parameter.sub_(moved.view_as(parameter))

    # -- samples --

    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        told = self._told({str(n): t for n, t in encoded.items()}, {str(n): t for n, t in present.items()})
        noise = torch.randn(len(told), 1, self.objective.noise, generator=generator)
        numbers = self.generator(_beside(told, noise.to(told)))[:, 0] * self.scale
        parts = zip(self.made, numbers.split(self.sizes, dim=1), strict=True)
        return {name: part for name, part in parts if name in wanted}


def _beside(told: Tensor, noise: Tensor) -> Tensor:
    """(R, F), (R, K, Z) -> (R, K, F + Z)."""
    return torch.cat([told[:, None].expand(-1, noise.shape[1], -1), noise], -1)
