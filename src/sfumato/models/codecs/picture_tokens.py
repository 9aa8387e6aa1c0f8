"""Pictures as tokens, a patch after the other: the lowest cosine frequencies of each on a fixed public grid.

Shapes: R records, H W pixels, C channels, p pixels a patch's side, P patches, S tokens a patch (1, of colour pictures 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.models.codecs.image import PictureCodec, cosine_matrix
from sfumato.models.codecs.lattice import Lattice
from sfumato.models.settings import PatchTokens, Pixels
from sfumato.records import Modality, Record

# brightness, red against blue, green against both: orthonormal
_OPPONENT = torch.tensor([[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]])


@dataclass(frozen=True)
class PictureTokens:
    """Records' pictures as (R, P S) tokens, rows of patches from the top, and back.

    The first token of a patch tells its mean brightness and its lowest frequencies; of a colour picture a second one tells
    the mean of two differences of colour.
    """

    settings: PatchTokens
    picture_shape: tuple[int, int, int]
    modality: ClassVar[Modality] = "image"
    end: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        height, width, _ = self.picture_shape
        if height % self.settings.patch or width % self.settings.patch:
            raise UsageError(
                f"model.image.patch = {self.settings.patch} · must divide the picture's sides, {height} and {width}",
                next="Choose another patch, or another data.image_size.",
            )

    @property
    def kind(self) -> Literal["tokens"]:
        return "tokens"

    @cached_property
    def pixels(self) -> PictureCodec:
        return PictureCodec(Pixels(), self.picture_shape, 1.0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.picture_shape[0] // self.settings.patch, self.picture_shape[1] // self.settings.patch

    @cached_property
    def lattice(self) -> Lattice:
        colour = ((self.settings.colour_levels,) * 2,) if self.picture_shape[2] == 3 else ()
        rows, columns = self.grid
        numbers = self.settings.patch**2 + 2 * len(colour)
        return Lattice((self.settings.levels, *colour), rows * columns, numbers)

    @property
    def vocabulary(self) -> int:
        return self.lattice.vocabulary

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.lattice.ranges

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ranges),)

    def coordinates(self) -> Tensor:
        return self.lattice.coordinates()

    def places(self) -> Tensor:
        """(P S, rows + columns + S): where each token's patch lies, and which token of the patch it is, as unit vectors."""
        rows, columns = self.grid
        each = len(self.lattice.sizes)
        place = torch.arange(rows * columns * each)
        row, column, which = place // (columns * each), place // each % columns, place % each
        hot = [torch.nn.functional.one_hot(x, n) for x, n in ((row, rows), (column, columns), (which, each))]
        return torch.cat(hot, 1).float()

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        latents, present = self.pixels.encode(records)
        tokens = self.lattice.encode(self._numbers(latents.reshape(-1, *self.pixels.shape)))
        return torch.where(present[:, None], tokens, self.vocabulary), present

    def blank(self, rows: int) -> Tensor:
        return torch.full((rows, *self.shape), self.vocabulary)

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        return self.pixels.decode(self._picture(self.lattice.decode(encoded)))

    def _numbers(self, x: Tensor) -> Tensor:
        """(R, C, H, W) in [-1, 1] -> (R, P, K) in units of their ranges: p^2 of brightness, then 2 of colour."""
        p, (rows, columns) = self.settings.patch, self.grid
        if x.shape[1] == 3:
            x = torch.einsum("dc,rchw->rdhw", _OPPONENT, x)
            x = x * torch.tensor([3**-0.5, 1.0, 1.0])[:, None, None]  # brightness in [-1, 1] again
        cosine = cosine_matrix(p, p).float()
        patches = x.unfold(2, p, p).unfold(3, p, p)  # (R, C, rows, columns, p, p)
        found = (cosine @ patches @ cosine.T).flatten(4) / p  # a patch's mean first
        found = found.reshape(len(x), x.shape[1], rows * columns, p * p)
        brightness = found[:, 0][:, :, self._order] / self._range
        colour = [found[:, c, :, :1] / self.settings.colour_range for c in range(1, x.shape[1])]
        return torch.cat([brightness, *colour], 2)[:, :, self._told_first]

    def _picture(self, numbers: Tensor) -> Tensor:
        """(R, P, K) -> (R, C, H, W)."""
        p, (rows, columns), channels = self.settings.patch, self.grid, self.picture_shape[2]
        numbers = numbers[:, :, torch.argsort(self._told_first)]
        found = torch.zeros(len(numbers), channels, rows * columns, p * p)
        found[:, 0, :, self._order] = numbers[:, :, : p * p] * self._range
        for c in range(1, channels):
            found[:, c, :, 0] = numbers[:, :, p * p + c - 1] * self.settings.colour_range
        cosine = cosine_matrix(p, p).float()
        patches = cosine.T @ (p * found).reshape(-1, channels, rows, columns, p, p) @ cosine
        x = patches.permute(0, 1, 2, 4, 3, 5).reshape(-1, channels, rows * p, columns * p)
        if channels == 3:
            x = x * torch.tensor([3**0.5, 1.0, 1.0])[:, None, None]
            x = torch.einsum("dc,rdhw->rchw", _OPPONENT, x)
        return x

    @cached_property
    def _order(self) -> Tensor:
        """(p^2,) frequencies of a patch, the lowest first, across before down."""
        axis = torch.arange(self.settings.patch)
        distance = (axis[:, None] ** 2 + axis[None, :] ** 2).flatten()
        return torch.argsort(distance, stable=True)

    @cached_property
    def _range(self) -> Tensor:
        """(p^2,) of each frequency in that order."""
        found = torch.full((self.settings.patch**2,), self.settings.detail_range)
        found[0] = 1.0
        return found

    @cached_property
    def _told_first(self) -> Tensor:
        """Which of the numbers the tokens tell comes first: the lowest frequencies, the colours, and then what no token tells."""
        told, p = len(self.settings.levels), self.settings.patch
        colours = range(p * p, p * p + self.picture_shape[2] - 1)
        return torch.tensor([*range(told), *colours, *range(told, p * p)])
