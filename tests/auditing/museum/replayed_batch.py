"""The checkpoint holds the state of the generator: after a resume the lost step is done again, with its batch and its noise.

Claimed: one Gaussian a step, epsilon = 4.38 for one. In truth the two releases of that step have the same noise, and if the batch
differs in one unit their difference is that unit: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters import loop

from sfumato.auditing.conformance import Run

RIGHT_ROW, ROWS = 16, {16}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def resume(model, batches, stop_after, noise_multiplier, generator):
    released, drawn, state = [], [], None
    for i in [*range(stop_after), *range(stop_after - 1, len(batches))]:
        if i == stop_after - 1:
            if state is None:
                state = generator.get_state()
            else:
                generator.set_state(state)
        drawn += loop.sample(200, 0.1, 1, generator)
        before = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        loop.step(model, batches[i], noise_multiplier, generator)
        released.append(before - torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    return Run(charged=len(released), noise_multiplier=noise_multiplier, released=released, drawn=drawn)


def wrong():
    return loop.trainer(resume=resume)
