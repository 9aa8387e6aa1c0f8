"""Diffusion: what one record loses, and how pictures are drawn. Karras et al. 2022 (EDM), arXiv:2206.00364.

Shapes: R records, K draws of noise inside one record's loss, D latent entries, E condition width.
``scale`` (D,) is the assumed standard deviation of each latent entry, EDM's sigma_data: one number for pixels, a
spectrum for cosine coefficients. With a spectrum the untrained denoiser is the Wiener filter of that spectrum.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sfumato.models.settings import Diffusion, Sampling

Backbone = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # latents (R, K, D), level (R, K), condition (R, K, E) -> (R, K, D)
Denoiser = Callable[
    [Tensor, Tensor], Tensor
]  # noisy (R, K, D), sigma (R, K) -> estimate of the clean latents (R, K, D)


Prediction = Literal["v", "x0", "eps"]


def denoise(
    backbone: Backbone, noisy: Tensor, sigma: Tensor, condition: Tensor, scale: Tensor, prediction: Prediction = "v"
) -> Tensor:
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma)/4), EDM eq. 7, entry by entry.

    ``v``: table 1. With x / scale for data of unit variance, F is minus the velocity of Salimans & Ho 2022 (arXiv:2202.00512,
    section 4). ``x0``: c_skip 0, c_out scale. ``eps``: c_skip 1, c_out -sigma. c_in is table 1's in all.
    """
    sigma_wide = sigma[..., None]
    total = (sigma_wide**2 + scale**2).sqrt()
    inner = backbone(noisy / total, sigma.log() / 4, condition)
    match prediction:
        case "v":
            return scale**2 / total**2 * noisy + sigma_wide * scale / total * inner
        case "x0":
            return scale * inner
        case "eps":
            return noisy - sigma_wide * inner


def noise_levels(settings: Diffusion, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """ln(sigma) ~ N(log_sigma_mean, log_sigma_std^2), EDM table 1."""
    return (torch.randn(shape, generator=generator) * settings.log_sigma_std + settings.log_sigma_mean).exp()


def even_noise_levels(settings: Diffusion, draws: int) -> Tensor:
    """(draws,): the same distribution's quantiles, spread evenly."""
    middle = (torch.arange(draws) + 0.5) / draws
    return (torch.special.ndtri(middle) * settings.log_sigma_std + settings.log_sigma_mean).exp()


def record_losses(
    backbone: Backbone,
    clean: Tensor,
    condition: Tensor,
    sigma: Tensor,
    noise: Tensor,
    scale: Tensor,
    sigma_data: float,
    prediction: Prediction = "v",
) -> Tensor:
    """One loss per record: the mean over its K draws (noise multiplicity: Dockhorn et al. 2023, arXiv:2210.09929, eq. 6).

    The weight is 1 / c_out^2, as EDM's (sigma^2 + scale^2) / (sigma scale)^2 is, times (scale / sigma_data)^2: an entry that is
    assumed to vary little counts little, so the noise of private training is not spent on it. For pixels the factor is 1.

    Args: clean (R, D), or (R, K, D) where every draw has its own copy of the record; condition (R, E), sigma (R, K),
      noise (R, K, D).
    Returns: (R,).
    """
    draws = sigma.shape[1]
    target = clean if clean.dim() == 3 else clean[:, None].expand(-1, draws, -1)
    told = condition[:, None].expand(-1, draws, -1)
    noisy = target + sigma[..., None] * noise
    estimate = denoise(backbone, noisy, sigma, told, scale, prediction)
    match prediction:
        case "v":
            weight = (sigma[..., None] ** 2 + scale**2) / (sigma[..., None] * sigma_data) ** 2
        case "x0":
            weight = torch.full_like(sigma[..., None], sigma_data**-2)
        case "eps":
            weight = scale**2 / (sigma[..., None] * sigma_data) ** 2
    return (weight * (estimate - target) ** 2).mean(dim=(1, 2))


def guided(
    backbone: Backbone, condition: Tensor, scale: Tensor, guidance: float, prediction: Prediction = "v"
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): D + guidance (D - D without condition)."""

    def estimate(noisy: Tensor, sigma: Tensor) -> Tensor:
        told = condition[:, None].expand(-1, noisy.shape[1], -1)
        conditional = denoise(backbone, noisy, sigma, told, scale, prediction)
        if guidance == 0:
            return conditional
        free = denoise(backbone, noisy, sigma, torch.zeros_like(told), scale, prediction)
        return conditional + guidance * (conditional - free)

    return estimate


def sample(
    denoiser: Denoiser, start: Tensor, settings: Diffusion, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """From noise of level sigma_max to data, by the solver that is asked for. Args: start (R, D) standard normal. Returns: (R, D)."""
    levels = schedule(settings.sigma_min, settings.sigma_max, sampling.steps)
    x = start[:, None] * levels[0]
    match sampling.solver:
        case "dpmpp_2m":
            return _dpmpp_2m(denoiser, x, levels)[:, 0]
        case "ancestral":
            return _ancestral(denoiser, x, levels, generator)[:, 0]
        case _:
            return _edm(denoiser, x, levels, sampling, generator)[:, 0]


def _at(denoiser: Denoiser, x: Tensor, level: Tensor) -> Tensor:
    return denoiser(x, level.expand(x.shape[0], 1))


def _edm(denoiser: Denoiser, x: Tensor, levels: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """EDM algorithm 2; for ``euler`` without its lines 6 to 8."""
    most = math.inf if sampling.churn_max is None else sampling.churn_max
    for now, then in pairwise(levels):
        if sampling.churn > 0 and sampling.churn_min <= now <= most:
            raised = now * (1 + min(sampling.churn / sampling.steps, math.sqrt(2) - 1))
            fresh = torch.randn(x.shape, generator=generator) * sampling.churn_noise
            x = x + fresh * (raised**2 - now**2).sqrt()
            now = raised
        slope = (x - _at(denoiser, x, now)) / now
        ahead = x + (then - now) * slope
        if sampling.solver == "heun" and then > 0:
            slope = (slope + (ahead - _at(denoiser, ahead, then)) / then) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x


def _dpmpp_2m(denoiser: Denoiser, x: Tensor, levels: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), for alpha = 1, where its lambda is -ln(sigma)."""
    before, last = None, None
    for now, then in pairwise(levels):
        clean = _at(denoiser, x, now)
        if then == 0:
            return clean
        step = (now / then).log()
        ahead = clean
        if before is not None and last is not None:
            ratio = last / step
            ahead = clean + (clean - before) / (2 * ratio)
        x = then / now * x - torch.expm1(-step) * ahead
        before, last = clean, step
    return x


def _ancestral(denoiser: Denoiser, x: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestral sampling (Ho, Jain & Abbeel 2020, arXiv:2006.11239, algorithm 2; at any levels: Song et al. 2021,
    arXiv:2011.13456, eq. 47): of the law of x at the next level, given x at this one and the clean estimate."""
    for now, then in pairwise(levels):
        clean = _at(denoiser, x, now)
        keep = (then / now) ** 2
        noise = torch.randn(x.shape, generator=generator) * then * (1 - keep).sqrt()
        x = clean + keep * (x - clean) + noise
    return x


def schedule(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """(steps + 1,) noise levels from sigma_max to sigma_min, then 0; EDM eq. 5."""
    ramp = torch.linspace(0, 1, steps)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1)])
