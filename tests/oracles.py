"""The slowest and most obvious implementations, written without the package's gradient code.

A *step* is a function ``step(model, losses, batch, *, max_grad_norm, noise_multiplier, expected_batch_size, random)``
that moves the model's parameters once, with learning rate 1. ``losses(model, batch)`` gives one loss per unit.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable

Losses = Callable[[nn.Module, Batch], Tensor]
Step = Callable[..., None]


def vector(model: nn.Module) -> Tensor:
    """All trainable parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def one_unit_at_a_time(model: nn.Module, losses: Losses, batch: Batch, max_grad_norm: float) -> Tensor:
    """(P,) float64: the sum of clipped gradients; a plain float64 copy of the model, one backward pass per unit."""
    model = copy.deepcopy(model).double()
    total = torch.zeros_like(vector(model))
    for unit in range(batch.num_units):
        model.zero_grad()
        losses(model, only(batch, unit)).sum().backward()
        gradient = torch.cat(
            [
                (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
                for p in model.parameters()
                if p.requires_grad
            ]
        )
        norm = gradient.norm().item()
        if norm == norm and norm != float("inf"):
            total += gradient * min(1.0, max_grad_norm / max(norm, 1e-300))
    return total


def only(batch: Batch, unit: int) -> Batch:
    """A batch of one unit, in float64."""
    rows = batch.unit == unit
    return Batch(
        tensors={k: v[rows].double() if v.is_floating_point() else v[rows] for k, v in batch.tensors.items()},
        present={k: v[rows] for k, v in batch.present.items()},
        unit=torch.zeros(int(rows.sum()), dtype=torch.int64),
        num_units=1,
    )


def table_of(tensors: dict[str, Tensor], counts: list[int]) -> UnitTable:
    """Unit number i owns the next counts[i] rows."""
    names = [f"{i:04d}" for i, count in enumerate(counts) for _ in range(count)]
    return UnitTable(tensors, names)


def released(
    model: nn.Module,
    losses: Losses,
    table: UnitTable,
    *,
    max_grad_norm: float = 1.0,
    max_physical_batch_size: int | None = None,
    rate: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Batch]:
    """What one step of SGD(lr=1) without noise does, times the expected batch size; and the batch, whole."""
    size = rate * table.num_units
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=max_grad_norm, noise_multiplier=0.0, random=TestRandom(seed), **options
    )
    optimizer = engine.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    before, parts = vector(model), []
    for batch in engine.batches(
        table,
        expected_batch_size=size,
        steps=1,
        records_per_unit=100,
        max_physical_batch_size=max_physical_batch_size,
    ):
        values = losses(model, batch)
        (values.mean() if engine.loss_reduction == "mean" else values.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        parts.append(batch)
    engine.detach()
    return (before - vector(model)) * size, joined(parts)


def joined(parts: list[Batch]) -> Batch:
    starts = [sum(part.num_units for part in parts[:i]) for i in range(len(parts))]
    return Batch(
        tensors={k: torch.cat([part.tensors[k] for part in parts]) for k in parts[0].tensors},
        present={k: torch.cat([part.present[k] for part in parts]) for k in parts[0].present},
        unit=torch.cat([part.unit + start for part, start in zip(parts, starts, strict=True)]),
        num_units=sum(part.num_units for part in parts),
    )


def relative(value: Tensor, expected: Tensor) -> float:
    """The distance in L2 norm, relative to what was expected."""
    return float((value - expected).norm() / expected.norm().clamp(min=1e-300))


# ------------------------------------------------------------------------------------------- exact sensitivity test


def ours(
    model: nn.Module,
    losses: Losses,
    batch: Batch,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    random: TestRandom,
) -> None:
    """The package's step on a given batch, through the public engine: every unit is drawn."""
    names = [f"{unit:04d}" for unit in batch.unit.tolist()]
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier, random=random
    )
    table = UnitTable(batch.tensors, names)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=float(batch.num_units) / expected_batch_size))
    for drawn in engine.batches(table, expected_batch_size=batch.num_units, steps=1, records_per_unit=100):
        losses(model, drawn).mean().backward()
        optimizer.step()
    engine.detach()


def without_last(batch: Batch) -> Batch:
    """The neighbouring batch: the last unit is removed."""
    rows = batch.unit < batch.num_units - 1
    return replace(
        batch,
        tensors={k: v[rows] for k, v in batch.tensors.items()},
        present={k: v[rows] for k, v in batch.present.items()},
        unit=batch.unit[rows],
        num_units=batch.num_units - 1,
    )


def effective_noise_multiplier(step: Step, model: nn.Module, losses: Losses, batch: Batch, **privacy: Any) -> float:
    """Noise of a step over its sensitivity to the last unit: what the accountant should have been told, at most.

    The sensitivity is exact: two runs without noise, with and without the unit. The noise is the root mean square over
    all P coordinates of (with noise) - (without), so it is off by more than 5 / sqrt(2 P) of itself with probability
    below 6e-7.
    """

    def after(batch: Batch, sigma: float) -> Tensor:
        trained = copy.deepcopy(model)
        step(trained, losses, batch, **{**privacy, "noise_multiplier": sigma}, random=TestRandom(1))
        return vector(trained)

    quiet = after(batch, 0.0)
    distance = (quiet - after(without_last(batch), 0.0)).norm()
    noise = (after(batch, privacy["noise_multiplier"]) - quiet).square().mean().sqrt()
    return float(noise / distance)


def effective_joint_noise_multiplier(
    step: Callable[..., list[Tensor]], model: nn.Module, losses: Losses, batch: Batch, *, repeats: int, **privacy: Any
) -> float:
    """The same for a step that releases several vectors, each with noise of its own: (sum_i (D_i / s_i)^2)^(-1/2), where
    D_i is how far the last unit moves the i-th, exactly, and s_i the root mean square of its noise over ``repeats`` runs.
    ``step`` returns what it released.
    """

    def after(batch: Batch, sigma: float, seed: int = 0) -> list[Tensor]:
        trained = copy.deepcopy(model)
        return step(trained, losses, batch, **{**privacy, "noise_multiplier": sigma}, random=TestRandom(seed))

    quiet, without = after(batch, 0.0), after(without_last(batch), 0.0)
    runs = [after(batch, privacy["noise_multiplier"], seed) for seed in range(1, repeats + 1)]
    total = 0.0
    for i, (value, other) in enumerate(zip(quiet, without, strict=True)):
        noise = torch.stack([run[i] - value for run in runs]).square().mean().sqrt()
        total += float((value - other).norm() / noise) ** 2
    return total**-0.5
