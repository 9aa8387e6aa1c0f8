"""Thinning what is too common. Each record decides for itself, so one unit away changes nobody else's records.

A record stays where a number in [0, 1), a hash of its own contents, is below the public share of its label. Its name is
not in the hash: names of rows are numbers, and a row less would move all after it. No privacy amplification is claimed
for it: whoever knows the record knows whether it stays.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.data import mapped
from sfumato.data.checking import content_digest
from sfumato.data.settings import Balance
from sfumato.errors import UsageError
from sfumato.records import Record


def thinned(records: Sequence[Record], rule: Balance, *, seed: int) -> np.ndarray:
    """Places of the records that stay, ascending."""
    labels = [label_of(metadata, rule.column) for _, _, metadata in mapped.described(records)]
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        raise UsageError(
            f"data.balance.column = {rule.column} · no record has it, as a fact or in its metadata",
            next="Name a column that `sfumato data stats` shows.",
        )
    if rule.equal:
        rarest = min(counts.values())
        shares: Mapping[str, float] = {label: rarest / count for label, count in counts.items()}
    else:
        shares = rule.keep
    stays = [
        label is None or shares.get(label, 1.0) >= 1.0 or own_number(record, seed) < shares[label]
        for record, label in zip(records, labels, strict=True)
    ]
    return np.flatnonzero(stays)


def label_of(metadata: Mapping[str, Any], column: str) -> str | None:
    facts = metadata.get("facts")
    value = facts[column] if isinstance(facts, Mapping) and column in facts else metadata.get(column)
    return None if value is None else str(value)


def own_number(record: Record, seed: int) -> float:
    """In [0, 1), of the record's contents and the seed alone."""
    digest = hashlib.sha256(f"balance {seed} ".encode() + content_digest(record)).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
