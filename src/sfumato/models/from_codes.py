"""A text-to-image model made from one code of every unit, told by randomised response.

A code is a text and a few bits of a picture together: one bit for every entry of the text's latent, whether it is above
zero, and the signs of a few random directions of the picture's latent. At every place of the released table the directions
are others; they are public. Rows of signs determine the mean of the pictures' latents (one-bit compressed sensing):
for v ~ N(0, I), E[v sign(v.z)] = sqrt(2/pi) z / |z|. So from the codes, with the response's own bias taken out, follows an
estimate of the same mean of features that ``from_mean`` is fitted to; all of that is post-processing.

Signs tell no length: latents are taken as long as ``random_features.length``, a public constant.

Sources: Boufounos & Baraniuk 2008 (one-bit compressed sensing); Plan & Vershynin 2013, arXiv:1202.1212 (the
mean of v sign(v.z)); Bassily & Smith 2015, arXiv:1504.04686 (public directions for local reports).

Shapes: R rows, D latent entries of pictures, E of texts, S signs; K = 2^(E + S) categories.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.models import moments
from sfumato.models.from_mean import FromMean
from sfumato.models.settings import ModelSettings
from sfumato.records import Batch, UnitTable

MOST_BITS = 16
_AT_ONCE = 8192


class FromCodes(FromMean):
    """``code`` makes the codes that are to be released; ``receive_codes`` takes what was released."""

    kind = "from_codes"

    def __init__(self, settings: ModelSettings, picture_shape: tuple[int, int, int]) -> None:
        super().__init__(settings, picture_shape)
        if settings.random_features.frequencies:
            raise UsageError(
                f"frequencies = {settings.random_features.frequencies} · signs tell a mean, and no waves of it",
                next="Set model.random_features.frequencies: 0.",
            )
        self.text_bits = self.codes.dimensions["text"]
        self.signs = settings.random_features.signs
        if self.text_bits + self.signs > MOST_BITS:
            raise UsageError(
                f"bits = {self.text_bits} of a text + {self.signs} of a picture · together at most {MOST_BITS}: with more, a "
                "code is hardly ever told as it is",
                next="Take fewer axes (model.text) or signs (model.random_features.signs).",
            )

    @property
    def dimensions(self) -> dict[str, int]:
        return {"categories": 2 ** (self.text_bits + self.signs), "image": self.codes.dimensions["image"]}

    def text_latents(self, texts: Sequence[str | None]) -> Tensor:
        """Of prompts, with every entry told by one bit as in the codes."""
        return self._of_bits(self.codes.texts(texts) > 0)

    def _of_bits(self, bits: Tensor) -> Tensor:
        return (bits.float() * 2 - 1) / math.sqrt(self.text_bits)

    def rays(self, places: np.ndarray) -> Tensor:
        """(R, S, D) standard normal, of these places of the released table: public, from a hash of the place."""
        count = self.signs * self.codes.dimensions["image"]
        rows = [np.random.Generator(np.random.PCG64([place, 2109])).standard_normal(count) for place in places.tolist()]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, count))).reshape(len(rows), self.signs, -1)

    def code(self, values: dict[str, Tensor], places: np.ndarray) -> np.ndarray:
        """(R, 1): the code of every row at its place. Zero latents have a code like all others."""
        told = torch.einsum("rsd,rd->rs", self.rays(places), torch.nan_to_num(values["image"].double())) > 0
        bits = torch.cat([values["text"] > 0, told], dim=1).long()
        return (bits << torch.arange(bits.shape[1])).sum(dim=1, keepdim=True).numpy()

    def receive_codes(self, released: np.ndarray, noise: float, centre: Tensor, prompts: Sequence[str]) -> UnitTable:
        """Takes released codes, (N, 1), the chance of a uniform one, and the latent that pictures are counted from.

        Returns: the table of public texts to fit the generator on.
        """
        return self.receive(self.mean_feature(released[:, 0], noise, centre), prompts)

    def mean_feature(self, codes: np.ndarray, noise: float, centre: Tensor) -> Tensor:
        """(P, Q): an estimate of the mean of phi x psi, its noise shrunk. A uniform code's signs are 0 on average, and its
        text is any: both are subtracted with weight ``noise``, and the rest is divided by 1 - ``noise``."""
        bits = torch.from_numpy((codes[:, None] >> np.arange(self.text_bits + self.signs)) & 1)
        texts = self.features.of_texts(self._of_bits(bits[:, : self.text_bits])).double()
        every = np.arange(2**self.text_bits)
        uniform = torch.from_numpy((every[:, None] >> np.arange(self.text_bits)) & 1)
        mean_text = texts.mean(0) - noise * self.features.of_texts(self._of_bits(uniform)).double().mean(0)
        mean_text = mean_text / (1 - noise)
        seen = torch.zeros(self.codes.dimensions["image"], texts.shape[1], dtype=torch.float64)
        signs = bits[:, self.text_bits :].double() * 2 - 1
        for start in range(0, len(codes), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(codes)))
            rows = torch.einsum("rs,rsd->rd", signs[part], self.rays(np.arange(part.start, part.stop)))
            seen += rows.T @ texts[part]
        longest, length = self.settings.random_features.longest, self.settings.random_features.length
        mean_row = seen / len(codes)
        std_row = torch.full((seen.shape[0],), math.sqrt(self.signs), dtype=torch.float64)
        std_text = texts.square().mean(0).sqrt()
        offset = moments.shrunk(mean_row, std_row, std_text, len(codes)) / (1 - noise)
        offset *= math.sqrt(math.pi / 2) * length / self.signs
        pictures = (centre.double()[:, None] * mean_text + offset) / longest
        return torch.cat([mean_text[None], pictures]) / math.sqrt(2)

    def record_features(self, batch: Batch) -> Tensor:
        """As of a mean, with texts as the codes tell them: for an audit of what was made of the codes."""
        told = {**batch.tensors, "text": self._of_bits(batch.tensors["text"] > 0)}
        return self.features.of_batch(replace(batch, tensors=told))
