"""A popular wrong version: clip the averaged gradient, tensor by tensor, and add noise sigma C to each.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit can turn the clipped gradient of
every one of L tensors from +C to -C, whatever the batch size: the sensitivity is 2 C sqrt(L), the effective noise
multiplier sigma / (2 sqrt(L)); with L = 6, epsilon = 32.2.
"""

import torch
from tests.auditing.adapters.loop import C, gaussian, trainer

RIGHT_ROW, ROWS = 1, {1, 4, 17}  # one NaN, and all is NaN
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 32.2
TENSORS = 6
TRUE_NOISE_MULTIPLIER = 1 / (2 * TENSORS**0.5)


def step(model, inputs, noise_multiplier, generator):
    model.zero_grad()
    (model(inputs).sum() / max(len(inputs), 1)).backward()
    for parameter in model.parameters():
        torch.nn.utils.clip_grad_norm_([parameter], C)
        noise = gaussian(parameter.numel(), noise_multiplier * C, generator).view(parameter.shape)
        parameter.data -= parameter.grad + noise.to(parameter.dtype)


def wrong():
    return trainer(step=step, train=None)
