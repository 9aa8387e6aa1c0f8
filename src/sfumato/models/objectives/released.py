"""Diffusion on latents that were released with noise: what can be learnt of the clean ones, exactly, and what cannot.

A released latent is z~ = z0 + sigma_0 n. A further noised one, z_t = z~ + sqrt(sigma_t^2 - sigma_0^2) n', has the law of a
clean latent at level sigma_t > sigma_0, so only the target is to be corrected (Tweedie's formula at both levels):

    E[z0 | z_t] = z_t + sigma_t^2 / (sigma_t^2 - sigma_0^2) (E[z~ | z_t] - z_t).

E[z~ | z_t] can be regressed from releases; taken for E[z0 | z_t] it is biased. Below sigma_0 nothing can be learnt: sampling
ends there, with E[z0 | z_t]. z0 is the clipped latent.

Source: Daras, Dimakis & Daskalakis 2024, arXiv:2404.10177.
Differs: sigma_0 by entry, so that modalities with noise of their own go through one network.

Shapes: R rows, K draws, D latent entries.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sfumato.models.objectives.diffusion import Denoiser


def share(sigma_t: Tensor, sigma_0: Tensor) -> Tensor:
    """(sigma_t^2 - sigma_0^2) / sigma_t^2, in (0, 1): how much of the noise at level sigma_t was not in the release."""
    return 1.0 - (sigma_0 / sigma_t) ** 2


def noised(released: Tensor, sigma_t: Tensor, sigma_0: Tensor, noise: Tensor) -> Tensor:
    """z_t = z~ + sqrt(sigma_t^2 - sigma_0^2) n'. All broadcast together; sigma_t >= sigma_0."""
    return released + (sigma_t**2 - sigma_0**2).sqrt() * noise


def clean_mean(noisy: Tensor, released_mean: Tensor, sigma_t: Tensor, sigma_0: Tensor) -> Tensor:
    """E[z0 | z_t] from E[z~ | z_t]."""
    return noisy + (released_mean - noisy) / share(sigma_t, sigma_0)


def released_mean(noisy: Tensor, clean_mean: Tensor, sigma_t: Tensor, sigma_0: Tensor) -> Tensor:
    """E[z~ | z_t] from E[z0 | z_t]: what a denoiser of clean latents predicts of the released ones."""
    return noisy + (clean_mean - noisy) * share(sigma_t, sigma_0)


def levels(sigma_0: Tensor, least: float, most: float, uniform: Tensor) -> Tensor:
    """Noise levels sigma_t = r sigma_0, ln r uniform between ln ``least`` > 0 and ln ``most``. Args: uniform (R, K)."""
    low, high = torch.tensor([least, most], dtype=uniform.dtype).log()
    return (low + (high - low) * uniform).exp()[..., None] * sigma_0


def record_losses(denoiser: Denoiser, released: Tensor, sigma_0: Tensor, ratio: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the predicted released latent, in units of sigma_0^2; its minimum is the exact E[z0 | z_t].

    Args: denoiser: (z_t, ratio) -> the estimate of E[z0 | z_t]; released (R, D), sigma_0 (D,), ratio (R, K) = sigma_t /
      sigma_0 > 1, noise (R, K, D).
    Returns: (R,).
    """
    sigma_t = ratio[..., None] * sigma_0
    target = released[:, None]
    noisy = noised(target, sigma_t, sigma_0, noise)
    predicted = released_mean(noisy, denoiser(noisy, ratio), sigma_t, sigma_0)
    return (((predicted - target) / sigma_0) ** 2).mean(dim=(1, 2))


def sample(denoiser: Denoiser, start: Tensor, sigma_0: Tensor, ratios: Tensor) -> Tensor:
    """From noise of level ratios[0] sigma_0 down to ratios[-1] sigma_0 > sigma_0 by Euler's method, and E[z0 | z_t] there.

    Args: start (R, D) standard normal, ratios falling. Returns: (R, D).
    """
    x = (start * ratios[0] * sigma_0)[:, None]
    rows = x.shape[0]
    for now, then in pairwise(ratios):
        clean = denoiser(x, now.expand(rows, 1))
        x = clean + (x - clean) * (then / now)
    return denoiser(x, ratios[-1].expand(rows, 1))[:, 0]
