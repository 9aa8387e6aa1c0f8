"""Records as short latents by public, frozen encoders: what is clipped, noised and released instead of the records.

Nothing here is fitted to anything: fixed cosine frequencies with public weights for pictures, a public list of terms or a
fixed random projection for texts. So the encoders cost no privacy, and everybody can encode a prompt as the records were.

Shapes: R records, D latent entries of pictures, E of texts.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import DataError
from sfumato.models.codecs import sentence, terms, text
from sfumato.models.codecs.image import ImageCoder
from sfumato.models.settings import FrozenSentence, HashedWords, ModelSettings, Terms
from sfumato.records import Record, UnitTable

_AT_ONCE = 4096


class PublicCodes:
    """The latents ``image`` (R, D) and ``text`` (R, E) of records, and pictures of latents.

    A picture's latent is its codec's coefficients, each divided by the codec's assumed standard deviation (the spectrum, a
    public constant) and all by sqrt(D): of a picture that varies as assumed the latent has length about 1. A text's latent
    has length at most about 1.
    """

    def __init__(self, settings: ModelSettings, picture_shape: tuple[int, int, int]) -> None:
        self.settings = settings
        self.picture_shape = picture_shape
        self.coder = ImageCoder(settings.image, *picture_shape)
        spectrum = self.coder.spectrum(settings.objective.sigma_data).flatten()
        self.scale = spectrum * math.sqrt(spectrum.numel())
        self._projection: Tensor | None = None

    @property
    def dimensions(self) -> dict[str, int]:
        return {"image": self.scale.numel(), "text": self.texts([]).shape[1]}

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """Both latents of every record, zero where it lacks the modality. Private, as the records are."""
        texts, has_text = self._texts([record.text for record in records])
        has_image = torch.tensor([record.image is not None for record in records], dtype=torch.bool)
        return UnitTable(
            {"image": self.pictures(records), "text": texts},
            [record.unit for record in records],
            {"image": has_image, "text": has_text},
        )

    def pictures(self, records: Sequence[Record]) -> Tensor:
        """(R, D)."""
        latents = torch.zeros(len(records), self.scale.numel())
        for start in range(0, len(records), _AT_ONCE):
            part = records[start : start + _AT_ONCE]
            for record in part:
                if record.image is not None and record.image.shape != self.picture_shape:
                    raise DataError(
                        f"record {record.id}: image.shape = {record.image.shape} · must be {self.picture_shape}",
                        next="Prepare the records with the recipe's data.image_size and data.channels.",
                    )
            blank = np.zeros(self.picture_shape, np.uint8)
            stacked = np.stack([blank if record.image is None else record.image for record in part])
            latents[start : start + len(part)] = self.coder.encode(torch.from_numpy(stacked)).flatten(1) / self.scale
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """(R, D) -> (R, H, W, C) uint8."""
        coefficients = (latents.float() * self.scale).reshape(-1, *self.coder.latent_shape)
        return self.coder.decode(coefficients).numpy()

    def texts(self, prompts: Sequence[str | None]) -> Tensor:
        """(R, E) of texts that are public, prompts for example."""
        return self._texts(prompts)[0]

    def _texts(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        match self.settings.text:
            case HashedWords(buckets=buckets, width=width):
                table, present = text.encode(texts, buckets)
                return self._projected(text.bag(table, buckets), width), present
            case FrozenSentence(name=name, width=width):
                vectors, present = sentence.encode(name, texts)
                return vectors / math.sqrt(width), present
            case Terms(axes=axes):
                values, present = terms.encode(texts, axes)
                return values / math.sqrt(len(axes)), present

    def _projected(self, features: Tensor, width: int) -> Tensor:
        """A random projection that keeps lengths on average (Johnson & Lindenstrauss 1984); public, of seed 0."""
        if self._projection is None:
            generator = torch.Generator().manual_seed(0)
            self._projection = torch.randn(features.shape[1], width, generator=generator) / math.sqrt(width)
        return features @ self._projection

    def in_words(self) -> list[str]:
        """For the boundary of a claim."""
        match self.settings.text:
            case HashedWords():
                how = "a fixed public random projection of hashed words"
            case FrozenSentence(name=name):
                how = f"the public frozen sentence encoder {name}"
            case Terms(axes=axes):
                how = (
                    f"a public list of terms on {len(axes)} axes ({', '.join(axis.name for axis in axes)}), written without "
                    "looking at private records"
                )
        return [
            f"The encoders are public and frozen, fitted to nothing: pictures by fixed {self.settings.image.kind} coefficients "
            f"with public weights, texts by {how}. A prompt is encoded by the same encoder."
        ]

    def described(self) -> dict[str, Any]:
        from pydantic import TypeAdapter

        settings = TypeAdapter(ModelSettings).dump_python(self.settings, mode="json")
        return {"picture_shape": list(self.picture_shape), "settings": settings}
