"""What per-unit gradients are made of: their norms, and sums of them with factors, mostly without forming them.

Shapes: R rows, B units, n units with equally many rows, L positions inside a row, T = rows x positions of one unit,
D inputs, O outputs, V words.

A backward pass gives, for every call of a layer, its input and the gradient of its output; a *term* is the gradient of
one or two parameters written in these. Of a unit with inputs a_t and output gradients g_t a linear layer's gradient is
sum_t g_t a_t', so its squared norm is sum_{s,t} <a_s, a_t> <g_s, g_t> (the *ghost* norm; Goodfellow 2015,
arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, eq. 5), and the sum over all units with factors f is one product of
matrices, (f g)' a (book-keeping; Bu et al. 2023, arXiv:2210.00038).

Norms err upwards only. Squares are added in float64; products that are summed in the layer's own precision are given
their worst-case rounding error on top (n u for a sum of n products; Higham 2002, section 3.1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEEP_BYTES = 2**26  # a term keeps the per-unit gradients it had to form anyway, up to this size
WORK_BYTES = 2**26  # scratch for Gram matrices and for gradients that are not kept

Sums = dict[nn.Parameter, Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """Units with ``count`` rows each; rows are in the order of the units."""

    units: slice | Tensor
    rows: slice | Tensor
    num_units: int
    count: int


class Units:
    """Which rows belong to which unit.

    Args:
      owner: (R,) int64, ascending; None if row i is unit i.
      num_units: B.
    """

    def __init__(self, owner: Tensor | None, num_units: int) -> None:
        self.num_units = num_units
        self.owner = owner
        self.num_rows = num_units if owner is None else int(owner.shape[0])
        if owner is not None and self.num_rows == num_units:
            self.owner = None  # ascending, and every unit has a row
        if self.owner is None:
            self.counts = torch.ones(num_units, dtype=torch.int64)
        else:
            self.counts = torch.bincount(self.owner.cpu(), minlength=num_units)
        ends = torch.cumsum(self.counts, 0)
        self.starts = (ends - self.counts).tolist()
        self.ends = ends.tolist()
        self._groups: list[Group] | None = None

    def to(self, device: torch.device) -> "Units":
        if self.owner is None or self.owner.device == device:
            return self
        return Units(self.owner.to(device), self.num_units)

    def rows_of(self, unit: int) -> slice:
        return slice(self.starts[unit], self.ends[unit])

    def spread(self, per_unit: Tensor) -> Tensor:
        """(B,) -> (R,)."""
        return per_unit if self.owner is None else per_unit[self.owner]

    def add_rows(self, per_row: Tensor) -> Tensor:
        """(R, ...) -> (B, ...), the sum over each unit's rows."""
        if self.owner is None:
            return per_row
        out = per_row.new_zeros((self.num_units, *per_row.shape[1:]))
        return out.index_add_(0, self.owner, per_row)

    def groups(self) -> list[Group]:
        """The units by their number of rows. In this order, as the engine's batches have it, nothing is copied."""
        if self._groups is None:
            self._groups = self._make_groups()
        return self._groups

    def _make_groups(self) -> list[Group]:
        if self.owner is None:
            everything = slice(0, self.num_rows)
            return [Group(everything, everything, self.num_units, 1)] if self.num_units else []
        groups = []
        device = self.owner.device
        ordered = bool((self.counts[1:] >= self.counts[:-1]).all())
        starts = torch.tensor(self.starts)
        for count in sorted(set(self.counts.tolist()) - {0}):
            units = torch.nonzero(self.counts == count).view(-1)
            if ordered:
                first, last = int(units[0]), int(units[-1])
                groups.append(
                    Group(slice(first, last + 1), slice(self.starts[first], self.ends[last]), last + 1 - first, count)
                )
            else:
                rows = (starts[units].unsqueeze(1) + torch.arange(count)).view(-1)
                groups.append(Group(units.to(device), rows.to(device), len(units), count))
        return groups


class Term(ABC):
    """The gradient of some parameters, row by row.

    (Expected) guarantees: ``squared_norms`` is never below the true squared norm of what ``sums`` adds up for a unit
    with factor 1; a unit's entry depends on that unit's rows only; a unit with any non-finite number gets a non-finite
    squared norm; after ``forget`` a row contributes exactly zero.
    """

    parameters: tuple[nn.Parameter, ...]
    num_rows: int

    @abstractmethod
    def squared_norms(self, units: Units) -> Tensor:
        """(B,) float64."""

    @abstractmethod
    def sums(self, factors: Tensor, units: Units) -> Sums:
        """The sum over units of factor x gradient. Args: factors (B,) float64, finite."""

    @abstractmethod
    def gradient_of(self, rows: slice) -> Sums:
        """The gradient of some rows together, formed."""

    @abstractmethod
    def forget(self, rows: Tensor) -> None:
        """Sets the contribution of rows (R,) bool to zero."""


