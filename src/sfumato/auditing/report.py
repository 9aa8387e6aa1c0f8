"""The audit of a run: one verdict of three, and everything it rests on.

VIOLATION     the attack proves more than the claimed epsilon, and the data alone do not explain it.
CONSISTENT    it does not, although the same attack does detect members of a model trained without noise.
INCONCLUSIVE  anything else: a low bound of an attack that detects nothing anywhere proves nothing.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from sfumato.auditing import membership
from sfumato.auditing.settings import AuditSettings
from sfumato.records import UnitTable
from sfumato.reports import Attack, AuditReport

FEWEST = 40  # units of each side; with fewer no attack can be told from luck

Verdict = Literal["VIOLATION", "CONSISTENT", "INCONCLUSIVE"]
Control = Callable[[], tuple[np.ndarray, np.ndarray]]  # -> member scores, non-member scores


def audit(
    row_losses: membership.RowLosses,
    members: UnitTable,
    nonmembers: UnitTable,
    settings: AuditSettings,
    *,
    delta: float | None,
    claimed_epsilon: float | None,
    control: Control | None = None,
    records_per_unit: int = 1,
    seed: int = 0,
) -> AuditReport:
    """Attacks a trained model by its losses.

    Args:
      row_losses: of the audited model, (R,) for a batch, each the mean over ``settings.draws`` noises. Take noise levels that
        are the same for every row, near the data's own spread: a memorised phantom set of 500 gave AUC .77 at level 0.6 and
        .52 with levels drawn anew for each row, whose spread hides the members.
      members, nonmembers: units trained on, and units of the same source never trained on, encoded alike.
      delta, claimed_epsilon: of the claim under test; None (or infinity) where no guarantee is claimed.
      control: the same attack on a model trained without noise (``membership.scores`` on its own members and
        non-members), for many passes over few units, so that there is something to detect; None where no such model was
        trained, and then the verdict can at best be INCONCLUSIVE.
    """
    rng = np.random.default_rng(seed)
    inside, outside = (rng.permutation(table.num_units)[: settings.members] for table in (members, nonmembers))
    if min(len(inside), len(outside)) < FEWEST:
        return AuditReport(
            verdict="INCONCLUSIVE",
            because=f"{len(inside)} members and {len(outside)} non-members are too few: at least {FEWEST} of each. "
            "Hold out more public units.",
        )
    chosen = ((members, inside), (nonmembers, outside))
    found = [
        membership.scores(row_losses, table, units=units, records_per_unit=records_per_unit) for table, units in chosen
    ]
    blind = membership.blind_baseline(
        *(membership.blind_features(table, units=units, records_per_unit=records_per_unit) for table, units in chosen),
        seed=seed,
    )
    common = {"delta": delta or 0.0, "confidence": settings.confidence, "seed": seed}
    attack = membership.attack(*found, **common, blind=blind)
    positive = (
        membership.attack(*control(), **common, name="loss threshold, model trained without noise", blind=blind)
        if control is not None
        else None
    )
    decided, because = verdict(attack, positive, claimed_epsilon)
    note = (
        f"An attack that finds nothing does not prove privacy; the bound of this one cannot pass {_cap(attack):.2f}, "
        f"whatever the model leaks, because it rests on {attack.members} members and {attack.nonmembers} non-members."
    )
    return AuditReport(verdict=decided, because=because, attacks=[attack], positive_control=positive, notes=[note])


def verdict(attack: Attack, control: Attack | None, claimed_epsilon: float | None) -> tuple[Verdict, str]:
    """The verdict and a sentence that gives its reason. Pure: the same figures always give the same verdict."""
    found = (
        f"AUC {attack.auc:.3f} ({attack.auc_low:.3f} to {attack.auc_high:.3f}), epsilon at least "
        f"{attack.epsilon_lower_bound:.2f} at confidence {attack.confidence:g}"
    )
    if attack.blind_baseline > membership.blind_limit(attack.members, attack.nonmembers):
        return "INCONCLUSIVE", (
            f"members and non-members can be told apart without the model (blind AUC {attack.blind_baseline:.3f}), so that "
            f"the attack's result ({found}) says nothing about it."
        )
    if claimed_epsilon is None or math.isinf(claimed_epsilon):
        return "INCONCLUSIVE", f"there is no claim to test: the run is not private. The attack found {found}."
    if attack.epsilon_lower_bound > claimed_epsilon:
        return "VIOLATION", f"the attack proves more than the claimed epsilon {claimed_epsilon:g}: {found}."
    if control is None:
        return "INCONCLUSIVE", (
            f"the attack found {found}, within the claimed {claimed_epsilon:g}, but was not tried on a model trained "
            "without noise: nobody knows what it could have found."
        )
    seen = f"AUC {control.auc:.3f} ({control.auc_low:.3f} to {control.auc_high:.3f}), epsilon at least {control.epsilon_lower_bound:.2f}"
    if not detected(control):
        return "INCONCLUSIVE", (
            f"the attack found {found}, within the claimed {claimed_epsilon:g}, but it does not detect members of a model "
            f"trained without noise either ({seen}): it is too weak to tell."
        )
    return "CONSISTENT", (
        f"the attack found {found}, within the claimed {claimed_epsilon:g}; the same attack detects members of a model "
        f"trained without noise ({seen})."
    )


def detected(control: Attack) -> bool:
    """Whether the attack works where it must: better than chance, at the attack's confidence."""
    return control.auc_low > 0.5 or control.epsilon_lower_bound > 0


def _cap(attack: Attack) -> float:
    """The bound of a perfect attack on as many units."""
    from sfumato.auditing.bounds import clopper_pearson_upper, epsilon_of_errors

    alpha = (1 - attack.confidence) / 4
    fnr, fpr = (clopper_pearson_upper(0, count // 2, alpha) for count in (attack.members, attack.nonmembers))
    return float(np.maximum(epsilon_of_errors(fnr, fpr, 0.0), epsilon_of_errors(fpr, fnr, 0.0)))
