"""Bugs that the suite puts into any trainer, from outside: the positive controls.

Each has the face of ``Bench.run`` with the unbroken bench first. Where a bug needs the trainer's help (a unit that is
clipped in pieces, say), the units are given to it in pieces: then the trainer itself clips wrongly.
"""

import torch
from torch import Tensor

from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.bench import Bench, Released


def less_noise(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Half of the noise."""
    return _with_noise(bench, inputs, sigma, seed, kind, 0.5)


def hardly_any_noise(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """A fiftieth of the noise."""
    return _with_noise(bench, inputs, sigma, seed, kind, 0.02)


def _with_noise(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str, factor: float) -> Released:
    quiet = bench.run(inputs, 0.0, 0, kind)
    return quiet.plus(bench.run(inputs, sigma, seed, kind).minus(quiet), factor) if sigma else quiet


def noise_by_batch(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Sum and noise divided by the size of the actual batch."""
    return bench.run(inputs, sigma, seed, kind).scaled(1 / max(len(inputs), 1))


def units_twice(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Every unit is clipped and added twice."""
    return bench.run(inputs.repeat_interleave(2, 0), sigma, seed, kind)


def layers_twice(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Right on the probe, but ordinary layers count every unit twice."""
    return bench.run(inputs if kind == "probe" else inputs.repeat_interleave(2, 0), sigma, seed, kind)


def tensor_by_tensor(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Every unit is clipped tensor by tensor, each to C."""
    masks = torch.stack([_mask(i) for i in range(len(probe.SIZES))]).to(inputs.dtype)
    return bench.run((inputs[:, None] * masks).flatten(0, 1), sigma, seed, kind)


def by_coordinates(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Every unit is clipped in 32 pieces, each of every 32nd coordinate."""
    masks = (torch.arange(inputs.shape[1])[None] % 32 == torch.arange(32)[:, None]).to(inputs.dtype)
    return bench.run((inputs[:, None] * masks).flatten(0, 1), sigma, seed, kind)


def the_mean(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """The units' mean is clipped."""
    return bench.run(inputs.mean(0, keepdim=True) if len(inputs) else inputs, sigma, seed, kind)


def in_pairs(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Micro-batches of two, whose means are clipped."""
    pairs = [inputs[i : i + 2].mean(0) for i in range(0, len(inputs), 2)]
    return bench.run(torch.stack(pairs) if pairs else inputs, sigma, seed, kind)


def nothing_for_nobody(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """An empty batch is no step."""
    return bench.run(inputs, sigma, seed, kind) if len(inputs) else bench.rest().scaled(0.0)


def not_a_number(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """What is not finite comes through."""
    released = bench.run(inputs, sigma, seed, kind)
    return released if bool(inputs.isfinite().all()) else released.scaled(float("nan"))


def half_precision(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Noise of float16, added to a sum of more digits."""
    quiet = bench.run(inputs, 0.0, 0, kind)
    if not sigma:
        return quiet
    noise = bench.run(inputs, sigma, seed, kind).minus(quiet)
    size = float(noise.vector.abs().max())  # float16 ends at 65504 and has few digits below 6e-5
    return quiet.plus(Released(tuple((b / size).half().double() * size for b in noise.blocks), noise.tensors))


def low_bits(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """Something below the grid is added that depends on the units."""
    released = bench.run(inputs, sigma, seed, kind)
    return released.scaled(1 + 2.0**-36) if sigma else released


def one_tensor_bare(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """One tensor gets no noise."""
    quiet = bench.run(inputs, 0.0, 0, kind)
    noisy = bench.run(inputs, sigma, seed, kind)
    return Released((quiet.blocks[0], *noisy.blocks[1:]), noisy.tensors)


def one_noise(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """The same noise in every step."""
    quiet = bench.run(inputs, 0.0, 0, kind)
    return quiet.plus(bench.run(inputs, sigma, 1, kind).minus(quiet)) if sigma else quiet


def _mask(index: int) -> Tensor:
    return (probe.in_tensor(index) != 0).double()


def bare_count(bench: Bench, inputs: Tensor, sigma: float, seed: int, kind: str) -> Released:
    """How many units there are is released beside the sum, as it is."""
    released = bench.run(inputs, sigma, seed, kind)
    return Released((*released.blocks, torch.tensor([float(len(inputs))]).double()), released.tensors)
