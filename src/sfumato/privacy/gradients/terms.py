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
from torch import Tensor, nn

from sfumato.privacy.gradients import choice, products

KEEP_BYTES = 2**27  # a term keeps the per-unit gradients it forms, up to this size
KEEP_RATIO = 1  # and up to so many times the size of what it need not hold any longer, then
KEEP_ALWAYS_BYTES = 2**22
BLOCK_BYTES = 2**23  # kept gradients are blocks of this size: larger ones the C library takes from the system anew
WORK_BYTES = 2**24  # scratch for Gram matrices, patches, and gradients that are not kept
LOOSEST = 0.01  # of a squared norm from Gram matrices: half of it is what a gradient may be clipped too far
# Of the square of all lengths of what is added up to a gradient: put on top of a squared norm where the sum over units is
# made of these pieces, not of whole gradients. In float32 the pieces of a unit that cancel are then at most 1000 times the
# bound, and their rounding in everybody's sum stays far below it.
CANCELLING = 8.0  # machine epsilons
_RUN = 128

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
            if bool((owner == torch.arange(num_units, device=owner.device)).all()):
                self.owner = None  # every unit has one row
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
    squared norm; after ``forget`` a unit contributes exactly zero.
    """

    parameters: tuple[nn.Parameter, ...]
    num_rows: int
    _squared: Tensor | None = None

    def squared(self, units: Units) -> Tensor:
        """(B,) float64, an upper bound on the squared norms; computed once."""
        if self._squared is None:
            self._squared = self.squared_norms(units)
        return self._squared

    @abstractmethod
    def squared_norms(self, units: Units) -> Tensor:
        """(B,) float64. May replace what the term holds by what ``sums`` needs."""

    @abstractmethod
    def sums(self, factors: Tensor, units: Units) -> Sums:
        """The sum over units of factor x gradient. Args: factors (B,) float64, finite."""

    @abstractmethod
    def gradient_of(self, unit: int, units: Units) -> Sums:
        """The gradient of one unit, formed."""

    @abstractmethod
    def forget(self, bad: Tensor, units: Units) -> None:
        """Sets the contribution of units (B,) bool to zero."""

    def held(self) -> tuple[Tensor, ...]:
        """What was recorded and is still needed: if it changes after its norm was taken, the norm is that of another."""
        return ()


class PerRow(Term):
    """A gradient that was formed for every row: (R, *shape)."""

    def __init__(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        if gradients.dim() == 0 or gradients.shape[1:].numel() != parameter.numel():
            raise RuntimeError(
                f"gradients = {tuple(gradients.shape)}, one for each row, do not fit a parameter {tuple(parameter.shape)}"
            )
        self.parameters = (parameter,)
        self._rows = wide(gradients)
        self.num_rows = gradients.shape[0]
        self._kept: Tensor | None = None  # (B, P)

    def _per_unit(self, units: Units) -> Tensor:
        if self._kept is None:
            self._kept = units.add_rows(self._rows.flatten(1))
            self._rows = self._rows[:0]
        return self._kept

    def squared_norms(self, units: Units) -> Tensor:
        return squares(self._per_unit(units))

    def sums(self, factors: Tensor, units: Units) -> Sums:
        parameter, kept = self.parameters[0], self._per_unit(units)
        return {parameter: (factors.to(kept.dtype) @ kept).view(parameter.shape)}

    def gradient_of(self, unit: int, units: Units) -> Sums:
        parameter = self.parameters[0]
        return {parameter: self._per_unit(units)[unit].view(parameter.shape)}

    def forget(self, bad: Tensor, units: Units) -> None:
        self._kept = without(self._per_unit(units), bad)


class Outer(Term):
    """weight (O, D): sum_t g_t a_t'; bias (O,): sum_t g_t. Either may be None.

    Args: inputs (R, L, D); outputs, the gradients of the outputs, (R, L, O).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, inputs: Tensor, outputs: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.parameters = (weight,) if bias is None else (weight, bias)
        self.inputs, self.outputs = same_type(inputs, outputs)
        self.num_rows = inputs.shape[0]
        self._kept: Kept | None = None
        self._biases: Tensor | None = None  # (B, O), what each unit says about the bias

    def squared_norms(self, units: Units) -> Tensor:
        out = torch.zeros(units.num_units, dtype=torch.float64, device=self.inputs.device)
        if self.bias is not None:
            self._biases = units.add_rows(self.outputs.sum(1))
            out += squares(self._biases)
        positions, width, height = self.inputs.shape[1], self.inputs.shape[2], self.outputs.shape[2]
        held = (self.inputs.numel() + self.outputs.numel()) * self.inputs.element_size()
        size = units.num_units * width * height * self.inputs.element_size()
        keep = size <= min(KEEP_BYTES, max(KEEP_ALWAYS_BYTES, KEEP_RATIO * held))
        kept = Kept(units.num_units, (height, width))
        kind = self.inputs.dtype
        for group in units.groups():
            loose = looseness(group.count * positions, products.roundings(width) + products.roundings(height), kind)
            ways = ["keep" if keep else "form"] + ["ghost"] * (loose <= LOOSEST)
            shape = (group.num_units, group.count * positions, width, height)
            inputs, outputs = by_unit(self.inputs, group), by_unit(self.outputs, group)  # (n, T, D), (n, T, O)
            match choice.cheapest(ways, shape):
                case "ghost":
                    out[group.units] += _ghost_squares(inputs, outputs)
                    keep = False
                case "keep":
                    out[group.units] += kept.add(group, inputs, outputs)
                case _:
                    out[group.units] += _formed_squares(inputs, outputs)
        if keep and units.num_units:
            self._kept = kept
            self.inputs, self.outputs = self.inputs[:0], self.outputs[:0]
        return out

    def sums(self, factors: Tensor, units: Units) -> Sums:
        sums: Sums = {}
        if self.bias is not None:
            if self._biases is None:
                self._biases = units.add_rows(self.outputs.sum(1))
            sums[self.bias] = factors.to(self._biases.dtype) @ self._biases
        if self._kept is not None:
            sums[self.weight] = self._kept.sum(factors).view(self.weight.shape)
            return sums
        rows = units.spread(factors).to(self.outputs.dtype).view(-1, 1, 1)
        inputs, outputs = self.inputs, self.outputs
        if inputs.numel() <= outputs.numel():  # the factors go where there is less to multiply
            inputs = inputs * rows
        else:
            outputs = outputs * rows
        weight = products.weight_gradient(outputs.flatten(0, 1), inputs.flatten(0, 1))
        sums[self.weight] = weight.view(self.weight.shape)
        return sums

    def gradient_of(self, unit: int, units: Units) -> Sums:
        sums: Sums = {}
        if self._kept is not None:
            sums[self.weight] = self._kept.of(unit).view(self.weight.shape)
        else:
            rows = units.rows_of(unit)
            outputs = self.outputs[rows].flatten(0, 1)
            sums[self.weight] = (outputs.t() @ self.inputs[rows].flatten(0, 1)).view(self.weight.shape)
        if self.bias is not None:
            biases = self._biases if self._biases is not None else units.add_rows(self.outputs.sum(1))
            sums[self.bias] = biases[unit]
        return sums

    def forget(self, bad: Tensor, units: Units) -> None:
        if self._kept is not None:
            self._kept.forget(bad)
        else:
            rows = units.spread(bad)
            self.inputs, self.outputs = without(self.inputs, rows), without(self.outputs, rows)
        if self._biases is not None:
            self._biases = without(self._biases, bad)

    def held(self) -> tuple[Tensor, ...]:
        return (self.inputs, self.outputs) if self._kept is None else ()


