"""Texts as what a text encoder is told: hashed words, a frozen public encoder's vectors, or a public list of terms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.models.codecs import sentence, terms, text
from sfumato.models.settings import FrozenSentence, HashedWords, Terms, TextCondition
from sfumato.records import Modality, Record


@dataclass(frozen=True)
class TextFeatures:
    """A condition only. ``features`` makes of the encoded texts what a linear layer takes, (R, ``width``)."""

    settings: TextCondition
    modality: ClassVar[Modality] = "text"

    @property
    def kind(self) -> Literal["features"]:
        return "features"

    @property
    def shape(self) -> tuple[int, ...]:
        return (text.MOST_FEATURES,) if isinstance(self.settings, HashedWords) else (self.width,)

    @property
    def width(self) -> int:
        match self.settings:
            case HashedWords(buckets=buckets):
                return buckets
            case FrozenSentence(width=width):
                return width
            case Terms(axes=axes):
                return len(axes)

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        texts = [record.text for record in records]
        match self.settings:
            case HashedWords(buckets=buckets):
                return text.encode(texts, buckets)
            case FrozenSentence(name=name):
                return sentence.encode(name, texts)
            case Terms(axes=axes):
                return terms.encode(texts, axes)

    def blank(self, rows: int) -> Tensor:
        match self.settings:
            case HashedWords(buckets=buckets):
                return text.encode([None] * rows, buckets)[0]
            case FrozenSentence() | Terms():
                return torch.zeros(rows, self.width)

    def decode(self, encoded: Tensor) -> Sequence[str]:
        raise UsageError(
            f"model.text.kind = {self.settings.kind} · is a condition only: no text can be made of it",
            next="Set model.text to a tokenizer, such as {kind: bytes}.",
        )

    def features(self, encoded: Tensor) -> Tensor:
        match self.settings:
            case HashedWords(buckets=buckets):
                return text.bag(encoded, buckets)
            case FrozenSentence() | Terms():
                return encoded

    def first_std(self) -> float:
        """Of a first layer's random weights, so that features come out at unit scale."""
        return 1.0 if isinstance(self.settings, HashedWords) else self.width**-0.5  # a bag has unit length
