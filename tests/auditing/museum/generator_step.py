"""A second optimizer (a GAN's generator) also steps on the private batch, with noise of its own; one event is charged for both.

Claimed: one Gaussian a step with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth there are two: sigma / sqrt(2), epsilon 6.6.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, gaussian, trainer

from sfumato.auditing.conformance import Run

RIGHT_ROW, ROWS = 11, {11}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 6.6
TRUE_NOISE_MULTIPLIER = 1 / 2**0.5


def train(model, batches, noise_multiplier, generator):
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for _ in ("discriminator", "generator")]
    charged = 0
    for inputs in batches:
        charged += 1
        for optimizer in optimizers:
            total = clipped_sum(model, inputs)
            noisy = (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED
            for parameter, piece in zip(
                model.parameters(), noisy.split([p.numel() for p in model.parameters()]), strict=True
            ):
                parameter.grad = piece.view(parameter.shape).to(parameter.dtype)
            optimizer.step()
    return Run(charged=charged, noise_multiplier=noise_multiplier)


def wrong():
    return trainer(train=train)
