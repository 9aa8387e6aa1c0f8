"""A network with batch norm: a unit's outputs depend on the others', and running averages of the data leave with it.

Claimed: epsilon = 4.38 for one Gaussian step. In truth the averages have no noise at all: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters import loop

RIGHT_ROW, ROWS = 6, {6, 14}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def forward(self, inputs):
        return (self.layers(inputs[:, :5]).squeeze(1) - inputs[:, 5]).square()


def step(model, inputs, noise_multiplier, generator):
    """A forward pass of the whole batch, which moves the averages; then one unit at a time, with these."""
    if len(inputs) > 1:
        model(inputs)
    model.eval()
    loop.step(model, inputs, noise_multiplier, generator)
    model.train()


def wrong():
    return loop.trainer(model=Normed, step=step)
