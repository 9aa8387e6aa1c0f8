"""What a datum is: a record, a table of encoded records grouped by privacy unit, and a batch.

Shapes: R rows (records), B units (the examples of differential privacy), K draws inside one record's loss.
A row is one record. A unit is what the guarantee protects: one record, or all the records of one person.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sfumato.errors import DataError, UsageError
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["text", "image", "audio"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it comes from a source. Any modality may be missing (None).

    Attributes:
      id: names the record in messages (a path, a row number).
      unit: whose record it is; the privacy unit is built from it. Never empty.
      image: (H, W, C) uint8, C = 1 or 3.
      audio: (T,) float32 in [-1, 1], at ``sample_rate`` hertz.
      metadata: anything else that the source knows (facts, rights, site); never used for training unless a codec asks.
    """

    id: str
    unit: str
    text: str | None = None
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.unit.strip():
            raise DataError(
                f"record {self.id}: unit = {self.unit!r} · must name the person or record it belongs to",
                next="Fill the unit column, or choose unit: record in the recipe.",
            )


def prompt(
    *,
    text: str | None = None,
    image: np.ndarray | None = None,
    audio: np.ndarray | None = None,
    sample_rate: int | None = None,
) -> Record:
    """What a model is told when it is asked for the rest: a record that is nobody's."""
    return Record(id="prompt", unit="prompt", text=text, image=image, audio=audio, sample_rate=sample_rate)


def generated(number: int, values: Mapping[Modality, Any], sample_rate: int | None) -> Record:
    """A record that a model made: its modalities as a codec decoded them."""
    rate = sample_rate if values.get("audio") is not None else None
    return Record(id=f"generated/{number}", unit="generated", sample_rate=rate, **values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rows of some units, as tensors.

    Attributes:
      tensors: by modality, each with leading dimension R.
      present: by modality, (R,) bool: False where the record lacks it (the tensor's row is zero there).
      unit: (R,) int64, which of the batch's B units a row belongs to, ascending.
      num_units: B; units without a row do not occur, an empty batch has R = B = 0.
      last: False for all but the last physical part of one sampled batch.
    """

    tensors: Mapping[str, "Tensor"]
    present: Mapping[str, "Tensor"]
    unit: "Tensor"
    num_units: int
    last: bool = True

    @property
    def num_rows(self) -> int:
        return int(self.unit.shape[0])

    def per_unit(self, values: "Tensor") -> "Tensor":
        """The mean of each unit's rows. Args: values (R,). Returns: (B,)."""
        ones = values.new_ones(values.shape[0])
        totals = values.new_zeros(self.num_units).index_add(0, self.unit, values)
        counts = values.new_zeros(self.num_units).index_add(0, self.unit, ones)
        return totals / counts

    def to(self, device: Any) -> "Batch":
        return Batch(
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            present={name: tensor.to(device) for name, tensor in self.present.items()},
            unit=self.unit.to(device),
            num_units=self.num_units,
            last=self.last,
        )


class UnitTable:
    """Encoded records in memory, grouped by unit: what a sampler draws from.

    Args:
      tensors: by modality, leading dimension = number of records, in any order.
      units: one unit name per record.
      present: by modality, bool per record; a modality that is not named is present everywhere.
    """

    def __init__(
        self,
        tensors: Mapping[str, "Tensor"],
        units: Sequence[str],
        present: Mapping[str, "Tensor"] | None = None,
    ) -> None:
        import torch

        for name, tensor in tensors.items():
            if tensor.shape[0] != len(units):
                raise UsageError(
                    f"tensors[{name!r}].shape[0] = {tensor.shape[0]} · must equal the number of records, {len(units)}",
                    next="Give one row per record.",
                )
        names, codes = (
            np.unique(np.asarray(units, dtype=str), return_inverse=True)
            if len(units)
            else (np.array([], str), np.array([], np.int64))
        )
        order = np.argsort(codes, kind="stable")
        self.tensors = dict(tensors)
        self.present = {name: (present or {}).get(name, torch.ones(len(units), dtype=torch.bool)) for name in tensors}
        self.unit_names: list[str] = names.tolist()
        self._rows = torch.from_numpy(order.astype(np.int64))  # record numbers, unit after unit
        counts = np.bincount(codes, minlength=len(names))
        self._start = np.concatenate([[0], np.cumsum(counts)])  # unit u owns _rows[_start[u] : _start[u + 1]]

    @property
    def num_units(self) -> int:
        return len(self.unit_names)

    @property
    def num_records(self) -> int:
        return int(self._rows.shape[0])

    def records_per_unit(self) -> np.ndarray:
        """(num_units,) int64."""
        return np.diff(self._start)

    def rows_of(self, unit: int) -> np.ndarray:
        """Record numbers of one unit."""
        return self._rows[self._start[unit] : self._start[unit + 1]].numpy()

    def batch(self, units: Sequence[int] | np.ndarray, *, records_per_unit: int, rng: Random | None = None) -> Batch:
        """The chosen units' rows, at most ``records_per_unit`` each, unit after unit.

        Guarantee: no unit contributes more than ``records_per_unit`` rows, whatever the table holds.
        A unit with more records contributes a uniformly drawn subset of that size if ``rng`` (SecretRandom or
        TestRandom) is given, else its first ones.
        """
        import torch

        chosen = np.asarray(units, dtype=np.int64)
        if records_per_unit < 1:
            raise UsageError(f"records_per_unit = {records_per_unit} · must be at least 1", next="Give 1 or more.")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_units):
            raise UsageError(
                f"units = {chosen.min()} .. {chosen.max()} · must be between 0 and {self.num_units - 1}",
                next="Draw from num_units of this table.",
            )
        counts = self._start[chosen + 1] - self._start[chosen]
        owner = np.repeat(np.arange(len(chosen)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, .. within each unit
        rows = self._start[chosen][owner] + place
        if len(rows) and counts.max() > records_per_unit:
            keep = ranks(owner, place, rng) < records_per_unit
            rows, owner = rows[keep], owner[keep]
        index = self._rows[torch.from_numpy(rows)]
        return Batch(
            tensors={name: tensor[index] for name, tensor in self.tensors.items()},
            present={name: tensor[index] for name, tensor in self.present.items()},
            unit=torch.from_numpy(owner.astype(np.int64)),
            num_units=len(chosen),
        )


def ranks(owner: np.ndarray, place: np.ndarray, rng: Random | None) -> np.ndarray:
    """Each row's rank within its owner: by a random key, so that the first k are a uniform subset, or by place."""
    if rng is None:
        return place
    if isinstance(rng, np.random.Generator | np.random.RandomState):  # their uniform(n) means "from n to 1"
        raise UsageError(
            f"rng = {type(rng).__name__} · must be one of ours", next="Give SecretRandom() or TestRandom(seed)."
        )
    keys = rng.uniform(len(owner))
    ranks = np.empty_like(place)
    ranks[np.lexsort((keys, owner))] = place
    return ranks
