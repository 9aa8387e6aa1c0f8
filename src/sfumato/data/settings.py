"""Where the records come from, how they are prepared, and which of them are declared public."""

from dataclasses import dataclass, field
from typing import Literal

from sfumato import checks
from sfumato.errors import UsageError

Language = Literal["en", "ru", "zh"]
Modality = Literal["text", "image", "audio"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")
OWN = ("folder", "parquet", "arrow", "messages", "webdataset", "dicom")
"""Sources that are the user's."""
BUILT_IN = ("clinic", "emoji", "mnist", "fashion-mnist", "wordnet", "emails", "prompts", "stamps", "icons")
CONCEPTS = ("emoji", "wordnet", "stamps", "icons")
"""Sets that are split by ``metadata["concept"]``: records of one concept say nearly the same."""
_USUAL: dict[str, tuple[Modality, ...]] = {
    "wordnet": ("text",),
    "emails": ("text",),
    "messages": ("text",),
    "prompts": ("text", "audio"),
    "dicom": ("image",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Deduplicate:
    """Which copies are left out. Copies have the same words, the same pixels and the same sound (``near``: nearly).

    Attributes:
      within_units: of the records of one unit, all but the first. A function of that unit alone.
      against_public: private records that copy a public one. A function of the record and of public data.
      across_units: private records that copy one of another unit, all but the first. Whether a record stays then
        depends on other people: refused where the training is private.
      near: also near copies: pictures by difference hash and thumbnail, texts by their words alone, sounds by the
        outline of their loudness.
    """

    within_units: bool = True
    against_public: bool = True
    across_units: bool = False
    near: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """Thins the commoner labels of one column. Each record decides by a hash of its name whether it stays.

    Attributes:
      column: a fact or a metadata column.
      keep: from a label to the share that stays, public numbers; a label that is not named stays whole.
      equal: instead, thin every label to the rarest one's number, counted: refused where the training is private.
    """

    column: str
    keep: dict[str, float] = field(default_factory=dict)
    equal: bool = False

    def __post_init__(self) -> None:
        for share in self.keep.values():
            checks.probability(keep=share)
        if bool(self.keep) == self.equal:
            raise UsageError(
                f"keep = {self.keep}, equal = {self.equal} · exactly one of them",
                next="Give data.balance.keep, for example {nodule: 0.5}.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Attributes:
    source: a built-in set, or one of the user's: folder (metadata.jsonl, or a folder per class), parquet, arrow (saved
      by ``datasets``), messages (JSON lines), webdataset (tar shards), dicom.
    path: the folder or file; for a built-in set a local copy to use instead of fetching.
    units: clinic only: patients to generate for private training.
    hospitals: clinic only: 3 sites that differ a little, or the 4 of the case, which differ much; one of them has no sounds
      (with sounds, set ``may_lack``), one few patients.
    public_units: units set aside, by a hash of their name, and declared public: they are shown in the report and
      measure the quality; never trained on. For clinic they are generated in addition to ``units``.
    unit_column: metadata column that names the person; None makes every record its own unit. dicom: a tag, PatientID.
    site_column: federations on one machine only: the metadata column whose value says which site holds a record (emoji: style, group or
      subgroup); more values than sites are put together. None: by ``site`` where all records have one, else by chance.
    text_column: the column that holds the text; None takes text or caption. dicom: a tag, or no text.
    modalities: what is read, and what every record must have; None takes what the source usually has.
    may_lack: a record may lack some of these, but not all.
    limit_units: use only this many units (a small clean sample first); None uses all.
    store: where prepared records are kept: in memory, or once on disk beside the data's account, memory-mapped.
    dicom_tags: the only tags of a DICOM object that become metadata.
    deduplicate, balance: what is left out, and why that is allowed (docs/data.md); None leaves nothing out.
    """

    source: Literal[
        "clinic", "emoji", "mnist", "fashion-mnist", "wordnet", "emails", "prompts", "stamps", "icons",
        "folder", "parquet", "arrow", "messages", "webdataset", "dicom",
    ] = "clinic"  # fmt: skip
    path: str | None = None
    units: int = 30_000
    hospitals: Literal[3, 4] = 3
    public_units: int = 6_000
    unit_column: str | None = None
    text_column: str | None = None
    site_column: str | None = None
    modalities: tuple[Modality, ...] | None = None
    may_lack: bool = False
    limit_units: int | None = None
    image_size: int = 32  # pixels per side after resizing
    channels: Literal[1, 3] = 1
    audio_seconds: float = (
        1.0  # of every sound, where the model has sounds: shorter ones end in silence, longer ones are cut
    )
    sample_rate: int = 4_000  # hertz that sounds are modelled at; others are resampled
    languages: tuple[Language, ...] = field(default=("en",))
    seed: int = 0  # of generated data and of the split; not of anything private
    store: Literal["memory", "mapped"] = "memory"
    dicom_tags: tuple[str, ...] = ("Modality", "BodyPartExamined", "ViewPosition", "Laterality")
    deduplicate: Deduplicate | None = None
    balance: Balance | None = None

    def __post_init__(self) -> None:
        checks.positive(
            units=self.units, image_size=self.image_size, audio_seconds=self.audio_seconds, sample_rate=self.sample_rate
        )
        checks.non_negative(public_units=self.public_units)
        if self.limit_units is not None:
            checks.positive(limit_units=self.limit_units)
        if self.source in OWN and not self.path:
            raise UsageError(
                f"path = {self.path!r} · source {self.source} needs the folder or file to read",
                next="Set data.path.",
            )
        if not self.languages:
            raise UsageError("languages = () · at least one of en, ru, zh", next="Set data.languages.")
        if self.modalities is not None and (not self.modalities or len(set(self.modalities)) != len(self.modalities)):
            raise UsageError(
                f"modalities = {', '.join(self.modalities) or 'none'} · one or more of {', '.join(MODALITIES)}, once each",
                next="Set data.modalities, or leave it out.",
            )

    @property
    def needed(self) -> tuple[Modality, ...]:
        """What a record must have (with ``may_lack``: at least one of these)."""
        return self.modalities or _USUAL.get(self.source, ("text", "image"))
