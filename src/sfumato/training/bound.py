"""C before the first step, where the plan says that it is estimated: charged, found once, kept with the run. [shell]"""

from collections.abc import Callable
from typing import Any

from sfumato.errors import LedgerError
from sfumato.privacy.estimate import Answer, figures
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.norms import GradientNorms, estimated_bound
from sfumato.privacy.releases import Estimate
from sfumato.randomness import Random, SecretRandom
from sfumato.records import UnitTable


def found_bound(
    model: Any,
    table: UnitTable,
    estimate: Estimate,
    ledger: Ledger,
    *,
    kept: Callable[[], dict[str, Any] | None],
    keep: Callable[[dict[str, Any]], None],
    max_physical_batch_size: int | None = None,
    random: Random | None = None,
) -> dict[str, Any]:
    """What was released of the norms of the gradients at the model's present weights; ``value`` is C.

    Guarantee: (epsilon, delta)-private as ``estimate`` says. It is asked once: a run that goes on takes what it kept.

    Args:
      kept: what an earlier attempt has kept, or None; keep: keeps it, durably.

    Raises: LedgerError where an earlier attempt was charged and died before it could keep the answer, and where there is an
      answer that the ledger does not know of.
    """
    before = kept()
    (event,) = estimate.events()
    left = ledger.remaining(event)
    if before is not None:
        if left >= 1:
            raise LedgerError(
                f"estimate = {estimate.name} · its answer is in the run, but its event is not in the ledger {ledger.path}: the "
                "ledger is of before it",
                next="Restore the ledger that belongs to this run; if there is none, count the whole plan as spent.",
                code="ledger_older_than_estimate",
            )
        return before
    if left < 1:
        raise LedgerError(
            f"estimate = {estimate.name} · was charged, but its answer is not in the run: it stopped in between",
            next="Start a new run without --resume. What was charged stays in the account.",
            code="estimate_lost",
        )
    random = SecretRandom() if random is None else random
    model.train()
    norms = GradientNorms(
        model,
        model.losses,
        table,
        records_per_unit=estimate.records_per_unit,
        random=random,
        max_physical_batch_size=max_physical_batch_size,
    )
    answer: Answer = estimated_bound(estimate, norms, ledger=ledger, random=random)
    (found,) = figures({"value": answer}, estimate)
    keep(found)
    return found
