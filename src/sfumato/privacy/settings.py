"""What the user asks of privacy; ``plan.make_plan`` turns it, with the data's public size, into a ``PrivacyPlan`` or refuses."""

import math
from dataclasses import dataclass
from typing import Literal

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy.events import Adjacency

DEFAULT_MAX_GRAD_NORM = 1.0
Clipping = Literal["flat", "per_layer", "automatic", "adaptive"]
NoiseSource = Literal["gaussian", "discrete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSettings:
    """A part of the model that is clipped by itself.

    Attributes:
      name: of the part, in messages and reports.
      modules: names of modules (or parameters); a parameter belongs to the part that names it most precisely, "" is all
        that no other part names.
      max_grad_norm: C_m, the bound on a unit's gradient over this part.
      share: of 1/sigma^2, what part of the guarantee it uses: its own noise multiplier is sigma / sqrt(share). The shares
        of all parts are 1 together. None, for all parts: C_m^2 / sum C^2, which is the same noise on every part.
    """

    name: str
    modules: tuple[str, ...]
    max_grad_norm: float
    share: float | None = None

    def __post_init__(self) -> None:
        checks.positive(max_grad_norm=self.max_grad_norm)
        if not self.name.strip() or not self.modules:
            raise UsageError(
                f"part = {self.name!r}, modules = {list(self.modules)} · a part has a name and at least one module",
                next="For example {name: text, modules: [text_encoder], max_grad_norm: 0.5}.",
            )
        if self.share is not None:
            checks.positive(share=self.share)
            checks.probability(share=self.share)


def joint_max_grad_norm(parts: tuple[PartSettings, ...]) -> float:
    """sqrt(sum C_m^2): the bound on a unit's gradient over all parts together."""
    return math.sqrt(sum(part.max_grad_norm**2 for part in parts))


def check_parts(parts: tuple[PartSettings, ...]) -> None:
    """Raises UsageError for names that occur twice, or shares that are not 1 together."""
    names = [part.name for part in parts]
    modules = [module for part in parts for module in part.modules]
    twice = sorted({name for name in names if names.count(name) > 1} | {m for m in modules if modules.count(m) > 1})
    if twice:
        raise UsageError(f"parts · {', '.join(map(repr, twice))} occurs twice", next="Name every part and module once.")
    shares = [part.share for part in parts if part.share is not None]
    if shares and (len(shares) < len(parts) or not math.isclose(sum(shares), 1.0, rel_tol=1e-9)):
        raise UsageError(
            f"share = {', '.join(f'{part.name}: {part.share}' for part in parts)} · must be 1 together, or missing in all",
            next="Give every part a share of the guarantee, 0.5 and 0.5 for example.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipEstimateSettings:
    """Attributes: share: of epsilon, spent on C before the first step; quantile: of the norms, that C becomes."""

    share: float = 0.02
    quantile: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("quantile", self.quantile)):
            if not 0 < value < 1:
                raise UsageError(f"{name} = {value} · must be between 0 and 1, both excluded", next="Take the default.")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySettings:
    """Attributes:
    mechanism: dp_sgd, or none (a non-private run, marked so everywhere).
    unit: what is protected: one record, or all the records of one person.
    records_per_unit: k, public: at most this many records of a unit make its gradient (their mean).
    population: N, the public number of units; None takes the number in the data and *declares it public*.
    epsilon: the target; or give noise_multiplier instead. Exactly one of the two.
    delta: "auto" is 1/(N ln N).
    max_grad_norm: C. With parts it is what they make together, sqrt(sum C_m^2), and is left out. auto: a quantile of the norms
      at the first weights, estimated privately and paid from the same epsilon (privacy/clip_estimate.py).
    clip_estimate: for auto: which share of epsilon, and which quantile.
    clipping: flat: one clip; per_layer: each of L layers to C / sqrt(L); automatic: AUTO-S; adaptive: C follows the median
      of the norms from max_grad_norm on, and the counting is paid from the same epsilon (privacy/adaptive.py).
    parts: the model's parts with a bound each, instead of one; what is trained must be in one of them.
    adjacency: add_or_remove, zero_out or replace_one (privacy/events.py); the last needs about twice the noise.
    bands: b > 1 correlates the noise of b consecutive steps (banded matrix factorisation) and samples b groups in turn.
    largest_batch: of a larger sample a random subset of so many units is taken; not under add_or_remove.
    noise: gaussian; or discrete, sampled exactly on the integers, slower.
    account: the ledger shared by all runs on one data set; None is .sfumato/account.db beside the data.
    account_epsilon: of all runs on that account together, whatever is planned after earlier results were seen, at this
      run's delta (privacy/filters.py). It is kept in the account, binds every later run, and cannot be raised there.
    """

    mechanism: Literal["dp_sgd", "none"] = "dp_sgd"
    unit: Literal["record", "person"] = "record"
    records_per_unit: int = 1
    population: int | None = None
    adjacency: Adjacency = "add_or_remove"
    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    delta: float | Literal["auto"] = "auto"
    max_grad_norm: float | Literal["auto"] = DEFAULT_MAX_GRAD_NORM
    clip_estimate: ClipEstimateSettings | None = None
    clipping: Clipping = "flat"
    parts: tuple[PartSettings, ...] = ()
    bands: int = 1
    largest_batch: int | None = None
    noise: NoiseSource = "gaussian"
    accountant: Literal["pld"] = "pld"
    on_exhausted: Literal["stop"] = "stop"
    account: str | None = None
    account_epsilon: float | None = None

    def __post_init__(self) -> None:
        checks.positive(records_per_unit=self.records_per_unit)
        if self.max_grad_norm == "auto":
            self._check_auto()
        else:
            checks.positive(max_grad_norm=self.max_grad_norm)
            if self.clip_estimate is not None:
                raise UsageError(
                    f"clip_estimate · would estimate C, but max_grad_norm = {self.max_grad_norm} says it",
                    next="Set privacy.max_grad_norm: auto, or leave out privacy.clip_estimate.",
                )
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
        if self.parts:
            check_parts(self.parts)
            if self.clipping == "adaptive":
                raise UsageError(
                    "clipping = adaptive · follows one bound, but parts have several",
                    next="Set privacy.clipping: flat.",
                )
            joint = joint_max_grad_norm(self.parts)
            if self.max_grad_norm not in (DEFAULT_MAX_GRAD_NORM, joint):
                raise UsageError(
                    f"max_grad_norm = {self.max_grad_norm} · every part has its own; together they make {joint:.6g}",
                    next="Leave out privacy.max_grad_norm.",
                )
            object.__setattr__(self, "max_grad_norm", joint)
        if self.account_epsilon is not None:
            checks.positive(account_epsilon=self.account_epsilon)
            if self.mechanism == "none":
                raise UsageError(
                    f"account_epsilon = {self.account_epsilon} · a run without privacy keeps no limit",
                    next="Set privacy.account_epsilon: null, or give the run a mechanism.",
                )
        checks.positive(bands=self.bands)
        if self.largest_batch is not None:
            checks.positive(largest_batch=self.largest_batch)
        if self.unit == "record" and self.records_per_unit != 1:
            raise UsageError(
                f"records_per_unit = {self.records_per_unit} · must be 1 when unit is record",
                next="Set privacy.unit: person, or records_per_unit: 1.",
            )

    def _check_auto(self) -> None:
        if self.mechanism != "dp_sgd" or self.epsilon is None or self.parts:
            raise UsageError(
                f"max_grad_norm = auto · takes a share of epsilon = {self.epsilon} for one bound of mechanism = {self.mechanism}, "
                f"with {len(self.parts)} parts",
                next="Set privacy.epsilon and mechanism: dp_sgd, and leave out the parts; or give max_grad_norm.",
            )
        if self.clip_estimate is None:
            object.__setattr__(self, "clip_estimate", ClipEstimateSettings())
