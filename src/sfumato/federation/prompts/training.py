"""The private steps of a prompt: sampled, clipped per unit, noised, charged; the claim is in the package's text.

Shapes: R records, B units, N, M, W as in ``methods``; d numbers of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.federation.mechanisms.updates import noisy_sum
from sfumato.federation.prompts.methods import PromptModel
from sfumato.privacy.discrete import source_named
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, TrainingPlan
from sfumato.privacy.sampling import poisson_units
from sfumato.randomness import Random, SecretRandom
from sfumato.records import Batch, UnitTable

IMAGE, LABEL = (
    "image",
    "label",
)  # of the table: (R, 1 + V, E) cached features, (R,) int64 numbers of the model's classes
ALL = ""  # the only block of a plan without parts

_BELOW = 1 - 2.0**-40  # the rounding of a norm and a product in float64 is far below the difference


class PromptSteps:
    """Trains a ``PromptModel`` for some steps of a site's plan: ``TrainSteps`` of ``federation.sites``.

    Guarantee: each step reserves the plan's event, draws every unit with the plan's rate, clips the unit's gradient (the mean over at
    most k records) to C, or each block to its part's C_m, adds noise to the sums, and moves the parameters by what came out alone. A
    gradient that is not finite counts as zero. A ``NotPrivate`` plan: the same without clip, noise and charge.

    Args: random: chance of sampling, noise, and of how p_L is cut; by default the operating system's.
    """

    def __init__(self, random: Random | None = None) -> None:
        self._random = random

    def __call__(
        self, model: Any, table: UnitTable, plan: TrainingPlan, ledger: Ledger | None, *, steps: int, first_step: int
    ) -> None:
        if not isinstance(model, PromptModel):
            raise UsageError(f"model = {type(model).__name__} · must be a PromptModel", next="Build one.")
        check_plan(model, plan)
        if isinstance(plan, DpSgd) and ledger is None:
            raise UsageError(
                "ledger = None · a private step is charged before it looks", next="Open the site's ledger."
            )
        chance = self._random if self._random is not None else SecretRandom()
        for _ in range(steps):
            sequence = None
            if isinstance(plan, DpSgd) and ledger is not None:
                sequence = ledger.reserve(plan.event(1), ledger.spent_steps)
            one_step(model, table, plan, chance)
            if ledger is not None and sequence is not None:
                ledger.commit(sequence)


def one_step(model: PromptModel, table: UnitTable, plan: TrainingPlan, chance: Random) -> None:
    """One step, already charged."""
    cut = model.cut(chance)
    units = poisson_units(table.num_units, plan.sampling_rate, chance)
    batch = table.batch(units, records_per_unit=plan.records_per_unit, rng=chance)
    per_unit = unit_gradients(model, batch, model.prompts(cut))
    once = model.settings.releases == "once"
    blocks = {ALL: per_unit} if once else model.blocks(per_unit, cut)
    released = {name: total / plan.expected_batch_size for name, total in noisy_sums(blocks, plan, chance).items()}
    if once:  # what came out is one prompt's gradient; its blocks are functions of it
        released = {name: tensor[0] for name, tensor in model.blocks(released[ALL].to(per_unit)[None], cut).items()}
    model.step(released, cut)


def unit_gradients(model: PromptModel, batch: Batch, prompts: Tensor) -> Tensor:
    """(B, N, M, W): of each unit, the mean over its records."""
    rows = model.gradients(batch.tensors[IMAGE], batch.tensors[LABEL], prompts)
    if batch.num_rows == batch.num_units:
        return rows
    totals = rows.new_zeros(batch.num_units, *rows.shape[1:]).index_add(0, batch.unit, rows)
    return totals / torch.bincount(batch.unit, minlength=batch.num_units)[:, None, None, None]


def noisy_sums(blocks: Mapping[str, Tensor], plan: TrainingPlan, chance: Random) -> dict[str, Tensor]:
    """By block, the clipped, summed, noised gradients, float64. Args: blocks: (B, ...) each, of the same units.

    Guarantee: one unit moves them, each divided by its noise's standard deviation, by at most 1 / sigma together, sigma being
    ``plan.noise_multiplier``: with parts, block m is clipped to C_m by itself and its noise is sigma_m C_m; without, all blocks are
    one vector, clipped to C.
    """
    if not isinstance(plan, DpSgd):
        return {name: rows.double().sum(0) for name, rows in blocks.items()}
    if plan.parts:
        noise, bounds = plan.part_noise_multipliers(), {part.name: part.max_grad_norm for part in plan.parts}
        return {name: _released(rows, bounds[name], noise[name], plan, chance) for name, rows in blocks.items()}
    assert not isinstance(plan.max_grad_norm, str)  # check_plan
    together = torch.cat([rows.flatten(1) for rows in blocks.values()], 1)
    total = _released(together, plan.max_grad_norm, plan.noise_multiplier, plan, chance)
    pieces = total.split([rows[0].numel() if len(rows) else rows.shape[1:].numel() for rows in blocks.values()])
    return {name: piece.reshape(rows.shape[1:]) for (name, rows), piece in zip(blocks.items(), pieces, strict=True)}


def clipped(rows: Tensor, bound: float) -> Tensor:
    """(B, d) float64: each row of L2 norm at most ``bound``; one that is not finite is zero."""
    rows = rows.double()
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
    norms = rows.norm(dim=1, keepdim=True)
    return rows * (bound * _BELOW / norms.clamp(min=bound * _BELOW))


def _released(rows: Tensor, bound: float, noise_multiplier: float, plan: DpSgd, chance: Random) -> Tensor:
    flat = rows.flatten(1)
    total = noisy_sum(
        clipped(flat, bound),
        number=len(flat),
        count=flat.shape[1],
        std=noise_multiplier * bound,
        bound=bound,
        source=source_named(plan.noise),
        chance=chance,
    )
    return total.reshape(rows.shape[1:])


def check_plan(model: PromptModel, plan: TrainingPlan) -> None:
    """Raises UsageError for a plan whose claim these steps would not keep."""
    if not isinstance(plan, DpSgd):
        return
    if plan.bands > 1 or plan.largest_batch is not None or plan.clipping != "flat" or plan.max_grad_norm == "estimated":
        raise UsageError(
            f"bands = {plan.bands}, largest_batch = {plan.largest_batch}, clipping = {plan.clipping}, max_grad_norm = "
            f"{plan.max_grad_norm} · a prompt's steps are Poisson-sampled, with one fixed clip and independent noise",
            next="Take bands 1, no largest_batch, clipping flat and a number.",
        )
    wanted = {ALL} if model.settings.releases == "once" else set(model.settings.method.blocks)
    if plan.parts and {part.name for part in plan.parts} != wanted:
        raise UsageError(
            f"parts = {', '.join(part.name for part in plan.parts)} · must be what a step releases: "
            f"{', '.join(sorted(wanted)) or 'one prompt, so no parts'}",
            next="Take parts=settings.parts(max_grad_norm).",
        )
