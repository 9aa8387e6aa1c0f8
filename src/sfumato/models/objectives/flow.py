"""Flow matching on straight paths: what one record loses, and how records are drawn.

Time 0 is data, 1 is noise. In units of the codec's public ``scale``, z = x / scale, the path is z_t = (1 - t) z + t n with n
standard normal, and its velocity n - z (Liu et al. 2022, arXiv:2209.03003, eq. 1; Lipman et al. 2022, arXiv:2210.02747, eq. 23).

Differs: the network is preconditioned as EDM preconditions a denoiser, so that one of zeros is already the exact flow of data
with that scale, v = (2 t - 1) / d^2 z_t with d^2 = (1 - t)^2 + t^2, and private training need not spend its budget on that.

Shapes: R records, K draws of noise inside one record's loss, D latent entries, E condition width.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.models.objectives.diffusion import Backbone
from sfumato.models.settings import Flow, Sampling

Velocity = Callable[[Tensor, Tensor], Tensor]  # z_t (R, K, D), t (R, K) -> (R, K, D)

_FIRST = 1e-3  # the network is told no time nearer to 0 or 1: their logits are infinite


def velocity(backbone: Backbone, path: Tensor, time: Tensor, condition: Tensor) -> Tensor:
    """v(z_t, t) = (2 t - 1) / d^2 z_t + F(z_t / d; logit(t) / 4) / d: of data of unit variance, F has unit variance to learn.

    logit(t) is ln(sigma) of the diffusion that passes through the same states. Args: path (R, K, D), time (R, K).
    """
    wide = time[..., None]
    length = ((1 - wide) ** 2 + wide**2).sqrt()
    inner = backbone(path / length, time.logit(eps=_FIRST) / 4, condition)
    return (2 * wide - 1) / length**2 * path + inner / length


def times(settings: Flow, shape: tuple[int, ...]) -> Tensor:
    """Logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    return (torch.randn(shape) * settings.logit_time_std + settings.logit_time_mean).sigmoid()


def even_times(settings: Flow, draws: int) -> Tensor:
    """(draws,): the same distribution's quantiles, spread evenly."""
    middle = (torch.arange(draws) + 0.5) / draws
    return (torch.special.ndtri(middle) * settings.logit_time_std + settings.logit_time_mean).sigmoid()


def record_losses(
    backbone: Backbone, clean: Tensor, condition: Tensor, time: Tensor, noise: Tensor, scale: Tensor
) -> Tensor:
    """One loss per record: the mean over its K draws of the squared error of the velocity, in units of the data.

    An entry counts as scale^2 over its mean: one that is assumed to vary little counts little. Where all scales are equal that
    is plain flow matching. Args: clean (R, D), or (R, K, D), a copy for every draw; condition (R, E), time (R, K), noise (R, K, D).
    Returns: (R,).
    """
    draws = time.shape[1]
    z = clean / scale if clean.dim() == 3 else (clean / scale)[:, None].expand(-1, draws, -1)
    told = condition[:, None].expand(-1, draws, -1)
    wide = time[..., None]
    estimate = velocity(backbone, (1 - wide) * z + wide * noise, time, told)
    weight = scale**2 / (scale**2).mean()
    return (weight * (estimate - (noise - z)) ** 2).mean(dim=(1, 2))


def guided(backbone: Backbone, condition: Tensor, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6), of velocities."""

    def estimate(path: Tensor, time: Tensor) -> Tensor:
        told = condition[:, None].expand(-1, path.shape[1], -1)
        conditional = velocity(backbone, path, time, told)
        if guidance == 0:
            return conditional
        return conditional + guidance * (conditional - velocity(backbone, path, time, torch.zeros_like(told)))

    return estimate


def sample(velocity: Velocity, start: Tensor, sampling: Sampling) -> Tensor:
    """dz/dt = v from t = 1 to 0 in equal steps by Euler, Heun or the midpoint rule; the last step of Heun is Euler's.

    Args: start (R, D) standard normal. Returns: (R, D), in units of the scale.
    """
    z = start[:, None]
    rows = z.shape[0]
    for now, then in pairwise(torch.linspace(1.0, 0.0, sampling.steps + 1)):
        step = then - now
        slope = velocity(z, now.expand(rows, 1))
        match sampling.solver:
            case "midpoint":
                slope = velocity(z + step / 2 * slope, (now + step / 2).expand(rows, 1))
            case "heun" if then > 0:
                slope = (slope + velocity(z + step * slope, then.expand(rows, 1))) / 2
        z = z + step * slope
    return z[:, 0]
