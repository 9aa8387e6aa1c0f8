"""Was this unit in the training data? An attack by the model's loss, and one by an attacker who never sees the model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sfumato.auditing import bounds
from sfumato.errors import UsageError
from sfumato.records import Batch, UnitTable
from sfumato.reports import Attack

if TYPE_CHECKING:
    from torch import Tensor

UNITS_AT_ONCE = 256
BLIND_WIDTH = 32  # numbers that the blind attacker sees of each modality
LEVELS = (0.01, 0.001)

RowLosses = Callable[[Batch], "np.ndarray | Tensor"]  # a batch -> (R,), the mean over some draws of each row's loss


def scores(row_losses: RowLosses, table: UnitTable, *, units: np.ndarray, records_per_unit: int) -> np.ndarray:
    """Minus the mean loss of each unit: higher means more likely a member. Returns: (len(units),)."""
    import torch

    parts = [np.zeros(0)]
    for start in range(0, len(units), UNITS_AT_ONCE):
        batch = table.batch(units[start : start + UNITS_AT_ONCE], records_per_unit=records_per_unit)
        losses = torch.as_tensor(row_losses(batch)).detach().double()
        if losses.shape != (batch.num_rows,):
            raise UsageError(
                f"row_losses(batch).shape = {tuple(losses.shape)} · must be one loss per row, ({batch.num_rows},)",
                next="Average over the draws before returning.",
            )
        parts.append(-batch.per_unit(losses).numpy())
    return np.concatenate(parts)


def attack(
    member_scores: np.ndarray,
    nonmember_scores: np.ndarray,
    *,
    delta: float,
    confidence: float,
    seed: int,
    name: str = "loss threshold",
    blind: float = 0.5,
) -> Attack:
    """The statistics of one attack from its scores; see ``bounds`` for what each means.

    Args:
      delta: of the claim under test; 0 where none is made.
      blind: AUC of the attacker who never sees the model, on the same units.
    """
    value, low, high = bounds.auc(member_scores, nonmember_scores, confidence=confidence)
    return Attack(
        name=name,
        auc=value,
        auc_low=low,
        auc_high=high,
        tpr_at_fpr={f"{level:g}": bounds.tpr_at_fpr(member_scores, nonmember_scores, level) for level in LEVELS},
        epsilon_lower_bound=bounds.epsilon_lower_bound(
            member_scores, nonmember_scores, delta=delta, confidence=confidence, seed=seed
        ),
        confidence=confidence,
        members=len(member_scores),
        nonmembers=len(nonmember_scores),
        blind_baseline=blind,
        roc=bounds.roc(member_scores, nonmember_scores),
    )


def blind_baseline(members: np.ndarray, nonmembers: np.ndarray, *, folds: int = 5, seed: int = 0) -> float:
    """AUC of a logistic regression on the data alone, cross-validated: must be near one half if the split was random.

    Where it is not, members and non-members differ by themselves and the loss attack says nothing about the model
    (Das, Zhang & Tramèr 2024, arXiv:2406.16201).

    Args: members, nonmembers: (N, D) features of units. Returns: the mean of the folds' AUCs.
    """
    x = np.concatenate([members, nonmembers]).astype(float)
    y = np.concatenate([np.ones(len(members)), np.zeros(len(nonmembers))])
    if min(len(members), len(nonmembers)) < 2 * folds:
        raise UsageError(
            f"{len(members)} members, {len(nonmembers)} non-members · at least {2 * folds} of each",
            next="Set audit.members higher, or hold out more units.",
        )
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    rng = np.random.default_rng(seed)
    fold = np.concatenate([rng.permutation(np.arange(count) % folds) for count in (len(members), len(nonmembers))])
    values = []
    for held in range(folds):
        learn, test = fold != held, fold == held
        score = x[test] @ _logistic(x[learn], y[learn])
        values.append(bounds.auc(score[y[test] == 1], score[y[test] == 0])[0])
    return float(np.mean(values))


def blind_limit(members: int, nonmembers: int) -> float:
    """AUC above which a blind attacker is better than luck: three standard deviations of the null, one chance in 700."""
    return 0.5 + 3 * float(np.sqrt((members + nonmembers + 1) / (12 * members * nonmembers)))


def blind_features(table: UnitTable, *, units: np.ndarray, records_per_unit: int, seed: int = 0) -> np.ndarray:
    """What a blind attacker sees of each unit: every modality, counted if it is of integers, projected at random to a few
    numbers, and how many records the unit has. Returns: (len(units), D)."""
    import torch

    batch = table.batch(units, records_per_unit=records_per_unit)
    ones = torch.ones(batch.num_rows, dtype=torch.float64)
    columns = [torch.zeros(batch.num_units, dtype=torch.float64).index_add(0, batch.unit, ones)[:, None]]
    for name, tensor in sorted(batch.tensors.items()):
        rows = tensor.reshape(len(tensor), -1)
        if not rows.is_floating_point():
            counts = torch.zeros(len(rows), 1024, dtype=torch.float64)
            rows = counts.scatter_add(1, rows.long() % 1024, (~_padding(rows)).double())
        rows = rows.double() * batch.present[name][:, None]
        # The same seed for members and non-members: the same projection.
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(rows.shape[1], BLIND_WIDTH, generator=generator, dtype=torch.float64)
        rows = torch.cat(
            [rows @ projection / rows.shape[1] ** 0.5, rows.mean(1, keepdim=True), rows.std(1, keepdim=True)], 1
        )
        total = torch.zeros(batch.num_units, rows.shape[1], dtype=torch.float64).index_add(0, batch.unit, rows)
        columns.append(total / columns[0].clamp(min=1))
    return torch.cat(columns, 1).nan_to_num().numpy()


def _padding(rows: "Tensor") -> "Tensor":
    """Where integer rows (N, L) are filled up: how far depends on the table's longest row, not on the unit, and would give
    the table away. A value that fills the rest of the row wherever it occurs is taken for padding. Returns: (N, L) bool."""
    if not rows.numel():
        return rows != rows
    same = rows == rows[:, -1].mode().values
    fills_the_rest = same.flip(1).long().cummin(1).values.flip(1).bool()
    return same if same.equal(fills_the_rest) else same & False


def _logistic(x: np.ndarray, y: np.ndarray, *, ridge: float = 1.0, rounds: int = 12) -> np.ndarray:
    """Weights of a ridge logistic regression by Newton's method. Args: x (N, D), y (N,) of 0 and 1."""
    weights = np.zeros(x.shape[1])
    penalty = ridge * np.eye(x.shape[1])
    for _ in range(rounds):
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (y - chance) - ridge * weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + penalty
        weights = weights + np.linalg.solve(curve, slope)
    return weights
