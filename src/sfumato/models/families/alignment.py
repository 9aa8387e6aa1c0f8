"""A shared latent of all modalities by contrast with a public bank; asked for a modality, it answers with a record of the bank.

Each modality m has an encoder f_m onto the unit sphere. A record's loss is the mean, over the ordered pairs (a, b) of what it
has, of

    - log  e^{s_ab / t} / (e^{s_ab / t} + sum_j e^{f_a(x_a) . f_b(bank_j) / t}),     s_ab = f_a(x_a) . f_b(x_b):

one private pair against public negatives only. The usual contrastive loss (van den Oord et al. 2018, arXiv:1807.03748, eq. 4;
Radford et al. 2021, arXiv:2103.00020) has the batch's other records as negatives, so that no record has a gradient of its
own: the engine refuses that. The bank's embeddings are those of the present weights, without a gradient.

The other way to a shared latent is to tell a text from its picture, record by record (Sander et al. 2024, DP-Cap,
arXiv:2403.02506): what decodes texts does that, such as families/variational.py.

Shapes: R records, N of the bank, E entries of the shared latent.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.families import likelihoods
from sfumato.models.families.likelihoods import Inputs
from sfumato.models.generative import Direction, Generative, Origin, every_direction
from sfumato.models.settings import Alignment, Mlp, ModelSettings, Sampling
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Batch, Modality, Record


class Encoder(nn.Module):
    """Encoded records (R, ...) -> (R, E) of unit length."""

    def __init__(self, inputs: Inputs, width: int, mlp: Mlp) -> None:
        super().__init__()
        self.inputs = inputs
        self.stack = inputs.stack(width, mlp)

    def forward(self, encoded: Tensor) -> Tensor:
        told = self.inputs(encoded).to(self.stack.inward.weight.dtype)
        return nn.functional.normalize(self.stack(told), dim=-1, eps=1e-6)


class Bank(nn.Module):
    """Encoded public records, and which of their modalities are there: constants, saved with the model."""

    def __init__(self, codecs: Mapping[Modality, Any]) -> None:
        super().__init__()
        for name, codec in codecs.items():
            self.register_buffer(name, codec.blank(0))
            self.register_buffer(f"{name}_present", torch.zeros(0, dtype=torch.bool))

    def take(self, encoded: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
        for name in encoded:
            self._buffers[name] = encoded[name]
            self._buffers[f"{name}_present"] = present[name]

    def of(self, name: Modality) -> tuple[Tensor, Tensor]:
        """(N, ...) and (N,) bool."""
        return self.get_buffer(name), self.get_buffer(f"{name}_present")

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """A bank may be as long as its file says."""
        for name in self._buffers:
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class AlignmentModel(Generative):
    """``embed`` maps records of any modality to one sphere; ``sample`` answers with records of the public bank."""

    family = "alignment"
    needs_public = True

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        assert isinstance(settings.objective, Alignment)  # families.build has matched it
        self.objective = settings.objective
        if not isinstance(settings.backbone, Mlp) or len(self.codecs) < 2:
            raise UsageError(
                f"model: {', '.join(self.codecs) or 'nothing'} · aligning needs two modalities, and model.backbone.kind: mlp",
                next="Set two of model.text, model.image, model.audio, and model.backbone: {kind: mlp}.",
            )
        self.names: tuple[Modality, ...] = tuple(name for name in MODALITIES if name in self.codecs)
        self.encoders = nn.ModuleDict(
            {
                name: Encoder(likelihoods.inputs_of(self.codecs[name]), self.objective.width, settings.backbone)
                for name in self.names
            }
        )
        self.bank = Bank(self.codecs)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return every_direction(self.codecs, self.names)

    def parts(self) -> dict[str, nn.Module]:
        return {**{f"{name}_encoder": self.encoders[name] for name in self.names}, "bank": self.bank}

    def origin(self, part: str) -> Origin:
        return "public" if part == "bank" else "dp-sgd"

    def boundary(self) -> list[str]:
        return [
            "Declared public: the records of half of the public units. They are what each private record is told apart from in "
            "training, they are saved with the model, and it answers with them.",
        ]

    @torch.no_grad()
    def tell_public(self, records: Sequence[Record]) -> None:
        """Takes the first ``bank`` records."""
        self.bank.take(*self._encoded(records[: self.objective.bank]))

    # -- the objective --

    def losses(self, batch: Batch) -> Tensor:
        if not len(self.bank.of(self.names[0])[0]):
            raise UsageError(
                "public bank = empty · a private record is told apart from public ones alone",
                next="Set data.public_units; in a loop of your own, call tell_public(records) before it.",
            )
        return super().losses(batch)

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,). There is no chance in it."""
        own = {name: self.encoders[name](batch.tensors[name]) for name in self.names}
        total = count = torch.zeros(batch.num_rows)
        for a, b in permutations(self.names, 2):
            others, there = self._embedded_bank(b)
            alike = (own[a] * own[b]).sum(1, keepdim=True) / self.objective.temperature
            away = (own[a] @ others.T / self.objective.temperature).masked_fill(~there, -torch.inf)
            lost = torch.cat([alike, away], 1).logsumexp(1) - alike[:, 0]
            both = (batch.present[a] & batch.present[b]).to(lost)
            total, count = total + lost * both, count + both
        return total / count.clamp(min=1.0)

    @torch.no_grad()
    def _embedded_bank(self, name: Modality) -> tuple[Tensor, Tensor]:
        encoded, there = self.bank.of(name)
        return self.encoders[name](encoded), there

    # -- answers --

    @torch.no_grad()
    def embed(self, records: Sequence[Record], modality: Modality) -> Tensor:
        """(R, E) of unit length: near to that of a partner of another modality."""
        return self.encoders[modality](self.codecs[modality].encode(records)[0])

    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        """A record of the bank for each, drawn by the softmax of its likeness: as in training, one of what could be meant."""
        told = [self.encoders[n](encoded[n]) * present[n][:, None] for n in self.names if n not in wanted]
        query = torch.stack(told).sum(0) if told else torch.zeros(len(encoded[wanted[0]]), self.objective.width)
        answers = [self._embedded_bank(name) for name in wanted]
        whole = torch.stack([there for _, there in answers]).all(0)
        if not whole.any():
            raise UsageError(
                f"public bank = none with {' and '.join(wanted)} · there is nothing to answer with",
                next="Set data.public_units, or ask for something else.",
            )
        key = torch.stack([key for key, _ in answers]).mean(0)
        scores = (query @ key.T / self.objective.temperature).masked_fill(~whole, -torch.inf)
        luck = -torch.rand(scores.shape, generator=generator).clamp(min=1e-30).log()
        chosen = (scores - luck.log()).argmax(1)  # a draw of the softmax (Gumbel)
        return {name: self.bank.of(name)[0][chosen] for name in wanted}
