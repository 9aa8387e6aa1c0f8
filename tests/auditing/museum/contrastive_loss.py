"""InfoNCE: every unit's loss has all the others of its batch as negatives, and is clipped as if it were its own.

Claimed: epsilon = 4.38 for one Gaussian step. In truth a unit moves the gradients of all others: with B units up to
(2 B - 1) C, so that the noise multiplier is sigma / (2 B - 1); with B = 4, epsilon = 53.6.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, trainer

RIGHT_ROW, ROWS = 6, {6}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 53.58
TRUE_NOISE_MULTIPLIER = 1 / (2 * EXPECTED - 1)


class Contrastive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)

    def forward(self, inputs):
        scores = self.left(inputs[:, :3]) @ self.right(inputs[:, 3:]).T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(inputs)), reduction="none")


def wrong():
    return trainer(model=Contrastive)
