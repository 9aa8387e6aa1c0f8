"""The gradient of a convolution's weight: a term of its own, because no one way is good for all sizes of picture.

Shapes: R rows, B units, n units with equally many rows, C inputs, O outputs, T rows x positions of one unit, P weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as window
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.privacy.gradients import choice, products
from sfumato.privacy.gradients.terms import (
    CANCELLING,
    KEEP_ALWAYS_BYTES,
    KEEP_BYTES,
    LOOSEST,
    WORK_BYTES,
    Sums,
    Term,
    Units,
    ghost_squares_of,
    looseness,
    same_type,
    squares,
    without,
)

_KEEP_RATIO = 3  # as KEEP_RATIO of linear layers; the other ways cost more here


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a convolution does, in the words of ``torch.ops.aten.convolution``; padding is with zeros."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1
    transposed: bool = False
    output_padding: Sequence[int] = (0,)


class Convolution(Term):
    """A convolution's weight. Args: inputs (R, C, *space); outputs (R, O, *space)."""

    def __init__(self, weight: nn.Parameter, inputs: Tensor, outputs: Tensor, geometry: Geometry) -> None:
        self.parameters = (weight,)
        self.inputs, self.outputs = same_type(inputs, outputs)
        self.geometry = geometry
        self.num_rows = inputs.shape[0]
        self._kept: list[Tensor] | None = None  # (n, P) each, one unit after the other

    def squared_norms(self, units: Units) -> Tensor:
        weight = self.parameters[0]
        size = weight.numel() * self.inputs.element_size()
        held = (self.inputs.numel() + self.outputs.numel()) * self.inputs.element_size()
        keep = units.num_units * size <= min(KEEP_BYTES, max(KEEP_ALWAYS_BYTES, _KEEP_RATIO * held))
        rows_of_unit = int(units.counts.max()) if units.num_units else 0
        padded = zip(self.inputs.shape[2:], self.geometry.padding, strict=True)
        shape = choice.Pictures(
            positions=self.outputs.shape[2:].numel() * rows_of_unit,
            pixels=prod(length + 2 * padding for length, padding in padded) * rows_of_unit,
            inputs=self.inputs.shape[1],
            outputs=self.outputs.shape[1],
            weights=weight.numel(),
            kernel=weight.shape[2:].numel(),
        )
        roundings = products.roundings(shape.inputs) + shape.kernel + products.roundings(shape.outputs)
        ghost = not self.geometry.transposed and self.geometry.groups == 1
        ghost = ghost and looseness(shape.positions, roundings, self.inputs.dtype) <= LOOSEST
        way = choice.cheapest_for_pictures(shape, keep=keep, ghost=ghost, on_cpu=self.inputs.device.type == "cpu")
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.inputs.device)
        if way == "ghost":
            unit_bytes = 3 * shape.pixels**2 * self.inputs.element_size()
            for first, last, rows, part in self._some_units(units, max(1, WORK_BYTES // unit_bytes)):
                for group in part.groups():
                    grams = self._grams(rows, group.rows, group.num_units)
                    out[first:last][group.units] = ghost_squares_of(*grams, roundings)
            return out
        kept = []
        if way == "one by one":
            for unit in range(units.num_units):
                gradient = self._gradient_of(units.rows_of(unit)).reshape(1, -1)
                out[unit] = squares(gradient)[0]
                if keep:
                    kept.append(gradient)
        else:
            for first, last, rows, part in self._some_units(units, max(1, WORK_BYTES // size)):
                gradients = part.add_rows(self._row_gradients(rows))
                out[first:last] = squares(gradients)
                if keep:
                    kept.append(gradients)
        if not keep:  # the sum is made of pieces, each of a length of at most that of its patch times its gradient
            lengths = squares(self.inputs.flatten(1)).sqrt_() * squares(self.outputs.flatten(1)).sqrt_()
            out += CANCELLING * torch.finfo(self.inputs.dtype).eps * shape.kernel * units.add_rows(lengths).square()
        if keep:
            self._kept = kept
            self.inputs, self.outputs = self.inputs[:0], self.outputs[:0]
        return out

    def sums(self, factors: Tensor, units: Units) -> Sums:
        weight = self.parameters[0]
        if self._kept is not None:
            return {weight: _weighted(self._kept, factors, weight)}
        rows = units.spread(factors).to(self.outputs.dtype).view(-1, *[1] * (self.outputs.dim() - 1))
        inputs, outputs = self.inputs, self.outputs
        if inputs.numel() <= outputs.numel():  # the factors go where there is less to multiply
            inputs = inputs * rows
        else:
            outputs = outputs * rows
        return {weight: self._weight_gradient(inputs, outputs, self.geometry, weight)}

    def gradient_of(self, unit: int, units: Units) -> Sums:
        weight = self.parameters[0]
        if self._kept is not None:
            for gradients in self._kept:
                if unit < len(gradients):
                    return {weight: gradients[unit].view(weight.shape)}
                unit -= len(gradients)
        return {weight: self._gradient_of(units.rows_of(unit))}

    def forget(self, bad: Tensor, units: Units) -> None:
        if self._kept is not None:
            parts = torch.split(bad, [len(gradients) for gradients in self._kept])
            self._kept = [without(gradients, part) for gradients, part in zip(self._kept, parts, strict=True)]
        else:
            rows = units.spread(bad)
            self.inputs, self.outputs = without(self.inputs, rows), without(self.outputs, rows)

    def held(self) -> tuple[Tensor, ...]:
        return (self.inputs, self.outputs) if self._kept is None else ()

    def _some_units(self, units: Units, step: int) -> Iterator[tuple[int, int, slice, Units]]:
        """``step`` whole units at a time: first and last, their rows, and how these belong to them."""
        for first in range(0, units.num_units, step):
            last = min(first + step, units.num_units)
            rows = slice(units.starts[first], units.ends[last - 1])
            if units.owner is None:
                yield first, last, rows, Units(None, last - first)
            else:
                yield first, last, rows, Units(units.owner[rows] - first, last - first)

    def _gradient_of(self, rows: slice) -> Tensor:
        weight = self.parameters[0]
        if rows.start == rows.stop:
            return self.inputs.new_zeros(weight.shape)
        return self._weight_gradient(self.inputs[rows], self.outputs[rows], self.geometry, weight)

    def _row_gradients(self, rows: slice) -> Tensor:
        """(rows, P): the rows side by side, as groups of one convolution (Rochette et al. 2019, arXiv:1912.06015)."""
        weight, geometry = self.parameters[0], self.geometry
        inputs, outputs = self.inputs[rows], self.outputs[rows]
        count = inputs.shape[0]
        if count == 0:
            return inputs.new_zeros(0, weight.numel())
        beside = Geometry(
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups * count,
            geometry.transposed,
            geometry.output_padding,
        )
        shape = inputs.new_empty(1).expand((count * weight.shape[0], *weight.shape[1:]))  # only its shape is read
        gradients = self._weight_gradient(
            inputs.reshape(1, -1, *inputs.shape[2:]), outputs.reshape(1, -1, *outputs.shape[2:]), beside, shape
        )
        return gradients.reshape(count, -1)

    @staticmethod
    def _weight_gradient(inputs: Tensor, outputs: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
        shape = inputs.new_empty(1).expand(weight.shape)  # only its shape is read; it may be sharded
        return convolution_backward(outputs, inputs, shape, geometry, (False, True))[1]

    def _grams(self, rows: slice, of: slice | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Gram matrices of patches and of output gradients, (n, T, T) each, for units with equally many rows.

        A patch is a window of the picture, so the product of two patches is the sum over the window of products of
        single positions: the Gram matrix of positions is made once, and added to itself shifted by every offset of the
        window. In the flattened matrix of a padded picture with S positions such a shift is one by offset x (S + 1).
        """
        inputs, outputs = self.inputs[rows][of], self.outputs[rows][of]
        geometry, dimensions = self.geometry, self.inputs.dim() - 2
        kernel = self.parameters[0].shape[2:]
        padded = F.pad(inputs, [n for n in reversed(list(geometry.padding)) for _ in range(2)])
        space = padded.shape[2:]
        x = padded.unflatten(0, (count, -1)).transpose(1, 2).flatten(2)  # (n, C, S of all rows of the unit)
        size = x.shape[2]
        single = products.grams(x.transpose(1, 2)).view(count, size * size)
        steps = [prod(space[i + 1 :]) for i in range(dimensions)]
        total = single if prod(kernel) == 1 else single.clone()
        for offset in window(*(range(k) for k in kernel)):
            shift = (size + 1) * sum(o * d * step for o, d, step in zip(offset, geometry.dilation, steps, strict=True))
            if shift:
                total[:, : size * size - shift] += single[:, shift:]
        per_row = size // prod(space)
        total = total.view(count, per_row, *space, per_row, *space)
        for i, (length, stride) in enumerate(zip(outputs.shape[2:], geometry.stride, strict=True)):
            for axis in (2 + i, 3 + dimensions + i):
                total = total.narrow(axis, 0, (length - 1) * stride + 1)
                if stride > 1:
                    total = total[(slice(None),) * axis + (slice(None, None, stride),)]
        g = outputs.unflatten(0, (count, -1)).transpose(1, 2).flatten(2)  # (n, O, T)
        positions = g.shape[2]
        return total.reshape(count, positions, positions).contiguous(), products.grams(g.transpose(1, 2))


def _weighted(kept: list[Tensor], factors: Tensor, weight: Tensor) -> Tensor:
    """The sum over units of factor x gradient."""
    total = torch.zeros(weight.numel(), dtype=kept[0].dtype, device=kept[0].device)
    if len(kept) == len(factors):  # one by one
        for gradient, factor in zip(kept, factors.tolist(), strict=True):
            total.add_(gradient[0], alpha=factor)
    else:
        parts = torch.split(factors.to(total.dtype), [len(gradients) for gradients in kept])
        for gradients, part in zip(kept, parts, strict=True):
            total.addmv_(gradients.t(), part)
    return total.view(weight.shape)


def convolution_backward(
    outputs: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """(gradient of the inputs, gradient of the weight), each only if wanted."""
    return torch.ops.aten.convolution_backward(
        outputs,
        inputs,
        weight,
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.transposed,
        list(geometry.output_padding),
        geometry.groups,
        [*wanted, False],
    )[:2]
