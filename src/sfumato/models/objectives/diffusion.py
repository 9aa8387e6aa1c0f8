"""Diffusion: what one record loses, and how pictures are drawn. Karras et al. 2022 (EDM), arXiv:2206.00364.

Shapes: R records, K draws of noise inside one record's loss, D latent entries, E condition width.
``scale`` (D,) is the assumed standard deviation of each latent entry, EDM's sigma_data: one number for pixels, a
spectrum for cosine coefficients. With a spectrum the untrained denoiser is the Wiener filter of that spectrum.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.models.settings import Diffusion, Sampling

Backbone = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # latents (R, K, D), level (R, K), condition (R, K, E) -> (R, K, D)
Denoiser = Callable[
    [Tensor, Tensor], Tensor
]  # noisy (R, K, D), sigma (R, K) -> estimate of the clean latents (R, K, D)


def denoise(backbone: Backbone, noisy: Tensor, sigma: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma)/4), EDM eq. 7 and table 1, entry by entry."""
    sigma_wide = sigma[..., None]
    total = (sigma_wide**2 + scale**2).sqrt()
    inner = backbone(noisy / total, sigma.log() / 4, condition)
    return scale**2 / total**2 * noisy + sigma_wide * scale / total * inner


def noise_levels(settings: Diffusion, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """ln(sigma) ~ N(log_sigma_mean, log_sigma_std^2), EDM table 1."""
    return (torch.randn(shape, generator=generator) * settings.log_sigma_std + settings.log_sigma_mean).exp()


def record_losses(
    backbone: Backbone, clean: Tensor, condition: Tensor, sigma: Tensor, noise: Tensor, scale: Tensor, sigma_data: float
) -> Tensor:
    """One loss per record: the mean over its K draws (noise multiplicity: Dockhorn et al. 2023, arXiv:2210.09929, eq. 6).

    The weight is EDM's (sigma^2 + scale^2) / (sigma scale)^2, times (scale / sigma_data)^2: an entry that is assumed to
    vary little counts little, so the noise of private training is not spent on it. For pixels the factor is 1.

    Args: clean (R, D), or (R, K, D) where every draw has its own copy of the record; condition (R, E), sigma (R, K),
      noise (R, K, D).
    Returns: (R,).
    """
    draws = sigma.shape[1]
    target = clean if clean.dim() == 3 else clean[:, None].expand(-1, draws, -1)
    told = condition[:, None].expand(-1, draws, -1)
    noisy = target + sigma[..., None] * noise
    estimate = denoise(backbone, noisy, sigma, told, scale)
    weight = (sigma[..., None] ** 2 + scale**2) / (sigma[..., None] * sigma_data) ** 2
    return (weight * (estimate - target) ** 2).mean(dim=(1, 2))


def guided(backbone: Backbone, condition: Tensor, scale: Tensor, guidance: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): D + guidance (D - D without condition)."""

    def estimate(noisy: Tensor, sigma: Tensor) -> Tensor:
        told = condition[:, None].expand(-1, noisy.shape[1], -1)
        conditional = denoise(backbone, noisy, sigma, told, scale)
        if guidance == 0:
            return conditional
        free = denoise(backbone, noisy, sigma, torch.zeros_like(told), scale)
        return conditional + guidance * (conditional - free)

    return estimate


def sample(
    denoiser: Denoiser, start: Tensor, settings: Diffusion, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """EDM algorithm 2: Heun's method, with churn if asked. Args: start (R, D) standard normal. Returns: (R, D)."""
    levels = schedule(settings.sigma_min, settings.sigma_max, sampling.steps)
    x = start[:, None] * levels[0]
    rows = x.shape[0]
    for now, then in pairwise(levels):
        if sampling.churn > 0:
            raised = now * (1 + sampling.churn)
            x = x + torch.randn(x.shape, generator=generator) * (raised**2 - now**2).sqrt()
            now = raised
        slope = (x - denoiser(x, now.expand(rows, 1))) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope = (slope + (ahead - denoiser(ahead, then.expand(rows, 1))) / then) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x[:, 0]


def schedule(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """(steps + 1,) noise levels from sigma_max to sigma_min, then 0; EDM eq. 5."""
    ramp = torch.linspace(0, 1, steps)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1)])
