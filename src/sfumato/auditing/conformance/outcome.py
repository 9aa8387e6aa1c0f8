"""The 24 ways to fail, what a check finds, and how verdicts are made of findings. Pure.

VIOLATION     a check finds what cannot be, if the claim is true (but for the stated false-alarm probability).
CONSISTENT    no check of the row finds anything, and every one of them does find a bug that the suite puts into the same
              trainer by itself: the positive control.
INCONCLUSIVE  anything else: a call that the adapter lacks, a trainer that refuses, a control that was not detected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["VIOLATION", "CONSISTENT", "INCONCLUSIVE"]

FAILURES: dict[int, str] = {
    1: "the aggregate is clipped, not the example",
    2: "elementwise clamp",
    3: "noise off, by the batch size for example",
    4: "C for every layer, accounted as C",
    5: "micro-batch mean, then clip",
    6: "a layer or a loss that couples examples",
    7: "shuffling accounted as Poisson sampling",
    8: "divisor or noise from the actual batch",
    9: "a rate that is not the sampler's, a weighted sampler",
    10: "empty or last batches are dropped",
    11: "fewer events charged than noise draws; gradients kept from the step before",
    12: "adaptive clipping not charged",
    13: "fast norms wrong",
    14: "something leaves unprotected",
    15: "floating-point structure of the noise",
    16: "repeated noise or a replayed batch",
    17: "overflow, NaN, low precision",
    18: "several processes clip or noise wrongly",
    19: "federation: a site's update is not bounded or not hidden",
    20: "one person in many records",
    21: "preprocessing that depends on the data",
    22: "adjacency mixed up",
    23: "epsilon or delta does not follow from the events",
    24: "the audit itself",
}


class Undecided(Exception):
    """Raised inside a check that cannot be made; its text is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one look at a trainer showed."""

    violated: bool
    because: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One check, decided.

    Attributes:
      test: S sensitivity, D distinguishing game, G goodness of fit, A accounting, F faults, L lint.
      false_alarm: probability that a trainer which keeps its claim is convicted by this check; 0 where no chance is involved.
      control: what the same check found in the same trainer with a bug put in.
    """

    name: str
    test: str
    verdict: Verdict
    because: str
    false_alarm: float
    figures: Mapping[str, float] = field(default_factory=dict)
    control: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "test": self.test,
            "verdict": self.verdict,
            "because": self.because,
            "false_alarm": self.false_alarm,
            "figures": dict(self.figures),
            "control": self.control,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One of the 24, decided. ``applies`` is False where the claim is not about such a thing."""

    number: int
    verdict: Verdict
    because: str
    evidence: Sequence[Evidence]
    applies: bool = True

    def as_dict(self) -> dict[str, Any]:
        return {
            "row": self.number,
            "check": FAILURES[self.number],
            "verdict": self.verdict,
            "because": self.because,
            "applies": self.applies,
            "evidence": [item.as_dict() for item in self.evidence],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Conformance:
    """The whole result.

    Attributes:
      false_alarm: probability that a trainer which keeps its claim gets a VIOLATION anywhere in one pass, at most.
    """

    trainer: str
    verdict: Verdict
    because: str
    rows: Sequence[Row]
    false_alarm: float
    seed: int
    claim: Mapping[str, Any]
    hints: Sequence[str] = ()

    @property
    def convicted(self) -> list[int]:
        return [row.number for row in self.rows if row.verdict == "VIOLATION"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer,
            "verdict": self.verdict,
            "because": self.because,
            "conformance": [row.as_dict() for row in self.rows],
            "attacks": [],
            "false_alarm": self.false_alarm,
            "seed": self.seed,
            "claim": dict(self.claim),
            "hints": list(self.hints),
        }


def row_of(number: int, evidence: Sequence[Evidence], *, not_about: str = "") -> Row:
    """The verdict of a row: the gravest evidence decides, and a gap is graver than consistency.

    Args: not_about: why the claim is not about this row; "" if it is. A violation is one nevertheless.
    """
    for verdict in ("VIOLATION", "INCONCLUSIVE", "CONSISTENT"):
        same = [item for item in evidence if item.verdict == verdict]
        if same and not (not_about and verdict != "VIOLATION"):
            return Row(
                number=number,
                verdict=verdict,
                because="; ".join(dict.fromkeys(x.because for x in same)),
                evidence=evidence,
            )
    reason = not_about or "the suite has no test for it"
    return Row(number=number, verdict="INCONCLUSIVE", because=reason, evidence=evidence, applies=not not_about)


def overall(rows: Sequence[Row]) -> tuple[Verdict, str]:
    """One verdict for the trainer, and a sentence."""
    violated = [row.number for row in rows if row.verdict == "VIOLATION"]
    open_ = [row.number for row in rows if row.verdict == "INCONCLUSIVE" and row.applies]
    consistent = sum(row.verdict == "CONSISTENT" for row in rows)
    if violated:
        return "VIOLATION", f"the claim is false: row {_listed(violated)}."
    if open_:
        return "INCONCLUSIVE", f"{consistent} rows are consistent; {len(open_)} could not be decided: {_listed(open_)}."
    return "CONSISTENT", f"all {consistent} rows that the claim is about are consistent."


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