class Kept:
    """Gradients (O, D) of every unit, in blocks of some units: a large block would be new memory for every layer.

    Args: shape: (O, D).
    """

    def __init__(self, num_units: int, shape: tuple[int, int]) -> None:
        self.num_units, self.shape = num_units, shape
        self._blocks: list[tuple[slice | Tensor, Tensor]] = []  # (which units, (n, O, D))

    def add(self, group: Group, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Forms the gradients of a group: inputs (n, T, D), outputs (n, T, O) -> their squared norms, (n,) float64."""
        squared = []
        step = max(1, BLOCK_BYTES // (self.shape[0] * self.shape[1] * inputs.element_size()))
        first = 0
        for gradients in products.unit_gradients(outputs, inputs, step):
            last = first + len(gradients)
            if isinstance(group.units, slice):
                which: slice | Tensor = slice(group.units.start + first, group.units.start + last)
            else:
                which = group.units[first:last]
            self._blocks.append((which, gradients))
            squared.append(squares(gradients.flatten(1)))
            first = last
        return torch.cat(squared)

    def sum(self, factors: Tensor) -> Tensor:
        total: Tensor | None = None
        for which, gradients in self._blocks:
            if total is None:
                total = torch.zeros_like(gradients[0])
            if len(gradients) == 1:
                total.add_(gradients[0], alpha=float(factors[which]))
            else:
                total.view(-1).addmv_(gradients.flatten(1).t(), factors[which].to(gradients.dtype))
        assert total is not None
        return total

    def of(self, unit: int) -> Tensor:
        for which, gradients in self._blocks:
            places = torch.arange(which.start, which.stop) if isinstance(which, slice) else which.cpu()
            at = torch.nonzero(places == unit)
            if len(at):
                return gradients[int(at)]
        return self._blocks[0][1].new_zeros(self.shape)  # a unit without rows

    def forget(self, bad: Tensor) -> None:
        self._blocks = [(which, without(gradients, bad[which])) for which, gradients in self._blocks]


class Lookup(Term):
    """An embedding's weight (V, D): the output gradient of every position is added to its word's row.

    What a unit says of a word is added up first, and both normed and summed in this form: positions of a unit that cancel
    must not meet the sum over all units one by one, where their rounding would be everybody's.

    Args: words (R, L) int; outputs (R, L, D), already zero where the layer ignores a word.
    """

    def __init__(self, weight: nn.Parameter, words: Tensor, outputs: Tensor) -> None:
        self.parameters = (weight,)
        self.words, self.outputs = words, wide(outputs)
        self.num_rows = words.shape[0]
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # unit (N,), word (N,), what it says (N, D)

    def _by_word(self, units: Units) -> tuple[Tensor, Tensor, Tensor]:
        if self._kept is None:
            vocabulary = self.parameters[0].shape[0]
            unit = units.spread(torch.arange(units.num_units, device=self.words.device))
            key = (unit.unsqueeze(1) * vocabulary + self.words).view(-1)
            pairs, place = torch.unique(key, return_inverse=True)  # distinct (unit, word)
            total = self.outputs.new_zeros(len(pairs), self.outputs.shape[2])
            total.index_add_(0, place, self.outputs.flatten(0, 1))
            self._kept = torch.div(pairs, vocabulary, rounding_mode="floor"), pairs % vocabulary, total
            self.words, self.outputs = self.words[:0], self.outputs[:0]
        return self._kept

    def squared_norms(self, units: Units) -> Tensor:
        unit, _, said = self._by_word(units)
        out = torch.zeros(units.num_units, dtype=torch.float64, device=said.device)
        return out.index_add_(0, unit, squares(said))

    def sums(self, factors: Tensor, units: Units) -> Sums:
        unit, word, said = self._by_word(units)
        return self._add(word, said * factors[unit].to(said.dtype).unsqueeze(1))

    def gradient_of(self, unit: int, units: Units) -> Sums:
        owner, word, said = self._by_word(units)
        return self._add(word[owner == unit], said[owner == unit])

    def _add(self, words: Tensor, said: Tensor) -> Sums:
        weight = self.parameters[0]
        total = torch.zeros(weight.shape, dtype=said.dtype, device=said.device)
        return {weight: total.index_add_(0, words, said)}

    def forget(self, bad: Tensor, units: Units) -> None:
        unit, word, said = self._by_word(units)
        self._kept = unit, word, without(said, bad[unit])

    def held(self) -> tuple[Tensor, ...]:
        return (self.words, self.outputs) if self._kept is None else ()


def squares(rows: Tensor) -> Tensor:
    """(n, P) -> (n,) float64, upper bounds on the squared norms, at most 2e-5 above them.

    Runs of _RUN numbers are squared and added up in their own precision, where all terms have one sign and a sum of m of
    them is off by at most (m + 2) u of itself, in any order (Higham 2002, section 4.2); the runs are added in float64.
    """
    count, size = rows.shape
    if rows.dtype == torch.float64:
        return torch.linalg.vector_norm(rows, dim=1).square_() * (1 + (size + 4) * torch.finfo(torch.float64).eps)
    whole = size // _RUN * _RUN
    out = torch.zeros(count, dtype=torch.float64, device=rows.device)
    if whole:
        out += _run_squares(rows[:, :whole].unflatten(1, (-1, _RUN))).sum(1)
    if whole < size:
        out += _run_squares(rows[:, whole:])
    tiny = torch.finfo(rows.dtype).tiny  # a square below it is lost
    return out.mul_(1 + (_RUN + 8) * torch.finfo(rows.dtype).eps / 2).add_(size * tiny)


def _run_squares(runs: Tensor) -> Tensor:
    return torch.linalg.vector_norm(runs, dim=-1).double().square_()


def _ghost_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """inputs (n, T, D), outputs (n, T, O) -> (n,) float64, an upper bound."""
    count, positions, width = inputs.shape
    if positions == 1:  # |g a'| = |g| |a|
        return squares(inputs.flatten(1)) * squares(outputs.flatten(1))
    out = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    step = max(1, WORK_BYTES // (2 * positions * positions * inputs.element_size()))
    roundings = products.roundings(width) + products.roundings(outputs.shape[2])
    for block in blocks(count, step):
        a, g = inputs[block], outputs[block]
        out[block] = ghost_squares_of(products.grams(a), products.grams(g), roundings)
    return out


def ghost_squares_of(inputs: Tensor, outputs: Tensor, roundings: int) -> Tensor:
    """Gram matrices of inputs and output gradients, (n, T, T) each -> (n,) float64, an upper bound. Overwrites the first.

    What rounding can have taken away is put on top: ``looseness`` of it, for positions that have nothing in common.
    Where positions cancel that is more: such a unit is scaled down too far.

    Args: roundings: that an entry of both matrices together has gone through.
    """
    slack = looseness(inputs.shape[1], roundings, inputs.dtype) / max(1, inputs.shape[1])
    lengths = (_diagonal(inputs) * _diagonal(outputs)).sqrt_().sum(1)
    total = inputs.mul_(outputs).sum(1).sum(1, dtype=torch.float64).clamp_(min=0)
    return total + slack * lengths.square_()


def looseness(positions: int, roundings: int, kind: torch.dtype) -> float:
    """How far a squared norm from Gram matrices is above the true one, as a part of it, for positions of one length that
    have nothing in common: (m + T) u of (sum_t |a_t| |g_t|)^2, which is T times the squared norm."""
    return 1.02 * (roundings + positions + 8) * torch.finfo(kind).eps / 2 * positions


def _formed_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The same by forming (n, O, D), in parts that are thrown away."""
    count, _, width = inputs.shape
    out = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    step = max(1, WORK_BYTES // (width * outputs.shape[2] * inputs.element_size()))
    for first in range(0, count, step):
        gradients = torch.bmm(outputs[first : first + step].transpose(1, 2), inputs[first : first + step])
        out[first : first + step] = squares(gradients.flatten(1))
    lengths = _lengths(inputs) * _lengths(outputs)
    return out + CANCELLING * torch.finfo(inputs.dtype).eps * lengths.sum(1).square()


def _lengths(positions: Tensor) -> Tensor:
    """(n, T, D) -> (n, T) float64."""
    return squares(positions.flatten(0, 1)).sqrt_().view(positions.shape[:2])


def _diagonal(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).double()


def by_unit(rows: Tensor, group: Group) -> Tensor:
    """(R, L, D) -> (n, T, D)."""
    return rows[group.rows].reshape(group.num_units, group.count * rows.shape[1], rows.shape[2])


def blocks(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def wide(tensor: Tensor) -> Tensor:
    """At least float32: sums of half-precision products lose what the norms must not lose."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def same_type(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs, outputs = wide(inputs), wide(outputs)
    kind = torch.promote_types(inputs.dtype, outputs.dtype)
    return inputs.to(kind), outputs.to(kind)


def without(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0)


def smallest_unit(terms: Sequence[Term]) -> float:
    """The coarsest machine precision among the terms, which the final rounding of factors is measured in."""
    kinds = [parameter.dtype for term in terms for parameter in term.parameters]
    wide = [kind if kind in (torch.float32, torch.float64) else torch.float32 for kind in kinds]
    return max((torch.finfo(kind).eps for kind in wide), default=math.ulp(1.0))
