"""How a record becomes one sequence of tokens: a field for each modality, in any order.

    <bos> <text> t t t <end> <pad> <pad> <image> i i i i i i <eos>

A field has a fixed length, so a place in it lies at a few known positions only, and nothing depends on what else is in the
batch. Missing modalities have no field. In the common vocabulary come the tokens of text, of image, of audio, and last the
special ones: a text's tokenizer keeps its numbers.

Shapes: R records, M modalities, L_m tokens of modality m, T = 2 + sum of 1 + L_m positions, V tokens of all modalities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sfumato.models.codecs.codec import TokenCodec
from sfumato.records import MODALITIES, Modality

SPECIAL = ("<bos>", "<eos>", "<pad>", "<text>", "<image>", "<audio>")


@dataclass(frozen=True)
class Sequences:
    """The common vocabulary and the fields of some modalities' tokens."""

    codecs: Mapping[Modality, TokenCodec]

    @cached_property
    def names(self) -> tuple[Modality, ...]:
        return tuple(name for name in MODALITIES if name in self.codecs)

    @cached_property
    def first(self) -> dict[Modality, int]:
        """The number of each modality's token 0."""
        firsts, total = {}, 0
        for name in self.names:
            firsts[name] = total
            total += self.codecs[name].vocabulary
        return firsts

    @cached_property
    def special(self) -> dict[str, int]:
        values = sum(self.codecs[name].vocabulary for name in self.names)
        return {name: values + i for i, name in enumerate(SPECIAL)}

    @property
    def vocabulary(self) -> int:
        return self.special["<bos>"] + len(SPECIAL)

    def start(self, name: Modality) -> int:
        return self.special[f"<{name}>"]

    def places(self, name: Modality) -> int:
        """L_m."""
        return self.codecs[name].shape[0]

    @cached_property
    def length(self) -> int:
        """T, of a record that has everything."""
        return 2 + sum(1 + self.places(name) for name in self.names)

    def field(self, name: Modality, tokens: Tensor) -> Tensor:
        """(R, L) of the codec -> (R, 1 + L) of the common vocabulary, its start first."""
        padding = tokens == self.codecs[name].vocabulary
        common = torch.where(padding, self.special["<pad>"], tokens + self.first[name])
        return torch.cat([common.new_full((len(common), 1), self.start(name)), common], 1)

    def starts_of(self, name: Modality) -> list[int]:
        """The positions at which the field can start: after <bos>, and after any of the other fields."""
        others = [1 + self.places(other) for other in self.names if other != name]
        sums = {sum(chosen) for count in range(len(others) + 1) for chosen in combinations(others, count)}
        return sorted(1 + total for total in sums)

    def interleave(
        self,
        tensors: Mapping[Any, Tensor],
        present: Mapping[Any, Tensor],
        order: Tensor,
        weights: Mapping[Modality, float],
    ) -> tuple[Tensor, Tensor]:
        """One sequence a record. Each row from that record alone.

        Args: order: (R, M): the place of each modality among ``names``, in which the present ones come; weights: of a token
        of each modality.
        Returns: (R, T) int64, padded at the end, and (R, T) float32: how much each token counts, 0 for padding and <bos>.
        """
        rows, device = order.shape[0], order.device
        # where no field is written: one column more, cut off at the end
        ids = torch.full((rows, self.length + 1), self.special["<pad>"], device=device)
        counts = torch.zeros(rows, self.length + 1, device=device)
        ids[:, 0] = self.special["<bos>"]
        there = torch.stack([present[name] for name in self.names], 1)
        lengths = torch.tensor([1 + self.places(name) for name in self.names], device=device) * there
        rank = torch.argsort(order, 1)  # (R, M): which comes at place k -> at which place comes m
        before = rank[:, None, :] < rank[:, :, None]  # (R, m, m'): m' comes before m
        starts = 1 + (lengths[:, None, :] * before).sum(2)
        for m, name in enumerate(self.names):
            field = self.field(name, tensors[name])
            position = starts[:, m, None] + torch.arange(field.shape[1], device=device)
            position = torch.where(there[:, m, None], position, self.length)
            ids.scatter_(1, position, field)
            counts.scatter_(1, position, (field != self.special["<pad>"]) * float(weights[name]))
        end = (1 + lengths.sum(1))[:, None]
        told = counts[:, : self.length].sum(1, keepdim=True) > 0
        ids.scatter_(1, end, self.special["<eos>"])
        counts.scatter_(1, end, told.to(counts.dtype))
        return ids[:, : self.length], counts[:, : self.length]

    def prefix(self, tensors: Mapping[Any, Tensor], told: Sequence[Modality]) -> Tensor:
        """(R, T') of records that all have the modalities ``told``: <bos> and their fields."""
        fields = [self.field(name, tensors[name]) for name in told]
        rows = len(next(iter(tensors.values())))
        return torch.cat([torch.full((rows, 1), self.special["<bos>"]), *fields], 1)

    def token_names(self, name: Modality) -> list[str]:
        return [f"<{name}:{i}>" for i in range(self.codecs[name].vocabulary)]