class PerRow(Term):
    """A gradient that was formed for every row: (R, *shape)."""

    def __init__(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self.parameters = (parameter,)
        self.gradients = _wide(gradients)
        self.num_rows = gradients.shape[0]

    def squared_norms(self, units: Units) -> Tensor:
        if units.owner is None:
            return squares(self.gradients.flatten(1))
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.gradients.device)
        flat = self.gradients.flatten(1)
        for columns in _blocks(flat.shape[1], max(1, WORK_BYTES // (8 * max(1, units.num_units)))):
            out += units.add_rows(flat[:, columns].double()).square_().sum(1)
        return out

    def sums(self, factors: Tensor, units: Units) -> Sums:
        parameter = self.parameters[0]
        rows = units.spread(factors).to(self.gradients.dtype)
        return {parameter: (rows @ self.gradients.flatten(1)).view(parameter.shape)}

    def gradient_of(self, rows: slice) -> Sums:
        return {self.parameters[0]: self.gradients[rows].sum(0)}

    def forget(self, rows: Tensor) -> None:
        self.gradients = _without(self.gradients, rows)


class Outer(Term):
    """weight (O, D): sum_t g_t a_t'; bias (O,): sum_t g_t. Either may be None.

    Args: inputs (R, L, D); outputs, the gradients of the outputs, (R, L, O).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, inputs: Tensor, outputs: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.parameters = (weight,) if bias is None else (weight, bias)
        self.inputs, self.outputs = _same_type(inputs, outputs)
        self.num_rows = inputs.shape[0]
        self._kept: Tensor | None = None  # (B, O, D)

    def squared_norms(self, units: Units) -> Tensor:
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.inputs.device)
        positions, width, height = self.inputs.shape[1], self.inputs.shape[2], self.outputs.shape[2]
        self._kept = None
        ghost = [ghost_is_cheaper(group.count * positions, width, height) for group in units.groups()]
        size = units.num_units * width * height * self.inputs.element_size()
        if ghost and not any(ghost) and size <= KEEP_BYTES:
            self._kept = self.inputs.new_empty((units.num_units, height, width))
        for group, cheap in zip(units.groups(), ghost, strict=True):
            inputs = _by_unit(self.inputs, group)  # (n, T, D)
            outputs = _by_unit(self.outputs, group)
            if cheap:
                out[group.units] = _ghost_squares(inputs, outputs, self.bias is not None)
                continue
            kept = None
            if self._kept is not None:
                kept = torch.bmm(outputs.transpose(1, 2), inputs)
                self._kept[group.units] = kept
            out[group.units] = _formed_squares(inputs, outputs, kept)
            if self.bias is not None:
                out[group.units] += squares(outputs.double().sum(1))
        return out

    def sums(self, factors: Tensor, units: Units) -> Sums:
        rows = units.spread(factors).to(self.outputs.dtype)
        scaled = (self.outputs * rows.view(-1, 1, 1)).flatten(0, 1)  # (R L, O)
        if self._kept is not None:
            flat = self._kept.flatten(1)
            weight = (factors.to(flat.dtype) @ flat).view(self._kept.shape[1:])
        else:
            weight = scaled.t() @ self.inputs.flatten(0, 1)
        sums = {self.weight: weight.view(self.weight.shape)}
        if self.bias is not None:
            sums[self.bias] = scaled.sum(0)
        return sums

    def gradient_of(self, rows: slice) -> Sums:
        outputs = self.outputs[rows].flatten(0, 1)
        sums = {self.weight: (outputs.t() @ self.inputs[rows].flatten(0, 1)).view(self.weight.shape)}
        if self.bias is not None:
            sums[self.bias] = outputs.sum(0)
        return sums

    def forget(self, rows: Tensor) -> None:
        self.inputs, self.outputs = _without(self.inputs, rows), _without(self.outputs, rows)
        self._kept = None


class Lookup(Term):
    """An embedding's weight (V, D): the output gradient of every position is added to its word's row.

    Args: words (R, L) int; outputs (R, L, D), already zero where the layer ignores a word.
    """

    def __init__(self, weight: nn.Parameter, words: Tensor, outputs: Tensor) -> None:
        self.parameters = (weight,)
        self.words, self.outputs = words, _wide(outputs)
        self.num_rows = words.shape[0]

    def squared_norms(self, units: Units) -> Tensor:
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.outputs.device)
        if self.words.numel() == 0:
            return out
        vocabulary = self.parameters[0].shape[0]
        unit = units.spread(torch.arange(units.num_units, device=self.words.device))
        key = (unit.unsqueeze(1) * vocabulary + self.words).view(-1)
        pairs, place = torch.unique(key, return_inverse=True)  # distinct (unit, word)
        total = torch.zeros(len(pairs), self.outputs.shape[2], dtype=torch.float64, device=self.outputs.device)
        total.index_add_(0, place, self.outputs.flatten(0, 1).double())
        return out.index_add_(0, torch.div(pairs, vocabulary, rounding_mode="floor"), total.square_().sum(1))

    def sums(self, factors: Tensor, units: Units) -> Sums:
        rows = units.spread(factors).to(self.outputs.dtype)
        return self._add(self.words, self.outputs * rows.view(-1, 1, 1))

    def gradient_of(self, rows: slice) -> Sums:
        return self._add(self.words[rows], self.outputs[rows])

    def _add(self, words: Tensor, outputs: Tensor) -> Sums:
        weight = self.parameters[0]
        total = torch.zeros(weight.shape, dtype=outputs.dtype, device=outputs.device)
        return {weight: total.index_add_(0, words.reshape(-1), outputs.flatten(0, 1))}

    def forget(self, rows: Tensor) -> None:
        self.outputs = _without(self.outputs, rows)


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
        self.inputs, self.outputs = _same_type(inputs, outputs)
        self.geometry = geometry
        self.num_rows = inputs.shape[0]
        self._kept: Tensor | None = None  # (B, P)

    def squared_norms(self, units: Units) -> Tensor:
        self._kept = None
        weight = self.parameters[0]
        height = self.outputs.shape[1]
        positions = self.outputs.shape[2:].numel() * int(units.counts.max())
        if self._can_unfold() and ghost_is_cheaper(positions, weight.numel() // height, height):
            return self._unfolded().squared_norms(units)
        if units.num_units * weight.numel() * self.inputs.element_size() <= KEEP_BYTES:
            self._kept = units.add_rows(self._row_gradients(slice(0, self.num_rows)))
            return squares(self._kept)
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.inputs.device)
        step = max(1, WORK_BYTES // (weight.numel() * self.inputs.element_size()))
        for first in range(0, units.num_units, step):  # whole units, as many as the scratch space holds
            last = min(first + step, units.num_units)
            rows = slice(units.starts[first], units.ends[last - 1])
            gradients = self._row_gradients(rows)
            if units.owner is not None:
                part = Units(units.owner[rows] - first, last - first)
                gradients = part.add_rows(gradients)
            out[first:last] = squares(gradients)
        return out

    def sums(self, factors: Tensor, units: Units) -> Sums:
        weight = self.parameters[0]
        if self._kept is not None:
            return {weight: (factors.to(self._kept.dtype) @ self._kept).view(weight.shape)}
        rows = units.spread(factors).to(self.outputs.dtype)
        scaled = self.outputs * rows.view(-1, *[1] * (self.outputs.dim() - 1))
        return {weight: self._weight_gradient(self.inputs, scaled)}

    def gradient_of(self, rows: slice) -> Sums:
        return {self.parameters[0]: self._weight_gradient(self.inputs[rows], self.outputs[rows])}

    def forget(self, rows: Tensor) -> None:
        self.inputs, self.outputs = _without(self.inputs, rows), _without(self.outputs, rows)
        self._kept = None

    def _weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        shape = inputs.new_empty(1).expand(self.parameters[0].shape)  # only its shape is read; it may be sharded
        return convolution_backward(outputs, inputs, shape, self.geometry, (False, True))[1]

    def _row_gradients(self, rows: slice) -> Tensor:
        """(rows, P): the rows side by side as groups of one convolution (Rochette et al. 2019, arXiv:1912.06015)."""
        weight, geometry = self.parameters[0], self.geometry
        inputs, outputs = self.inputs[rows], self.outputs[rows]
        count = inputs.shape[0]
        beside = Geometry(
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups * count,
            geometry.transposed,
            geometry.output_padding,
        )
        shape = inputs.new_empty(1).expand((count * weight.shape[0], *weight.shape[1:]))  # only its shape is read
        gradients = convolution_backward(
            outputs.reshape(1, -1, *outputs.shape[2:]),
            inputs.reshape(1, -1, *inputs.shape[2:]),
            shape,
            beside,
            (False, True),
        )[1]
        return gradients.reshape(count, -1)

    def _can_unfold(self) -> bool:
        return not self.geometry.transposed and self.geometry.groups == 1 and self.inputs.dim() in (3, 4)

    def _unfolded(self) -> Outer:
        """The same gradient as that of a linear layer on patches."""
        weight, geometry, inputs = self.parameters[0], self.geometry, self.inputs
        kernel, stride, padding, dilation = (
            tuple(v) for v in (weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
        )
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(2)
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        patches = F.unfold(inputs, kernel, dilation, padding, stride)  # (R, D, L)
        return Outer(weight, None, patches.transpose(1, 2), self.outputs.flatten(2).transpose(1, 2))


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


def ghost_is_cheaper(positions: int, width: int, height: int) -> bool:
    """Two Gram matrices, T^2 (D + O), against forming the gradient, T D O."""
    return positions * (width + height) <= width * height or positions == 1


def squares(rows: Tensor) -> Tensor:
    """(n, P) -> (n,) float64, the squared norms, added up in float64."""
    out = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for columns in _blocks(rows.shape[1], max(1, WORK_BYTES // (8 * max(1, rows.shape[0])))):
        out += rows[:, columns].double().square().sum(1)
    return out


def _ghost_squares(inputs: Tensor, outputs: Tensor, with_bias: bool) -> Tensor:
    """inputs (n, T, D), outputs (n, T, O) -> (n,) float64, an upper bound.

    It is above the true value by about 2 (D + O) T u of it for positions that have nothing in common: in float32 1e-4
    for D = O = 500 and T = 2. Where positions cancel it may be above by more: that unit is scaled down too far.
    """
    count, positions, width = inputs.shape
    out = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    step = max(1, WORK_BYTES // (2 * positions * positions * inputs.element_size()))
    # a sum of D rounded products is off by at most D u of the product of the norms; twice that for the lesser terms
    slack = 2 * (width + outputs.shape[2] + 8) * torch.finfo(inputs.dtype).eps / 2
    for first in range(0, count, step):
        a, g = inputs[first : first + step], outputs[first : first + step]
        gram_a, gram_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
        if with_bias:
            gram_a = gram_a + 1  # the bias is the weight of a constant input 1
        lengths = (_diagonal(gram_a) * _diagonal(gram_g)).sqrt_().sum(1)
        total = (gram_a * gram_g).sum((1, 2), dtype=torch.float64).clamp_(min=0)
        out[first : first + step] = total + slack * lengths.square_()
    return out


def _formed_squares(inputs: Tensor, outputs: Tensor, formed: Tensor | None) -> Tensor:
    """The same by forming (n, O, D), in parts unless it is there already."""
    if formed is not None:
        return squares(formed.flatten(1))
    count, _, width = inputs.shape
    out = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    step = max(1, WORK_BYTES // (width * outputs.shape[2] * inputs.element_size()))
    for first in range(0, count, step):
        gradients = torch.bmm(outputs[first : first + step].transpose(1, 2), inputs[first : first + step])
        out[first : first + step] = squares(gradients.flatten(1))
    return out


def _diagonal(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).double()


def _by_unit(rows: Tensor, group: Group) -> Tensor:
    """(R, L, D) -> (n, T, D)."""
    return rows[group.rows].reshape(group.num_units, group.count * rows.shape[1], rows.shape[2])


def _blocks(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: sums of half-precision products lose what the norms must not lose."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _same_type(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs, outputs = _wide(inputs), _wide(outputs)
    kind = torch.promote_types(inputs.dtype, outputs.dtype)
    return inputs.to(kind), outputs.to(kind)


def _without(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0)


def smallest_unit(terms: Sequence[Term]) -> float:
    """The coarsest machine precision among the terms, which the final rounding of factors is measured in."""
    kinds = [parameter.dtype for term in terms for parameter in term.parameters]
    wide = [kind if kind in (torch.float32, torch.float64) else torch.float32 for kind in kinds]
    return max((torch.finfo(kind).eps for kind in wide), default=math.ulp(1.0))
