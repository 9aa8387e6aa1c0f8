"""Where the records come from, and which of them are declared public."""

from dataclasses import dataclass, field
from typing import Literal

from sfumato import checks
from sfumato.errors import UsageError

Language = Literal["en", "ru", "zh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Attributes:
    source: a built-in set, or a folder (metadata.jsonl), or a Parquet file.
    path: the folder or file; for a built-in set a local copy to use instead of fetching.
    units: clinic only: patients to generate for private training.
    public_units: units set aside, by a hash of their name, and declared public: they are shown in the report and
      measure the quality; never trained on. For clinic they are generated in addition to ``units``.
    unit_column: metadata column that names the person; None makes every record its own unit.
    limit_units: use only this many units (a small clean sample first); None uses all.
    """

    source: Literal["clinic", "emoji", "mnist", "fashion-mnist", "folder", "parquet"] = "clinic"
    path: str | None = None
    units: int = 30_000
    public_units: int = 6_000
    unit_column: str | None = None
    limit_units: int | None = None
    image_size: int = 32  # pixels per side after resizing
    channels: Literal[1, 3] = 1
    languages: tuple[Language, ...] = field(default=("en",))
    seed: int = 0  # of generated data and of the split; not of anything private

    def __post_init__(self) -> None:
        checks.positive(units=self.units, image_size=self.image_size)
        checks.non_negative(public_units=self.public_units)
        if self.source in ("folder", "parquet") and not self.path:
            raise UsageError(
                f"path = {self.path!r} · source {self.source} needs the folder or file to read",
                next="Set data.path.",
            )
        if not self.languages:
            raise UsageError("languages = () · at least one of en, ru, zh", next="Set data.languages.")
