"""The norms of the units' gradients, as something that can be asked (``estimate.Source``); and the asking for C.

Computed as the engine does it: one backward pass for a physical part, no gradient of a unit formed where it need not be.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.chance import LossChance
from sfumato.privacy.estimate import Answer, Column, Source, charged
from sfumato.privacy.gradients.arithmetic import exact
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.clipping import norms_of
from sfumato.privacy.gradients.reference import find_coupling
from sfumato.privacy.gradients.terms import Units
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.releases import Estimate
from sfumato.privacy.sampling import physical_parts
from sfumato.privacy.watch import left_alone
from sfumato.randomness import Random
from sfumato.records import Batch, UnitTable


class GradientNorms:
    """One number for each unit: the L2 norm of its gradient over all trainable parameters, at the weights as they are.

    A unit's gradient is that of its loss: of the mean over at most k of its records, chosen by chance. A norm is a
    function of its own unit's records alone, or the model is refused: that is looked at here, on three units, as an engine
    does before its first step. Nothing of the model changes.

    Args:
      losses: batch -> (B,), one loss per unit.
      random: who of a unit's records is kept, and what losses draw.
      max_physical_batch_size: units at once.

    Raises: UnsupportedLayer for a layer or a loss that cannot be trained privately.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[Batch], Tensor],
        table: UnitTable,
        *,
        records_per_unit: int,
        random: Random,
        max_physical_batch_size: int | None = None,
    ) -> None:
        self._model, self._losses, self._table = model, losses, table
        self._records_per_unit, self._random = records_per_unit, random
        self._max_physical = max_physical_batch_size
        self._chance = LossChance(model, random)
        Tape(model).detach()  # names what it cannot treat
        if table.num_units > 1:
            with left_alone(model):
                coupled = find_coupling(model, losses, table.batch(range(min(3, table.num_units)), records_per_unit=1))
            if coupled is not None:
                raise UnsupportedLayer(
                    f"{coupled} · lets one unit's data change another unit's loss or gradient",
                    next="Use layers that treat rows alone (GroupNorm, LayerNorm) and a loss of one unit at a time.",
                )

    @property
    def num_units(self) -> int:
        return self._table.num_units

    def column(self, units: np.ndarray) -> Column:
        tape = Tape(self._model)
        try:
            parts = physical_parts(units, self._max_physical)
            with left_alone(self._model):
                norms = [self._norms(tape, part) for part in parts if len(part)]
        finally:
            tape.detach()
            self._chance.give_back()
        return Column(np.concatenate([np.zeros(0), *norms]), units)

    def _norms(self, tape: Tape, units: np.ndarray) -> np.ndarray:
        self._chance.renew()
        batch = self._table.batch(units, records_per_unit=self._records_per_unit, rng=self._random)
        whose = Units(batch.unit, batch.num_units)
        tape.clear()
        tape.give_units(whose)
        self._losses(batch).sum().backward()
        layers, terms, _ = tape.take()
        device = layers[0].parameters[0].device if layers else torch.device("cpu")
        scale = torch.ones(batch.num_units, dtype=torch.float64, device=device)
        with torch.no_grad(), exact(device):
            (norms,) = norms_of(terms, whose.to(device), scale, [0] * len(terms))
        return norms.cpu().numpy()


def estimated_bound(estimate: Estimate, norms: Source, *, ledger: Ledger | None, random: Random) -> Answer:
    """C, with its interval (``clip_estimate``). Charged before the first gradient is computed."""
    return charged(estimate, norms, ledger=ledger, random=random)["value"]
