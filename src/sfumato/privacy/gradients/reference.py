"""The slow and obvious versions, which the fast ones are tested against; and the search for coupled units.

Shapes: R rows, B units, P parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.records import Batch


def per_unit_gradients(model: nn.Module, losses: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """(B, P) float64: the gradient of every unit's loss, from a batch that holds this unit alone.

    The parameters are those that are trainable, in the model's order, flattened; one the loss does not use counts as 0.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for unit in range(batch.num_units):
        loss = losses(_only(batch, unit)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.double().flatten() for g in gradients]))
    size = sum(p.numel() for p in parameters)
    return torch.stack(rows) if rows else torch.zeros(0, size, dtype=torch.float64)


def clipped_sum(gradients: Tensor, max_grad_norm: float) -> Tensor:
    """(B, P) -> (P,): each row scaled down to norm C; a row with a non-finite number counts as zero."""
    total = torch.zeros(gradients.shape[1], dtype=gradients.dtype)
    for gradient in gradients:
        if torch.isfinite(gradient).all():
            total += gradient * min(1.0, max_grad_norm / max(float(gradient.norm()), 1e-300))
    return total


def clipped_sum_of_groups(
    gradients: Tensor, group_of: Tensor, bounds: Sequence[float], *, normalised: bool = False
) -> Tensor:
    """(B, P) -> (P,): each row cut into groups of coordinates, each group scaled down to its bound.

    A row with a non-finite number anywhere counts as zero everywhere. Args: group_of: (P,) int; normalised: scale up too,
    to C / (norm + 0.01) (AUTO-S).
    """
    total = torch.zeros(gradients.shape[1], dtype=gradients.dtype)
    for gradient in gradients:
        if not torch.isfinite(gradient).all():
            continue
        for group, bound in enumerate(bounds):
            mine = group_of == group
            norm = float(gradient[mine].norm())
            factor = bound / (norm + 0.01) if normalised else min(1.0, bound / max(norm, 1e-300))
            total[mine] += gradient[mine] * factor
    return total


def _only(batch: Batch, unit: int) -> Batch:
    rows = batch.unit == unit
    return Batch(
        tensors={name: tensor[rows] for name, tensor in batch.tensors.items()},
        present={name: tensor[rows] for name, tensor in batch.present.items()},
        unit=torch.zeros(int(rows.sum()), dtype=torch.int64),
        num_units=1,
    )


def find_coupling(model: nn.Module, losses: Callable[[Batch], Tensor], batch: Batch) -> str | None:
    """Changes the last unit's data, and looks whether another unit's loss or gradient changes.

    Returns: where the coupling shows first (a module's name, or "the loss"); None if nothing moved.
    """
    if batch.num_units < 2:
        raise UsageError(f"num_units = {batch.num_units} · at least two are needed", next="Give a larger batch.")
    others = batch.unit < batch.num_units - 1
    before = _observed(model, losses, batch, others)
    after = _observed(model, losses, _changed(batch, others), others)
    for name, value in before.outputs.items():
        if name in after.outputs and not _same(value, after.outputs[name]):
            return name
    return None if _same(before.losses, after.losses) and _same(before.gradient, after.gradient) else "the loss"


class _Observed:
    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.losses = torch.zeros(0)
        self.gradient = torch.zeros(0)


def _observed(model: nn.Module, losses: Callable[[Batch], Tensor], batch: Batch, others: Tensor) -> _Observed:
    """Outputs of the leaf modules, losses, and the gradient of their sum, all for the rows of the other units."""
    seen = _Observed()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() > 0 and output.shape[0] == batch.num_rows:
                key = f"{name or 'model'} ({type(module).__name__})"
                seen.outputs.setdefault(key, output.detach()[others].clone())

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    buffers = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = losses(batch)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                before, version, value = buffers[name]
                if buffer is not before or buffer._version != version:  # the others are needed backwards as they are
                    buffer.copy_(value)
    if values.shape != (batch.num_units,):
        raise UsageError(
            f"losses.shape = {tuple(values.shape)} · must be ({batch.num_units},), one loss per unit",
            next="Use batch.per_unit to average the rows of a unit.",
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(values[:-1].sum(), parameters, allow_unused=True, materialize_grads=True)
    seen.losses = values.detach()[:-1]
    seen.gradient = torch.cat([g.flatten() for g in gradients])
    return seen


def _changed(batch: Batch, others: Tensor) -> Batch:
    """The same batch, but that the last unit's rows hold other values of the same kind."""
    generator = np.random.default_rng(0)
    tensors = {}
    for name, tensor in batch.tensors.items():
        tensor = tensor.clone()
        mine = tensor[~others]
        if tensor.dtype.is_floating_point:
            noise = torch.from_numpy(generator.standard_normal(tuple(mine.shape))).to(mine)
            tensor[~others] = mine * 3 + 2 + noise
        else:
            pool = tensor[others].flatten()
            if len(pool):
                tensor[~others] = pool[torch.from_numpy(generator.integers(0, len(pool), tuple(mine.shape)))]
        tensors[name] = tensor
    return Batch(tensors=tensors, present=batch.present, unit=batch.unit, num_units=batch.num_units)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of another order of summation, which a batch's size alone cannot cause here."""
    if a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return bool((a == b).all())
    scale = float(a.abs().max()) if a.numel() else 0.0
    tolerance = 1e-5 if a.dtype != torch.float64 else 1e-10
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-30), equal_nan=True))
