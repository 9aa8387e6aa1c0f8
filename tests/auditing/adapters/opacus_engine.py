"""Opacus (1.5 and newer), as its documentation says: Poisson sampling, per-sample gradients, noise on the sum.

Two things are added that its documentation does not ask for, and without which it does not keep its claim for all inputs:
per-sample gradients that are not finite are set to zero (without that a single NaN reaches the weights: museum, row 17), and
models that share a parameter are refused where its hooks would count it wrongly.
"""

import contextlib
import warnings

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from tests.auditing.adapters import loop

from sfumato.auditing.conformance import Run, Trainer


@contextlib.contextmanager
def as_it_is():
    """Opacus warns of inputs that need no gradient, and of orders, which is as it should be here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def private(model, noise_multiplier, generator):
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=loop.C,
        expected_batch_size=loop.EXPECTED,
        loss_reduction="mean",
        generator=generator,
    )
    return wrapped, optimizer


def zero_what_is_not_finite(model):
    """A unit with a number that is not finite anywhere counts as zero everywhere."""
    samples = [p.grad_sample for p in model.parameters()]
    if not len(samples[0]):
        return
    finite = torch.stack([s.flatten(1).isfinite().all(1) for s in samples]).all(0)
    for sample in samples:
        sample[~finite] = 0.0


def step_of(guarded):
    def step(model, inputs, noise_multiplier, generator):
        wrapped, optimizer = private(model, noise_multiplier, generator)
        with as_it_is():
            wrapped(inputs).sum().backward()
        if guarded:
            zero_what_is_not_finite(model)
        optimizer.step()
        wrapped.to_standard_module()
        optimizer.zero_grad()

    return step


def train(model, batches, noise_multiplier, generator):
    wrapped, optimizer = private(model, noise_multiplier, generator)
    charged = []
    optimizer.attach_step_hook(lambda optimizer: charged.append(optimizer.noise_multiplier))
    for inputs in batches:
        optimizer.zero_grad()
        with as_it_is():
            wrapped(inputs).sum().backward()
        zero_what_is_not_finite(model)
        optimizer.step()
    wrapped.to_standard_module()
    return Run(charged=len(charged), noise_multiplier=noise_multiplier)


def sample(population, sampling_rate, steps, generator):
    sampler = UniformWithReplacementSampler(
        num_samples=population, sample_rate=sampling_rate, generator=generator, steps=steps
    )
    return [np.array(batch, dtype=np.int64) for batch in sampler]


def accountant(noise_multiplier, sampling_rate, steps, delta):
    history = PRVAccountant()
    history.history = [(noise_multiplier, sampling_rate, steps)]
    with as_it_is():
        return float(history.get_epsilon(delta))


def trainer(guarded=True) -> Trainer:
    return loop.trainer(
        name="Opacus" if guarded else "Opacus without a guard against NaN",
        step=step_of(guarded),
        train=train if guarded else None,
        sample=sample,
        accountant=accountant,
        resume=None,
        step_together=None,
        prepare=None,
    )
