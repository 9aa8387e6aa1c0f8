"""What a denoiser is told: a small trained layer for each modality that is a condition, side by side.

Shapes: R records, E width of all conditions together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.codecs.text_features import TextFeatures


class ConditionEncoder(nn.Module):
    """What the codec made of a text, a picture or a sound -> the condition. Trained with the model, privately.

    The first layer starts as a random projection with unit-scale output: conditions differ from the first step on, and private
    training need not spend its budget on making them differ.
    """

    def __init__(self, inputs: int, width: int, first_std: float) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.mix = nn.Linear(width, width)
        nn.init.normal_(self.project.weight, std=first_std)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(features)
        mixed = projected + self.mix(nn.functional.silu(projected))
        return nn.functional.layer_norm(mixed, mixed.shape[-1:])


class Told:
    """One condition: its codec, and what its trained layer takes of an encoded record."""

    def __init__(self, codec: Any, width: int) -> None:
        if codec.kind == "tokens":
            raise UsageError(
                f"model.{codec.modality} · has tokens, which a diffusion is not told",
                next=f"Set model.{codec.modality} to a continuous codec, or to features of texts such as {{kind: hashed_words}}.",
            )
        self.codec, self.width = codec, width

    def encoder(self) -> ConditionEncoder:
        if isinstance(self.codec, TextFeatures):
            return ConditionEncoder(self.codec.width, self.width, self.codec.first_std())
        entries = self.codec.scale.numel()
        return ConditionEncoder(entries, self.width, entries**-0.5)

    def features(self, encoded: Tensor) -> Tensor:
        """(R, ...) -> (R, inputs of the layer), entries of about unit scale."""
        return self.codec.features(encoded) if isinstance(self.codec, TextFeatures) else encoded / self.codec.scale


def beside(parts: list[Tensor], rows: int) -> Tensor:
    """(R, E); E = 0 where there is no condition at all."""
    return torch.cat(parts, dim=-1) if parts else torch.zeros(rows, 0)
