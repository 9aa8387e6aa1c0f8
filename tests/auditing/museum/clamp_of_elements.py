"""A popular wrong version: clamp each element of the averaged gradient to [-c, c], and add noise sigma c.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit can move every one of d elements
from +c to -c: the sensitivity is 2 c sqrt(d), so that the guarantee is vacuous at the size of any model: epsilon grows
as 2 d. Without noise, as it is often written, epsilon is infinite.
"""

from tests.auditing.adapters.loop import C, gaussian, trainer

RIGHT_ROW, ROWS = 2, {1, 2, 4, 17}  # one NaN, and the element is NaN
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 647.0
TRUE_NOISE_MULTIPLIER = 1 / (2 * 256**0.5)  # of the probe, d = 256


def step(model, inputs, noise_multiplier, generator):
    model.zero_grad()
    (model(inputs).sum() / max(len(inputs), 1)).backward()
    for parameter in model.parameters():
        gradient = parameter.grad.clamp(-C, C)
        noise = gaussian(parameter.numel(), noise_multiplier * C, generator).view(parameter.shape)
        parameter.data -= gradient + noise.to(parameter.dtype)


def wrong():
    return trainer(step=step, train=None)
