"""What batches are drawn from: the rows of some units, out of a table or any dataset with a length and an index."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.privacy.gradients.terms import Units
from sfumato.randomness import Random
from sfumato.records import Batch, UnitTable


@dataclass(slots=True)
class PhysicalPart:
    """One physical part of a drawn batch, on its way through the user's loop."""

    units: Units | None  # None: a hand-written loop, every row is a unit
    over_rows: bool  # the loss is a mean over rows (an ordinary dataset), not over units (a UnitTable)
    last: bool
    sequence: int | None  # of the ledger
    stepped: set[str] = field(default_factory=set)  # the parts of the model whose optimizer was stepped

    def scale(self, units: Units, loss_reduction: str) -> Tensor:
        """(B,): undoes the loop's mean, so that a unit's gradient does not depend on how many others there are."""
        ones = torch.ones(units.num_units, dtype=torch.float64)
        per_unit = units.counts.double() if self.over_rows else ones  # the unit's gradient is the mean over its rows
        size = units.num_rows if self.over_rows else units.num_units
        return (size if loss_reduction == "mean" else 1.0) * ones / per_unit


class Source:
    """Something with units, and the rows of some of them."""

    num_units: int
    loss_is_over_rows: bool

    def identity(self) -> str:
        """The same for the same units in the same order."""
        raise NotImplementedError

    def rows(self, units: np.ndarray, limit: int, random: Random, last: bool) -> tuple[Any, Units]:
        raise NotImplementedError


class TableSource(Source):
    loss_is_over_rows = False

    def __init__(self, table: UnitTable) -> None:
        self._table = table
        self._counts = table.records_per_unit()
        self.num_units = table.num_units

    def identity(self) -> str:
        return _identity(self._table.unit_names, self._counts.tolist())

    def rows(self, units: np.ndarray, limit: int, random: Random, last: bool) -> tuple[Batch, Units]:
        order = fewest_rows_first(np.minimum(self._counts[units], limit))
        batch = self._table.batch(units[order], records_per_unit=limit, rng=random)
        batch = Batch(
            tensors=batch.tensors, present=batch.present, unit=batch.unit, num_units=batch.num_units, last=last
        )
        return batch, Units(batch.unit, batch.num_units)


class DatasetSource(Source):
    loss_is_over_rows = True

    def __init__(self, dataset: Any, unit: Sequence[Any] | None) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UsageError(
                f"dataset = {type(dataset).__name__} · must have a length and an index, so that units can be drawn",
                next="Give a map-style dataset or a sfumato.UnitTable.",
            )
        self._dataset = dataset
        length = len(dataset)
        if unit is not None and len(unit) != length:
            raise UsageError(
                f"len(unit) = {len(unit)} · must equal the dataset's length, {length}",
                next="Give one unit name per item.",
            )
        self._table = None
        if unit is not None:
            self._table = UnitTable({"item": torch.arange(length)}, [str(name) for name in unit])
        self.num_units = length if self._table is None else self._table.num_units

    def identity(self) -> str:
        return _identity([] if self._table is None else self._table.unit_names, [len(self._dataset)])

    def rows(self, units: np.ndarray, limit: int, random: Random, last: bool) -> tuple[Any, Units]:
        from torch.utils.data import default_collate

        if self._table is None:
            items, grouping = units.tolist(), Units(None, len(units))
        else:
            batch = self._table.batch(units, records_per_unit=limit, rng=random)
            items, grouping = batch.tensors["item"].tolist(), Units(batch.unit, batch.num_units)
        if items:
            return default_collate([self._dataset[i] for i in items]), grouping
        return _without_rows(default_collate([self._dataset[0]])), grouping  # only its shapes


def _without_rows(collated: Any) -> Any:
    """Of a collated batch, what is left without its rows: a column of texts is a list of them."""
    if isinstance(collated, Tensor):
        return collated[:0]
    if isinstance(collated, Mapping):
        return {name: _without_rows(column) for name, column in collated.items()}
    if isinstance(collated, tuple) and hasattr(collated, "_fields"):
        return type(collated)(*(_without_rows(column) for column in collated))
    if isinstance(collated, list | tuple):
        texts = any(isinstance(x, str | bytes) for x in collated)
        return [] if texts else type(collated)(_without_rows(column) for column in collated)
    return collated


def _identity(names: Sequence[str], counts: Sequence[int]) -> str:
    return hashlib.sha256("\n".join([*names, *map(str, counts)]).encode()).hexdigest()


def fewest_rows_first(counts: np.ndarray) -> np.ndarray:
    """Units with equally many rows side by side: what is done unit by unit then needs views, not copies."""
    return np.argsort(counts, kind="stable")


def source_of(dataset: Any, unit: Sequence[Any] | None) -> Source:
    if not isinstance(dataset, UnitTable):
        return DatasetSource(dataset, unit)
    if unit is not None:
        raise UsageError("unit · a UnitTable knows its units", next="Leave unit out.")
    return TableSource(dataset)
