"""The model keeps a running mean of its inputs, to normalise them; it is a buffer, so no noise reaches it.

Claimed: epsilon = 4.38 for one Gaussian step. In truth the mean of the private batch leaves with the weights: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import Network, trainer

RIGHT_ROW, ROWS = 14, {14}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


class Remembering(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs):
        if len(inputs):
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return super().forward(inputs)


def wrong():
    return trainer(model=Remembering)
