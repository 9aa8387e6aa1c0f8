"""A private trainer in a plain loop, right: one backward pass for each unit. It gives every call that an adapter can give."""

import numpy as np
import torch

from sfumato.auditing import bounds
from sfumato.auditing.conformance import Claim, Run, Trainer
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event

C, SIGMA, EXPECTED = 0.7, 1.0, 4.0  # clipping bound, noise multiplier, expected batch size
POPULATION, STEPS = 2_000, 500


def clipped(gradient, bound=C):
    if not torch.isfinite(gradient).all():
        return torch.zeros_like(gradient)
    return gradient * min(1.0, bound / max(float(gradient.double().norm()), 1e-300) * (1 - 1e-6))


def gradient_of(model, inputs):
    """(P,): of the sum of the rows' losses."""
    gradients = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def clipped_sum(model, inputs, bound=C):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        total += clipped(gradient_of(model, inputs[row : row + 1]).double(), bound)
    return total


def gaussian(count, std, generator):
    return torch.randn(count, generator=generator, dtype=torch.float64) * std


def move(model, vector):
    """parameters -= vector, which is a step of SGD with learning rate 1."""
    with torch.no_grad():
        sizes = [p.numel() for p in model.parameters()]
        for parameter, piece in zip(model.parameters(), vector.split(sizes), strict=True):
            parameter -= piece.view(parameter.shape).to(parameter.dtype)


def step(model, inputs, noise_multiplier, generator):
    total = clipped_sum(model, inputs)
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def sample(population, sampling_rate, steps, generator):
    return [np.flatnonzero(torch.rand(population, generator=generator) < sampling_rate) for _ in range(steps)]


def train(model, batches, noise_multiplier, generator):
    charged = 0
    for inputs in batches:
        charged += 1
        step(model, inputs, noise_multiplier, generator)
    return Run(charged=charged, noise_multiplier=noise_multiplier)


def resume(model, batches, stop_after, noise_multiplier, generator):
    """The checkpoint is one step old; noise and draws go on where the generator is, and are never restored."""
    released, drawn = [], []
    done = [*range(stop_after), *range(stop_after - 1, len(batches))]
    for i in done:
        drawn += sample(200, 0.1, 1, generator)
        before = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        step(model, batches[i], noise_multiplier, generator)
        released.append(before - torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    return Run(charged=len(done), noise_multiplier=noise_multiplier, released=released, drawn=drawn)


def step_of_persons(model, inputs, owner, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for person in owner.unique():
        rows = inputs[owner == person]
        total += clipped(gradient_of(model, rows).double() / len(rows))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def step_together(model, inputs, noise_multiplier, generator, processes):
    """Each process clips its own units; the sums are added; one noise is added by one of them."""
    total = sum(clipped_sum(model, inputs[rank::processes]) for rank in range(processes))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def accountant(noise_multiplier, sampling_rate, steps, delta):
    event = Event(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, count=steps)
    return accounting.epsilon([event], delta)


class Network(torch.nn.Module):
    """What it is used on: (B, 6), five features and a label -> (B,) losses."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.GroupNorm(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def forward(self, inputs):
        return (self.layers(inputs[:, :5]).squeeze(1) - inputs[:, 5]).square()


def units(count, generator):
    return torch.randn(count, 6, generator=generator)


def claim(**changes):
    delta = 1e-5
    said = {
        "max_grad_norm": C,
        "noise_multiplier": SIGMA,
        "sampling_rate": EXPECTED / POPULATION,
        "population": POPULATION,
        "expected_batch_size": EXPECTED,
        "steps": STEPS,
        "epsilon": accountant(SIGMA, EXPECTED / POPULATION, STEPS, delta),
        "delta": delta,
    }
    return Claim(**{**said, **changes})


def lower_bound(members, nonmembers, delta, confidence):
    return bounds.epsilon_lower_bound(members, nonmembers, delta=delta, confidence=confidence, seed=0)


def trainer(**changes):
    calls = {
        "claim": claim(),
        "step": step,
        "name": "a plain loop",
        "sample": sample,
        "train": train,
        "resume": resume,
        "step_together": step_together,
        "accountant": accountant,
        "model": Network,
        "units": units,
        "prepare": lambda inputs: inputs / 2,
    }
    return Trainer(**{**calls, **changes})


def of_persons():
    """The same, with persons as units."""
    return trainer(
        name="a plain loop over persons",
        claim=claim(unit="person"),
        step_of_persons=step_of_persons,
        lower_bound=lower_bound,
    )
