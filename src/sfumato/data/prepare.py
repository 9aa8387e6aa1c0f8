"""From a source to records that can be trained on: checked, resized, split by unit, with a data card."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sfumato.data.clinic import Clinic
from sfumato.data.settings import DataSettings
from sfumato.records import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Attributes:
    private: what may be trained on; the guarantee protects its units.
    public: units set aside and declared public; never trained on.
    facts: closed label sets of ``record.metadata["facts"]``; {} where none are known.
    card: the data card.
    account_home: the folder where ``.sfumato/account.db`` of these data lives.
    """

    private: list[Record]
    public: list[Record]
    facts: dict[str, tuple[str, ...]]
    card: dict[str, Any]
    account_home: Path


def load(data: DataSettings, *, unit: Literal["record", "person"]) -> Prepared:
    """The records of ``data``, ready for a codec."""
    units = min(data.units, data.limit_units or data.units)

    def clinic(patients: int, public: bool) -> list[Record]:
        if not patients:
            return []
        source = Clinic(
            patients=patients, image_size=data.image_size, languages=data.languages, seed=data.seed, public=public
        )
        records = list(source)
        if unit == "record":
            records = [replace(record, unit=record.id) for record in records]
        if data.channels == 3:
            records = [replace(record, image=np.repeat(record.image, 3, axis=2)) for record in records]
        return records

    return Prepared(
        private=clinic(units, False),
        public=clinic(data.public_units, True),
        facts=dict(Clinic.facts),
        card={"name": "clinic"},
        account_home=Path.home() / ".local/share/sfumato/clinic",
    )
