"""What a run can say of itself, as values. Who measures them is above; the report, the card and the gate are views of them.

Every figure says by what it is covered: ``public`` (public data only), ``charged`` (paid from the budget),
``post-processing`` (of private releases and public data) or ``internal`` (touches private data, stays in the run).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Covered = Literal["public", "charged", "post-processing", "internal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarantee:
    """A differential-privacy claim as a value (docs/privacy.md § claim)."""

    definition: str  # "(epsilon, delta)-DP" or "none"
    epsilon: float | None  # None: no finite epsilon (a non-private run)
    delta: float | None
    unit: str  # "record" | "person" | "site"
    records_per_unit: int  # k: at most this many records of a unit are used in a step
    adjacency: str  # "add_or_remove" | ...
    population: int | None  # public N, in units
    accountants: dict[str, float | None] = field(default_factory=dict)  # pld, rdp, zcdp
    curve: list[list[float]] = field(default_factory=list)  # [[delta, epsilon], ...]
    boundary: list[str] = field(default_factory=list)  # sentences: what is inside, what is declared public
    trust_model: str = "central"
    mechanism: dict[str, Any] = field(default_factory=dict)  # the plan's parameters
    estimates: list[dict[str, Any]] = field(default_factory=list)  # private estimates, each charged, with its interval
    composed_with: list[dict[str, Any]] = field(default_factory=list)  # earlier releases on the same account
    not_promised: list[str] = field(default_factory=list)
    not_for_release: str = ""  # why this run must not be released; "" when nothing forbids it
    sites: list[dict[str, Any]] = field(
        default_factory=list
    )  # of a federation: what each has spent (``privacy.joint``)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number. Figures of directions other than text→image have the direction before their name."""

    name: str
    value: float
    low: float | None = None  # confidence interval, 95 %
    high: float | None = None
    better: Literal["higher", "lower"] = "higher"
    baseline: dict[str, float] = field(default_factory=dict)  # {"real held-out": .., "shuffled captions": ..}
    extractor: str = ""  # name and sha256 of the network that measured
    samples: int = 0
    covered_by: Covered = "post-processing"
    note: str = ""
    direction: str = ""  # "text→image": what was asked for, told what


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One attack's result; the lower bound is on epsilon, at ``confidence``."""

    name: str
    auc: float
    auc_low: float
    auc_high: float
    tpr_at_fpr: dict[str, float]  # {"0.01": .., "0.001": ..}
    epsilon_lower_bound: float
    confidence: float
    members: int
    nonmembers: int
    blind_baseline: float  # AUC of an attacker who never sees the model
    covered_by: Covered = "internal"
    roc: list[list[float]] = field(default_factory=list)  # [[fpr, tpr], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    verdict: Literal["VIOLATION", "CONSISTENT", "INCONCLUSIVE"]
    because: str
    attacks: list[Attack] = field(default_factory=list)
    positive_control: Attack | None = None  # the same attack on a model trained without noise
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostReport:
    """None: not told, since it would tell what a guarantee keeps secret (who was drawn in a federation)."""

    seconds: float | None
    processor_seconds: float | None
    peak_bytes: int | None
    steps: int | None
    units_per_second: float | None
    parameters: int
    bytes_sent: int | None = 0
    machine: str = ""
    processes: int = 1  # that trained together; seconds of processor and memory are of all of them


def to_dict(report: Any) -> dict[str, Any]:
    """A report as plain JSON values."""
    return asdict(report)
