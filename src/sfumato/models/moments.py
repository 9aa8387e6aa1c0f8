"""What released latents say of the clean ones, in closed form: means, covariances, and the linear dependence of pictures on
texts. Post-processing of the release: pure functions of its numbers and of the known noise.

z~ = z + N(0, s_z^2), c~ = c + N(0, s_c^2), independent. So mean(z~) estimates mean(z), cov(c~) - s_c^2 estimates cov(c), and
cov(z~, c~) estimates cov(z, c), all without bias. What the noise drowns is taken out: singular values by the optimal
shrinker, eigenvalues below the edge of the noise are zero.

Errors in variables: z is to be predicted from the clean c, but only c~ is there. E[z | c~] = mean(z) + A (E[c | c~] - mean(c))
where z depends linearly on c, with the same A as E[z | c]. So E[c | c~] is the condition in training, and the clean
embedding of a prompt takes its place afterwards. Regressing on c~ itself would shrink A (attenuation).

Sources: Fuller 1987, *Measurement Error Models*, section 1.2 (attenuation, and its correction by known noise); Gavish &
Donoho 2017, arXiv:1405.7511 (the shrinker, for squared error). Differs: the matrix is a cross-covariance, whose noise is taken as white.

Shapes: R rows, D entries of z, E of c.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Estimates from a release, float64.

    Attributes:
      mean_z, mean_c: (D,), (E,).
      slope: (D, E), A.
      given_c: (D, D), covariance of z given the clean c.
      given_release: (D, D), of z given c~: that, and what c~ leaves open of c.
      posterior: (E, E), E[c | c~] = mean_c + posterior (c~ - mean_c).
    """

    mean_z: Tensor
    mean_c: Tensor
    slope: Tensor
    given_c: Tensor
    given_release: Tensor
    posterior: Tensor

    def condition(self, released_c: Tensor) -> Tensor:
        """E[c | c~], (R, E)."""
        return self.mean_c + (released_c - self.mean_c) @ self.posterior.T

    def mean(self, c: Tensor) -> Tensor:
        """E[z | c] of clean embeddings, E[z | c~] of ``condition``'s, (R, D)."""
        return self.mean_z + (c - self.mean_c) @ self.slope.T

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def fit(z: Tensor, c: Tensor, noise_z: float, noise_c: float) -> Moments:
    """Args: z (R, D), c (R, E) released; their noise's standard deviations."""
    z, c = z.double(), c.double()
    rows = len(z)
    mean_z, mean_c = z.mean(0), c.mean(0)
    z, c = z - mean_z, c - mean_c
    cross = shrunk((z.T @ c) / rows, z.square().mean(0).sqrt(), c.square().mean(0).sqrt(), rows)
    of_c = _clean_covariance(c, noise_c)
    values, vectors = torch.linalg.eigh(of_c)
    edge = _edge(c, noise_c)
    slope = cross @ vectors @ torch.diag(1 / (values + edge)) @ vectors.T
    posterior = of_c @ torch.linalg.inv(of_c + (noise_c**2 + 1e-12) * torch.eye(len(of_c), dtype=of_c.dtype))
    left_open = of_c - posterior @ of_c
    given_c = _positive(_clean_covariance(z, noise_z) - slope @ of_c @ slope.T)
    return Moments(
        mean_z=mean_z,
        mean_c=mean_c,
        slope=slope,
        given_c=given_c,
        given_release=given_c + _positive(slope @ left_open @ slope.T),
        posterior=posterior,
    )


def shrunk(cross: Tensor, std_z: Tensor, std_c: Tensor, rows: int) -> Tensor:
    """A cross-covariance (D, E) of so many rows with its singular values shrunk, after division by the standard deviations
    of the rows' entries, noise included: pure noise then has entries of standard deviation 1 / sqrt(rows)."""
    scale = std_z[:, None].clamp(min=1e-12) * std_c.clamp(min=1e-12)
    left, values, right = torch.linalg.svd(cross / scale, full_matrices=False)
    small, large = sorted(cross.shape)
    beta = small / large
    unit = values * math.sqrt(rows / large)
    inside = ((unit**2 - beta - 1) ** 2 - 4 * beta).clamp(min=0).sqrt() / unit.clamp(min=1e-12)
    kept = torch.where(unit > 1 + math.sqrt(beta), inside, torch.zeros_like(unit)) / math.sqrt(rows / large)
    return (left * kept) @ right * scale


def _edge(centred: Tensor, noise: float) -> float:
    """How far an eigenvalue of the noise's covariance strays from noise^2 (Marchenko & Pastur 1967): 2 sqrt(d / rows)."""
    rows, dimension = centred.shape
    return noise**2 * (2 * math.sqrt(dimension / rows) + dimension / rows)


def _clean_covariance(centred: Tensor, noise: float) -> Tensor:
    """cov(z~) - noise^2, without the eigenvalues that noise alone would explain."""
    dimension = centred.shape[1]
    raw = centred.T @ centred / len(centred) - noise**2 * torch.eye(dimension, dtype=centred.dtype)
    values, vectors = torch.linalg.eigh(raw)
    kept = torch.where(values > _edge(centred, noise), values, torch.zeros_like(values))
    return (vectors * kept) @ vectors.T


def _positive(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0)) @ vectors.T
