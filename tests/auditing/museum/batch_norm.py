"""A network with batch norm: a unit's outputs depend on the others', and running averages of the data leave with it.

Claimed: epsilon = 4.38 for one Gaussian step. In truth the averages have no noise at all: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import trainer

RIGHT_ROW, ROWS = 6, {6, 14}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def forward(self, inputs):
        return (self.layers(inputs[:, :5]).squeeze(1) - inputs[:, 5]).square()


def step(model, inputs, noise_multiplier, generator):
    """Per-example gradients by functional calls over a running forward pass, as a library would that does not refuse it."""
    model.eval() if len(inputs) < 2 else model(inputs)
    model.eval()
    from tests.auditing.adapters import loop

    loop.step(model, inputs, noise_multiplier, generator)
    model.train()


def wrong():
    return trainer(model=Normed, step=step)
