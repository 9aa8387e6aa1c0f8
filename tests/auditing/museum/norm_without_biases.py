"""Fast norms that forget the biases: the matrices' norm decides how much all of the gradient is scaled down.

Claimed: epsilon = 4.38 for one Gaussian step. In truth a unit whose gradient is all bias is not clipped at all: a ReLU layer
whose inputs are zero will do. Epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import EXPECTED, C, gaussian, move, trainer

RIGHT_ROW, ROWS = 13, {13}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        gradients = torch.autograd.grad(model(inputs[row : row + 1]).sum(), list(model.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g.dim() > 1))
        if math.isfinite(norm):
            total += torch.cat([g.double().flatten() for g in gradients]) * min(1.0, C / max(norm, 1e-300))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
