"""A popular wrong version: clip every unit's gradient tensor by tensor, each to C, and account the noise sigma C as if the
whole had been clipped to C.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit moves each of L tensors by C, so the
sensitivity is C sqrt(L), the effective noise multiplier sigma / sqrt(L); with L = 6, epsilon = 12.9. Right is C / sqrt(L).
"""

import torch
from tests.oracles import only, vector

from sfumato.privacy.noise import gaussian

NOISE_MULTIPLIER = 1.0
CLAIMED_EPSILON = 4.38
TENSORS = 6
TRUE_EPSILON = 12.87


def step(model, losses, batch, *, max_grad_norm, noise_multiplier, expected_batch_size, random):
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for unit in range(batch.num_units):
        model.zero_grad()
        losses(model, only(batch, unit)).sum().backward()
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += parameter.grad * min(1.0, max_grad_norm / max(float(parameter.grad.norm()), 1e-300))
    model.zero_grad()
    with torch.no_grad():
        for total, parameter in zip(sums, model.parameters(), strict=True):
            noise = gaussian(parameter.numel(), noise_multiplier * max_grad_norm, random).view(parameter.shape)
            parameter -= (total + noise.to(parameter.dtype)) / expected_batch_size
    return [vector(model) * expected_batch_size]
