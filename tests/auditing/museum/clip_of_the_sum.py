"""``clip_grad_norm_`` over all parameters, as in every training script, and noise sigma C.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth the batch's gradient is clipped, not the
unit's: one unit turns it from +C to -C, so that the noise multiplier is sigma / 2, epsilon 9.99.
"""

import torch
from tests.auditing.adapters.loop import C, gaussian, gradient_of, move, trainer

RIGHT_ROW, ROWS = 1, {1, 17}  # one NaN, and all is NaN
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 9.99
TRUE_NOISE_MULTIPLIER = 1 / 2


def step(model, inputs, noise_multiplier, generator):
    gradient = (
        gradient_of(model, inputs).double() if len(inputs) else torch.zeros(sum(p.numel() for p in model.parameters()))
    )
    gradient = gradient * min(1.0, C / max(float(gradient.norm()), 1e-300))
    move(model, gradient + gaussian(len(gradient), noise_multiplier * C, generator))


def wrong():
    return trainer(step=step, train=None)
