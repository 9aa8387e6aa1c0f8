"""Records of every public class, drawn from a Gaussian whose moments were released as one noisy sum.

A record's feature is x = (s, sqrt(1 - s^2) u), where u is its picture, counted from a public grey level and shortened to a
public length, in units of that length. The sum over a class of x x^T tells, in one release, how many its records are (noisily),
their mean and their second moments. What is made of it is post-processing: means and covariances, with what is noise taken out, and
pictures drawn from them. A class's covariance is that of all classes, which noise reaches least, plus what stands out of
the noise in their difference.

Sources: noisy sums of pictures as a warm start: DP-FETA, arXiv:2504.01395 ("central images"); eigenvalues under Gaussian noise: Gavish &
Donoho 2017, eq. 7, arXiv:1405.7511. Differs: sums over public constants; second moments; the noise is symmetric.

Shapes: R records, K classes, D entries of a picture, E = D + 1 of a feature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.models.codecs import terms
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.settings import ClassMoments, TermAxis
from sfumato.records import Batch, Record, UnitTable

COUNTING = 1 / 3  # s: of a feature of length 1, what the constant entry has
NOTHING = -1  # of no class


class ClassMomentsMaker:
    """Features of private records; and, of their noisy sums, records that are nobody's."""

    def __init__(self, settings: ClassMoments, picture_shape: tuple[int, int, int]) -> None:
        self.settings = settings
        self.codec = PictureCodec(settings.image, picture_shape, 0.5)
        self.entries = self.codec.scale.numel() + 1
        self.origin = self._scaled(self._plain(picture_shape, settings.level))

    @property
    def classes(self) -> int:
        return len(self.settings.classes)

    @property
    def dimension(self) -> int:
        """How many numbers are released."""
        each = self.entries * (self.entries + 1) // 2 if self.settings.products else self.entries
        return self.classes * each

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """Pictures' entries, and the class that each text says: private, as the records are."""
        pictures, has_image = self.codec.encode(records)
        classes = classes_of([record.text for record in records], self.settings.classes)
        return UnitTable(
            {"image": self._scaled(pictures), "class": classes},
            [record.unit for record in records],
            {"image": has_image, "class": classes != NOTHING},
        )

    def usable(self, prompts: Sequence[str]) -> list[str]:
        """Those that say a class."""
        of_class = classes_of(prompts, self.settings.classes)
        return [prompt for prompt, number in zip(prompts, of_class.tolist(), strict=True) if number != NOTHING]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x (R, E), of length at most 1, and the class (R,); zero for a record without a picture or a class."""
        away = batch.tensors["image"].double() - self.origin
        longest = self.settings.longest
        short = away / away.norm(dim=1, keepdim=True).clamp(min=longest)
        rows = torch.cat([short.new_full((len(short), 1), COUNTING), short * math.sqrt(1 - COUNTING**2)], dim=1)
        both = batch.present["image"] & batch.present["class"]
        return torch.where(both[:, None], rows, rows.new_zeros(())), torch.where(both, batch.tensors["class"], NOTHING)

    def draw(self, released: Tensor, std: float, prompts: Sequence[str], count: int, seed: int) -> list[Record]:
        """Records for public texts, in turn, each of a class (``usable``).

        Args: released: as ``release_class_sums`` gives it; std: of its noise, on the diagonal of x x^T or on x.
        """
        found = fit(released, std, self.settings)
        of_class = classes_of(prompts, self.settings.classes)
        generator = torch.Generator().manual_seed(seed)
        made: list[Record] = []
        for start in range(0, count, _AT_ONCE):
            asked = [i % len(prompts) for i in range(start, min(start + _AT_ONCE, count))]
            classes = of_class[asked]
            normal = torch.randn(len(asked), self.entries - 1, generator=generator, dtype=torch.float64)
            away = found.means[classes] + torch.einsum("rd,rde->re", normal, found.roots[classes])
            pictures = self.codec.decode(self._latents(away + self.origin))
            made += [
                Record(id=f"warm/{start + i}", unit=f"warm/{start + i:09d}", text=prompts[asked[i]], image=picture)
                for i, picture in enumerate(pictures)
            ]
        return made

    def in_words(self) -> str:
        """What is released, for the claim's boundary."""
        what = "how many its records are, the sum of their pictures" + (
            ", and the sum of products of two entries of a picture" if self.settings.products else ""
        )
        names = ", ".join(one.name for one in self.settings.classes)
        return (
            f"one noisy sum over all units: for each of {self.classes} public classes ({names}; a public list of terms, written "
            f"without looking at private records) {what}, all over public constants"
        )

    def _plain(self, shape: tuple[int, int, int], level: float) -> Tensor:
        return self.codec.coder.latents(torch.full((1, shape[2], shape[0], shape[1]), level)).flatten(1)

    def _scaled(self, latents: Tensor) -> Tensor:
        """Entries whose length is the root mean square of a picture's (kept) grey levels, which are in [-1, 1]."""
        return latents / math.sqrt(latents.shape[1])

    def _latents(self, scaled: Tensor) -> Tensor:
        return (scaled * math.sqrt(scaled.shape[1])).float()


