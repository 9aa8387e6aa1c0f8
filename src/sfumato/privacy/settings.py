"""What the user asks of privacy; ``plan.make_plan`` turns it, with the data's public size, into a ``PrivacyPlan`` or refuses."""

from dataclasses import dataclass
from typing import Literal

from sfumato import checks
from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySettings:
    """Attributes:
    mechanism: dp_sgd, or none (a non-private run, marked so everywhere).
    unit: what is protected: one record, or all the records of one person.
    records_per_unit: k, public: at most this many records of a unit make its gradient (their mean).
    population: N, the public number of units; None takes the number in the data and *declares it public*.
    epsilon: the target; or give noise_multiplier instead. Exactly one of the two.
    delta: "auto" is 1/(N ln N).
    account: the ledger shared by all runs on one data set; None is .sfumato/account.db beside the data.
    """

    mechanism: Literal["dp_sgd", "none"] = "dp_sgd"
    unit: Literal["record", "person"] = "record"
    records_per_unit: int = 1
    population: int | None = None
    adjacency: Literal["add_or_remove"] = "add_or_remove"
    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    delta: float | Literal["auto"] = "auto"
    max_grad_norm: float = 1.0
    accountant: Literal["pld"] = "pld"
    on_exhausted: Literal["stop"] = "stop"
    account: str | None = None

    def __post_init__(self) -> None:
        checks.positive(records_per_unit=self.records_per_unit, max_grad_norm=self.max_grad_norm)
        if self.epsilon is not None:
            checks.positive(epsilon=self.epsilon, next="Ask for an epsilon such as 8, or set privacy.mechanism: none.")
        if self.noise_multiplier is not None:
            checks.positive(noise_multiplier=self.noise_multiplier)
        if self.mechanism == "dp_sgd" and (self.epsilon is None) == (self.noise_multiplier is None):
            raise UsageError(
                f"epsilon = {self.epsilon}, noise_multiplier = {self.noise_multiplier} · exactly one must be given",
                next="Set the other one to null.",
            )
        if self.delta != "auto":
            checks.probability(delta=self.delta)
            checks.positive(delta=self.delta)
        if self.unit == "record" and self.records_per_unit != 1:
            raise UsageError(
                f"records_per_unit = {self.records_per_unit} · must be 1 when unit is record",
                next="Set privacy.unit: person, or records_per_unit: 1.",
            )
