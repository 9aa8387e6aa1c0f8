"""Which public records a training may begin with, so that what its quality is measured on stays unseen by all of it.

Looks at public records only: those to begin with, and those that are set aside and measured. So nothing here depends on
anybody who is protected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.data import copies, mapped
from sfumato.data.copies import plain_words
from sfumato.data.settings import Deduplicate
from sfumato.records import Record

_NAMES = ("concept", "label", "code")  # metadata that say which concept a record shows
_TAGS = "tags"  # other names that a record has for it


def without_measured(records: Sequence[Record], measured: Sequence[Record]) -> tuple[np.ndarray, dict[str, int]]:
    """Places of the records that show nothing measured, ascending; and how many were left out, by reason.

    Left out is a record of which the concept, the label, the code or a tag is the concept, the label or the code of a measured
    record (words without case and punctuation), and a near copy of one: the same words and nearly the same picture and sound.
    Sets without names of concepts lose copies only.
    """
    held_out: set[str] = set()
    for _, _, metadata in mapped.described(measured, keys=_NAMES):
        held_out |= _names(metadata, ())
    named = np.array(
        [
            bool(held_out & _names(metadata, metadata.get(_TAGS) or ()))
            for _, _, metadata in mapped.described(records, keys=(*_NAMES, _TAGS))
        ],
        dtype=bool,
    )
    rest = np.flatnonzero(~named)
    rule = Deduplicate(within_units=False, against_public=True, near=True)
    stay, found = copies.without(mapped.select(records, rest), measured, rule)
    counts = {"named as a measured concept": int(named.sum()), "copies of measured records": sum(found.values())}
    return rest[stay], counts


def _names(metadata: Mapping[str, Any], tags: Sequence[Any]) -> set[str]:
    said = [metadata.get(name) for name in _NAMES] + list(tags)
    return {words for one in said if isinstance(one, str) and (words := plain_words(one))}
