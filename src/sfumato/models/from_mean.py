"""A text-to-image model fitted to one noisy mean of features of pictures and texts together (DP-MERF).

The feature of a record is phi(picture) x psi(text), an outer product: its mean over all units holds how pictures depend on
texts. phi: 1, the picture's latent, and random Fourier features of it; psi: 1, the text's latent, and the products of its
entries. Both are public. A generator G(text, noise) is fitted by gradient descent so that its own features, on public
texts, have the released mean. It sees nothing else, so it is post-processing.

It is right where the public texts occur as often as the private ones; where they do not, what is learnt is tilted by
the ratio. Losses couple the rows of a batch, which is why no record is trained on here.

Source: Harder, Adamczewski & Park 2021 (DP-MERF), arXiv:2002.11603; random features: Rahimi & Recht 2007, Algorithm 1.
Differs: texts in place of labels; the picture's latent itself among the features.

Shapes: R rows, D latent entries of pictures, E of texts, P features of pictures, Q of texts.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.backbones.mlp import normalised
from sfumato.models.from_latents import save
from sfumato.models.generative import ROWS_AT_ONCE
from sfumato.models.public_codes import PublicCodes
from sfumato.models.settings import Mlp, ModelSettings, RandomFeatures, Sampling
from sfumato.models.text_to_image import TextToImage
from sfumato.records import Batch, Record, UnitTable

NOISE = 16  # entries of the generator's own noise


class Features:
    """phi x psi of encoded records, each row of length at most 1: public and fixed, drawn once from seed 0."""

    def __init__(self, settings: RandomFeatures, image: int, text: int) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(0)
        self.frequencies = torch.randn(image, settings.frequencies, generator=generator) / settings.width
        self.pairs = torch.triu_indices(text, text, 1) if settings.pairs else torch.zeros(2, 0, dtype=torch.long)
        self.shape = (1 + image + 2 * settings.frequencies, 1 + text + self.pairs.shape[1])

    @property
    def dimension(self) -> int:
        return self.shape[0] * self.shape[1]

    def of_pictures(self, latents: Tensor) -> Tensor:
        """(R, D) -> (R, P), of length at most 1: a latent longer than ``longest`` is shortened to it."""
        longest = self.settings.longest
        short = latents * (longest / latents.norm(dim=1, keepdim=True).clamp(min=longest))
        angle = short @ self.frequencies.to(short)
        count = max(self.settings.frequencies, 1)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(count)  # of length 1, or empty
        parts = torch.cat([short.new_ones(len(short), 1), short / longest, waves], dim=1)
        return parts / math.sqrt(3 if self.settings.frequencies else 2)

    def of_texts(self, latents: Tensor) -> Tensor:
        """(R, E) -> (R, Q), of length at most 1."""
        short = latents / latents.norm(dim=1, keepdim=True).clamp(min=1.0)
        pairs = short[:, self.pairs[0]] * short[:, self.pairs[1]] * math.sqrt(2)  # |.|^2 <= |short|^4
        parts = torch.cat([short.new_ones(len(short), 1), short, pairs], dim=1)
        return parts / math.sqrt(3 if self.settings.pairs else 2)

    def of_batch(self, batch: Batch) -> Tensor:
        """(R, P Q): zero for a record without a picture or without a text."""
        image, text = batch.tensors["image"].double(), batch.tensors["text"].double()
        joint = self.of_pictures(image)[:, :, None] * self.of_texts(text)[:, None]
        both = batch.present["image"] & batch.present["text"]
        return torch.where(both[:, None], joint.flatten(1), joint.new_zeros(()))


class Generator(nn.Module):
    """Text's features and noise -> a picture's latent: a linear map, and a network that starts at zero beside it."""

    def __init__(self, inputs: int, outputs: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.straight = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.straight.weight)
        nn.init.zeros_(self.straight.bias)
        self.inward = nn.Linear(inputs + NOISE, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outward = nn.Linear(width, outputs)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, told: Tensor, noise: Tensor) -> Tensor:
        hidden = self.inward(torch.cat([told, noise], dim=1))
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(normalised(hidden)))
        return self.straight(told) + self.outward(normalised(hidden))


class FromMean(nn.Module, TextToImage):
    """``features`` of private records are summed and released; ``receive`` takes that; then it is fitted on public texts."""

    kind = "from_mean"
    learns_from_rows = False  # what it knows of a record is the mean
    released: Tensor

    def __init__(self, settings: ModelSettings, picture_shape: tuple[int, int, int]) -> None:
        super().__init__()
        if not isinstance(settings.backbone, Mlp):
            raise UsageError(
                f"model.backbone.kind = {settings.backbone.kind} · a generator of latents is fully connected",
                next="Set model.backbone: {kind: mlp}.",
            )
        self.settings = settings
        self.picture_shape = picture_shape
        self.codes = PublicCodes(settings, picture_shape)
        image, text = self.codes.dimensions["image"], self.codes.dimensions["text"]
        self.features = Features(settings.random_features, image, text)
        depth, width = settings.backbone.depth, settings.backbone.width
        self.generator = Generator(self.features.shape[1], image, width=width, depth=depth)
        self.register_buffer("released", torch.zeros(self.features.shape))

    @property
    def dimensions(self) -> dict[str, int]:
        return {"mean": self.features.dimension}

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """The latents of every record: private."""
        return self.codes.encode(records)

    def text_latents(self, texts: Sequence[str | None]) -> Tensor:
        """(R, E) of public texts."""
        return self.codes.texts(texts)

    def record_features(self, batch: Batch) -> Tensor:
        """(R, P Q): what is summed over units, of length at most 1."""
        return self.features.of_batch(batch)

    def receive(self, mean: Tensor, prompts: Sequence[str]) -> UnitTable:
        """Takes the released mean, (P Q,), and public texts. Returns: the table of texts to fit the generator on."""
        self.released.copy_(mean.reshape(self.features.shape))
        texts = self.text_latents(prompts)
        return UnitTable({"text": texts}, [f"{row:09d}" for row in range(len(texts))])

    def control_table(self, clean: UnitTable) -> UnitTable:
        """Takes the mean of few records without noise: what an audit must catch."""
        batch = clean.batch(range(clean.num_units), records_per_unit=1)
        self.released.copy_(self.record_features(batch).mean(0).reshape(self.features.shape))
        return clean

    def losses(self, batch: Batch) -> Tensor:
        """(B,) the same number for all: the squared distance between the batch's mean feature and the released one."""
        told = self.features.of_texts(batch.tensors["text"])
        if not len(told):
            return told.sum(dim=1)
        drawn = self.generator(told, torch.randn(len(told), NOISE))
        mean = self.features.of_pictures(drawn).T @ told / len(told)
        scale = self.released.square().sum().clamp(min=1e-12)
        return ((mean - self.released).square().sum() / scale).expand(batch.num_units)

    def row_losses(self, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
        """(R,): minus the product of each record's feature with the released mean, which a member's own feature raises."""
        return -(self.record_features(batch) @ self.released.double().flatten())

    @torch.no_grad()
    def generate(self, texts: Sequence[str | None], *, seed: int, sampling: Sampling | None = None) -> np.ndarray:
        """Pictures for texts, (N, H, W, C) uint8."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [np.zeros((0, *self.picture_shape), np.uint8)]
        for start in range(0, len(texts), ROWS_AT_ONCE):
            told = self.features.of_texts(self.text_latents(texts[start : start + ROWS_AT_ONCE]))
            noise = torch.randn(len(told), NOISE, generator=generator)
            drawn.append(self.codes.decode(self.generator(told, noise)))
        return np.concatenate(drawn)

    def bytes_per_row(self) -> int:
        """About what one row takes, float32."""
        assert isinstance(self.settings.backbone, Mlp)
        width = self.settings.backbone.width * (2 * self.settings.backbone.depth + 1)
        return 16 * (width + sum(self.features.shape))

    def save(self, folder: Path | str) -> None:
        """[shell] Raises OutsideError where the disk does not take it."""
        described = {**self.codes.described(), "format": 1, "kind": self.kind}
        save(Path(folder), described, {"generator": self.generator.state_dict(), "mean": {"released": self.released}})

    def restore(self, described: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.generator.load_state_dict(dict(tensors["generator"]))
        self.released.copy_(tensors["mean"]["released"])
