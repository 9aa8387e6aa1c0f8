"""One step of the public engine beside the slow reference of the package, which takes one unit at a time in float64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.oracles import only, relative, released, table_of
from torch import Tensor, nn

from sfumato.privacy.gradients.reference import clipped_sum, per_unit_gradients
from sfumato.records import Batch

TOLERANCE = 1e-6


def outputs(result: Any) -> Tensor:
    """(R, N): every number that a model returned for a row."""
    tensors = [result] if isinstance(result, Tensor) else list(torch.utils._pytree.tree_leaves(result))
    return torch.cat([y.flatten(1) for y in tensors if isinstance(y, Tensor)], 1)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Per unit the mean over its rows of a smooth function of all outputs; the units' gradients differ in size."""
    given = {name: tensor for name, tensor in batch.tensors.items() if name != "weight"}
    y = outputs(model(*given.values()))
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)
    return batch.per_unit(((y - target).square() + 0.1 * y.sin()).sum(1) * batch.tensors["weight"])


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose hooks keep a computed weight (torch's own copy refuses these)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach()
    return copy.deepcopy(model)


def reference_gradients(model: nn.Module, batch: Batch, loss: Callable[..., Tensor] = losses) -> Tensor:
    """(B, P): every unit's gradient from a model of its own, so that nothing that one leaves behind meets another."""
    rows = []
    for unit in range(batch.num_units):
        own = copied(model)
        rows.append(per_unit_gradients(own, lambda alone, own=own: loss(own, alone), only(batch, unit)))
    return torch.cat(rows)


def gradients_by_backward(model: nn.Module, batch: Batch, loss: Callable[..., Tensor] = losses) -> Tensor:
    """The same by ``backward()``: the reentrant checkpoint of torch knows no ``autograd.grad``."""
    rows = []
    for unit in range(batch.num_units):
        own = copied(model)
        loss(own, only(batch, unit)).sum().backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters() if p.requires_grad]
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def difference(
    model: nn.Module,
    inputs: Sequence[Tensor],
    counts: list[int],
    *,
    loss: Callable[..., Tensor] = losses,
    reference: Callable[..., Tensor] = reference_gradients,
    at_once: int | None = None,
    seed: int = 0,
) -> float:
    """How far the engine's clipped sum is from the reference's; about half of the units are clipped."""
    rows = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64) * 2
    tensors = {f"x{i}": x.double() if x.is_floating_point() else x for i, x in enumerate(inputs)}
    model = model.double()
    plain = copied(model)
    table = table_of({**tensors, "weight": weight}, counts)
    everyone = table.batch(range(len(counts)), records_per_unit=100)
    norms = reference(plain, everyone, loss).norm(dim=1)
    bound = max(float(norms.median()) * 1.01, 1e-6)
    sums, batch = released(model, loss, table, max_grad_norm=bound, max_physical_batch_size=at_once)
    return relative(sums, clipped_sum(reference(plain, batch, loss), bound))