_AT_ONCE = 256


def classes_of(texts: Sequence[str | None], classes: Sequence[TermAxis]) -> Tensor:
    """(R,) int64: the first class that a text says, -1 for none."""
    told = terms.encode(texts, classes)[0] > 0
    return torch.where(told.any(dim=1), told.int().argmax(dim=1), NOTHING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussians:
    """Attributes:
    shares: (K,) of all units that are records of a class, noisy, not below 0.
    means: (K, D), counted from the public level; roots: (K, D, D), symmetric: root root is the covariance.
    """

    shares: Tensor
    means: Tensor
    roots: Tensor


def fit(released: Tensor, std: float, settings: ClassMoments) -> Gaussians:
    """Means and covariances of a release, float64. A class that is lost in the noise has those of all classes together.

    Args: released: (K, E, E) or (K, E), over N; std: of the noise on its diagonal (on every entry), over N too.
    """
    scale = math.sqrt(1 - COUNTING**2) / settings.longest  # of u within x
    if released.dim() == 2:
        shares = released[:, 0] / COUNTING
        means = released[:, 1:] / scale
        noise = std / COUNTING
    else:
        shares = released[:, 0, 0] / COUNTING**2
        means = released[:, 0, 1:] / (COUNTING * scale)
        noise = std / COUNTING**2
    seen = shares > _SEEN * noise
    together = torch.where(seen, shares, 0).sum().clamp(min=noise)
    middle = torch.where(seen[:, None], means, 0).sum(0) / together
    means = torch.where(seen[:, None], means / shares[:, None].clamp(min=noise), middle)
    width = means.shape[1]
    if released.dim() == 2:  # nothing is known of how pictures of a class differ
        roots = torch.zeros(len(means), width, width, dtype=torch.float64)
        return Gaussians(shares=shares.clamp(min=0), means=means, roots=roots)
    off = std / math.sqrt(2) / scale**2  # noise of an entry off the diagonal
    seconds = released[:, 1:, 1:] / scale**2
    spread = means[:, :, None] * means[:, None]  # of the means
    pooled = torch.where(seen[:, None, None], seconds, 0).sum(0) / together
    pooled = pooled - torch.where(seen[:, None, None], spread * shares[:, None, None], 0).sum(0) / together
    pooled = without_noise(pooled, off * math.sqrt(int(seen.sum())) / float(together))
    roots = []
    for number in range(len(means)):
        if seen[number]:
            share = float(shares[number])
            own = seconds[number] / share - spread[number]
            roots.append(root(pooled + without_noise(own - pooled, off / share)))
        else:
            roots.append(root(pooled))
    return Gaussians(shares=shares.clamp(min=0), means=means, roots=torch.stack(roots))


_SEEN = 4.0  # noise's standard deviations that a class's share must have


def without_noise(matrix: Tensor, std: float) -> Tensor:
    """A symmetric matrix whose entries off the diagonal bear noise of ``std``, with its eigenvalues l shrunk to
    sign(l) sqrt(l^2 - 4 d std^2), and to 0 inside the noise's own semicircle: the best for squared error, as d grows."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = (values.square() - 4 * len(matrix) * std**2).clamp(min=0).sqrt() * values.sign()
    return (vectors * kept) @ vectors.T


def root(matrix: Tensor) -> Tensor:
    """The symmetric root of the part of a symmetric matrix that is a covariance."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
