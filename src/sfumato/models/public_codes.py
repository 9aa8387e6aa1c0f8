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

from sfumato.errors import UsageError
from sfumato.models.codecs import build as build_codecs
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.codecs.text_features import TextFeatures
from sfumato.models.settings import Diffusion, FrozenSentence, HashedWords, ModelSettings, Terms, VaeLatents
from sfumato.models.shapes import Shapes
from sfumato.records import Record, UnitTable, prompt


class PublicCodes:
    """The latents ``image`` (R, D) and ``text`` (R, E) of records, and pictures of latents.

    A picture's latent is its codec's coefficients, each divided by the codec's assumed standard deviation (the spectrum, a
    public constant) and all by sqrt(D): of a picture that varies as assumed the latent has length about 1. A text's latent
    has length at most about 1.
    """

    def __init__(self, settings: ModelSettings, picture_shape: tuple[int, int, int]) -> None:
        if settings.text is None or settings.image is None:
            raise UsageError(
                "model.image or model.text = none · what is released are latents of pictures and texts",
                next="Set both.",
            )
        if isinstance(settings.image, VaeLatents):
            raise UsageError(
                "model.image.kind = vae · what is released are pixels or cosine coefficients: a clip of their length is public",
                next="Set model.image: {kind: cosine}.",
            )
        if not isinstance(settings.objective, Diffusion):
            raise UsageError(
                f"model.objective.kind = {settings.objective.kind} · what was released is learnt from by diffusion",
                next="Set model.objective: {kind: diffusion}.",
            )
        if settings.sampling.solver != "heun" or settings.sampling.churn > 0:
            raise UsageError(
                f"model.sampling.solver = {settings.sampling.solver}, churn = {settings.sampling.churn} · what was released has "
                "one way to be drawn from",
                next="Leave both out.",
            )
        self.settings = settings
        codecs = build_codecs(settings, Shapes(picture=picture_shape))
        if not isinstance(codecs["image"], PictureCodec) or not isinstance(codecs["text"], TextFeatures):
            raise UsageError(
                f"model.image.kind = {settings.image.kind}, model.text.kind = {settings.text.kind} · tokens are no latents",
                next="Set model.image to pixels or cosine, and model.text to hashed_words, frozen_sentence or terms.",
            )
        self.image: PictureCodec = codecs["image"]
        self.text: TextFeatures = codecs["text"]
        self.text_settings = self.text.settings
        self.picture_shape = picture_shape
        self.scale = self.image.scale * math.sqrt(self.image.scale.numel())
        self._projection: Tensor | None = None

    @property
    def dimensions(self) -> dict[str, int]:
        return {"image": self.scale.numel(), "text": self.texts([]).shape[1]}

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """Both latents of every record, zero where it lacks the modality. Private, as the records are."""
        pictures, has_image = self.image.encode(records)
        texts, has_text = self._texts(records)
        return UnitTable(
            {"image": pictures / self.scale, "text": texts},
            [record.unit for record in records],
            {"image": has_image, "text": has_text},
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """(R, D) -> (R, H, W, C) uint8."""
        pictures = self.image.decode(latents.float() * self.scale)
        return np.stack(pictures) if len(pictures) else np.zeros((0, *self.picture_shape), np.uint8)

    def texts(self, prompts: Sequence[str | None]) -> Tensor:
        """(R, E) of texts that are public, prompts for example."""
        return self._texts([prompt(text=text) for text in prompts])[0]

    def _texts(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        encoded, present = self.text.encode(records)
        features = self.text.features(encoded)
        match self.text_settings:
            case HashedWords(width=width):
                return self._projected(features, width), present
            case FrozenSentence() | Terms():
                return features / math.sqrt(self.text.width), present

    def _projected(self, features: Tensor, width: int) -> Tensor:
        """A random projection that keeps lengths on average (Johnson & Lindenstrauss 1984); public, of seed 0."""
        if self._projection is None:
            generator = torch.Generator().manual_seed(0)
            self._projection = torch.randn(features.shape[1], width, generator=generator) / math.sqrt(width)
        return features @ self._projection

    def in_words(self) -> list[str]:
        """For the boundary of a claim."""
        match self.text_settings:
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
            f"The encoders are public and frozen, fitted to nothing: pictures by fixed {self.image.settings.kind} coefficients "
            f"with public weights, texts by {how}. A prompt is encoded by the same encoder."
        ]

    def described(self) -> dict[str, Any]:
        from pydantic import TypeAdapter

        settings = TypeAdapter(ModelSettings).dump_python(self.settings, mode="json")
        return {"picture_shape": list(self.picture_shape), "settings": settings}
