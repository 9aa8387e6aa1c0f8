"""One value that says what is sampled, clipped, noised, and therefore spent.

The sampler, the engine, the noise, the ledger, the report and the verifier read the same plan, so they cannot disagree.
A plan is complete when it exists: ``DpSgd.calibrated`` finds the noise first, there is no "not yet calibrated".
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from sfumato import checks
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.adaptive import AdaptiveClip
from sfumato.privacy.settings import Clipping, PartSettings, PrivacySettings, check_parts, joint_max_grad_norm

MIN_UNITS = 100  # with fewer, no choice of delta < 1/N means anything and any useful noise drowns the data
LARGEST_EPSILON = 100.0  # above it the plan says "private" and protects nobody: e^100
LITTLE_SIGNAL = 0.5  # longest sum of gradients / length of the noise; a rule of thumb, not measured
BYTES_PER_PARAMETER = 32  # float32: weights, gradient, clipped sum, two Adam moments, moving average; float64: noise


@dataclass(frozen=True, kw_only=True, slots=True)
class DpSgd:
    """Poisson-sampled Gaussian mechanism on clipped per-unit gradients, repeated.

    Guarantee: ``steps`` steps, each of which samples every unit with ``sampling_rate``, scales each unit's gradient
    (the mean over at most ``records_per_unit`` records) to L2 norm at most ``max_grad_norm``, adds up, adds
    N(0, (noise_multiplier max_grad_norm)^2) to each coordinate, and divides by ``expected_batch_size``, are
    (epsilon(), delta)-differentially private for adding or removing one unit.

    Attributes:
      population: N, the number of units, a public constant.
      expected_batch_size: B, in units; a public constant, not the size of any batch.
      steps: T, the most steps that may ever be taken.
      noise_multiplier: sigma, standard deviation / clipping bound; 0 is no noise, and epsilon infinite.
      max_grad_norm: C, the clipping bound over all parameters together.
      clipping: flat, per_layer, automatic or adaptive, as in ``PrivacySettings``; however it is done, one unit moves the
        sum by at most C. With adaptive, C is where the bound begins, and sigma is of gradient and count together.
      parts: each with its own C_m and share of 1/sigma^2, so that its noise is sigma / sqrt(share) times C_m; sigma is of
        all together, and ``max_grad_norm`` is sqrt(sum C_m^2). What is in no part is frozen.
      records_per_unit: k, at most so many records of a unit are used in a step.
      target_epsilon: what was asked for, if the noise was calibrated to it.
      population_from_data: N was counted in the data and is hereby declared public.

    Source: Abadi et al. 2016, Algorithm 1, arXiv:1607.00133.
    Differs: Poisson sampling in the algorithm itself; division by the expected batch size.
    """

    population: int
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    delta: float
    max_grad_norm: float = 1.0
    unit: str = "record"
    records_per_unit: int = 1
    adjacency: Literal["add_or_remove"] = "add_or_remove"
    target_epsilon: float | None = None
    population_from_data: bool = False
    clipping: Clipping = "flat"
    parts: tuple[PartSettings, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)
        checks.positive(max_grad_norm=self.max_grad_norm)
        checks.one_of(("flat", "per_layer", "automatic", "adaptive"), clipping=self.clipping)
        checks.non_negative(noise_multiplier=self.noise_multiplier)
        checks.one_of(("add_or_remove",), adjacency=self.adjacency)
        if not 0 < self.delta < 1:
            raise UsageError(
                f"delta = {self.delta} · must be between 0 and 1, both excluded", next="Give about 1/(N ln N)."
            )
        if self.parts:
            object.__setattr__(self, "parts", self._checked_parts())
        if self.clipping == "adaptive":
            AdaptiveClip().gradient_noise_multiplier(self.noise_multiplier, self.expected_batch_size)  # or it refuses

    def _checked_parts(self) -> tuple[PartSettings, ...]:
        """The parts, every one with its share."""
        check_parts(self.parts)
        joint = joint_max_grad_norm(self.parts)
        if self.clipping == "adaptive" or not math.isclose(self.max_grad_norm, joint, rel_tol=1e-9):
            raise UsageError(
                f"clipping = {self.clipping}, max_grad_norm = {self.max_grad_norm} · with these parts it must not be "
                f"adaptive, and {joint:.6g}",
                next="Take max_grad_norm from the parts: sqrt(sum C_m^2).",
            )
        return tuple(
            part if part.share is not None else replace(part, share=(part.max_grad_norm / joint) ** 2)
            for part in self.parts
        )

    def part_noise_multipliers(self) -> dict[str, float]:
        """sigma_m = sigma / sqrt(share) of every part; (sum sigma_m^-2)^(-1/2) is sigma."""
        shares = {part.name: part.share or 0.0 for part in self.parts}  # each > 0: __post_init__ has filled them in
        return {name: self.noise_multiplier * math.sqrt(sum(shares.values()) / share) for name, share in shares.items()}

    @property
    def sampling_rate(self) -> float:
        """q = B / N, the chance of every unit to join a step."""
        return self.expected_batch_size / self.population

    def event(self, count: int | None = None) -> Event:
        """What ``count`` steps (all of them by default) cost."""
        return Event(
            mechanism="poisson_gaussian",
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            count=self.steps if count is None else count,
        )

    def epsilon(self, steps: int | None = None) -> float:
        """Spent after ``steps`` steps (all of them by default), by PLD."""
        value = accounting.epsilon([self.event(steps)], self.delta)
        assert value is not None  # PLD always applies
        return value

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        population: int,
        expected_batch_size: float,
        steps: int,
        delta: float,
        max_grad_norm: float = 1.0,
        unit: str = "record",
        records_per_unit: int = 1,
        population_from_data: bool = False,
        clipping: Clipping = "flat",
        parts: tuple[PartSettings, ...] = (),
    ) -> "DpSgd":
        """The plan with the least noise whose ``epsilon()`` is at most ``epsilon``."""
        sizes = {"population": population, "expected_batch_size": expected_batch_size, "steps": steps, "delta": delta}
        rest: dict[str, Any] = {"max_grad_norm": max_grad_norm, "unit": unit, "records_per_unit": records_per_unit}
        rest |= {"clipping": clipping, "parts": parts}
        cls(**sizes, **rest, noise_multiplier=0.0)  # every other value is checked before the search
        noise_multiplier = accounting.calibrate(
            epsilon=epsilon, delta=delta, sampling_rate=expected_batch_size / population, steps=steps
        )
        return cls(
            **sizes,
            **rest,
            noise_multiplier=noise_multiplier,
            target_epsilon=epsilon,
            population_from_data=population_from_data,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NotPrivate:
    """Ordinary training, for comparison. It protects nobody, and everything made from it says so."""

    population: int
    expected_batch_size: float
    steps: int
    unit: str = "record"
    records_per_unit: int = 1
    population_from_data: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.population

    def event(self, count: int | None = None) -> None:
        """There is no event: nothing that an accountant could bound."""

    def epsilon(self, steps: int | None = None) -> float:
        return math.inf


PrivacyPlan = DpSgd | NotPrivate


def automatic_delta(population: int) -> float:
    """1 / (N ln N): below 1/N, by a factor that grows with N."""
    return 1.0 / (population * math.log(population))


def make_plan(
    settings: PrivacySettings,
    *,
    steps: int,
    expected_batch_size: float,
    population: int,
    records: int | None = None,
    parameters: int | None = None,
    memory_bytes: int | None = None,
) -> PrivacyPlan:
    """Turns what was asked for into a plan, or refuses with every reason why it cannot work.

    Args:
      steps, expected_batch_size: T and B; B in units.
      population: the number of units counted in the data. It is used, and declared public, if the settings give none.
      records: the number of records in the data, if known.
      parameters: how many numbers are trained, if known.
      memory_bytes: the memory that training may use, if known.

    Raises: PrivacyRefused; its ``refusals`` are dicts with code, message and next.
    """
    units = settings.population if settings.population is not None else population
    refusals = [
        *_size_refusals(steps, expected_batch_size, units, records),
        *_memory_refusals(parameters, memory_bytes),
    ]
    sizes: dict[str, Any] = {
        "population": units,
        "expected_batch_size": float(expected_batch_size),
        "steps": steps,
        "unit": settings.unit,
        "records_per_unit": settings.records_per_unit,
        "population_from_data": settings.population is None,
    }
    plan: PrivacyPlan | None = None
    if settings.mechanism == "none":
        if not refusals:
            plan = NotPrivate(**sizes)
    else:
        if units < MIN_UNITS:
            refusals.append(
                _refusal(
                    "too_few_units",
                    f"population = {units} {settings.unit}s · a guarantee that means anything needs {MIN_UNITS}",
                    "Add data, or set privacy.mechanism: none and say so.",
                )
            )
        delta = settings.delta if settings.delta != "auto" else automatic_delta(max(units, 3))
        if units >= 1 and delta >= 1 / units:
            refusals.append(
                _refusal(
                    "delta_too_large",
                    f"delta = {delta:g} · must be below 1/N = {1 / units:.3g}: otherwise a whole {settings.unit} may "
                    "be given away",
                    f"Set privacy.delta: auto, which is {automatic_delta(max(units, 3)):.2g}.",
                )
            )
        possible = not any(reason["code"] in _NO_ARITHMETIC for reason in refusals)
        private, more = _dp_sgd(settings, sizes, delta, possible)
        refusals += more
        plan = private
    if refusals or plan is None:
        words = "; ".join(reason["message"] for reason in refusals)
        raise PrivacyRefused(
            words, next=refusals[0]["next"], code=refusals[0]["code"] if len(refusals) == 1 else None, refusals=refusals
        )
    return plan


_NO_ARITHMETIC = {"no_steps", "empty_batch", "batch_larger_than_population"}  # no epsilon can be computed


def _dp_sgd(
    settings: PrivacySettings, sizes: dict[str, Any], delta: float, possible: bool
) -> tuple[DpSgd | None, list[dict[str, str]]]:
    """The private plan, and what speaks against its epsilon or noise."""
    refusals: list[dict[str, str]] = []
    if settings.epsilon is not None and settings.epsilon > LARGEST_EPSILON:
        refusals.append(
            _refusal(
                "epsilon_too_large",
                f"epsilon = {settings.epsilon:g} · a guarantee of more than {LARGEST_EPSILON:g} protects nobody",
                "Ask for 10 or less, or set privacy.mechanism: none and say so.",
            )
        )
    noise = settings.noise_multiplier
    if noise is not None and not accounting.SMALLEST_NOISE_MULTIPLIER <= noise <= accounting.LARGEST_NOISE_MULTIPLIER:
        refusals.append(
            _refusal(
                "noise_multiplier_out_of_range",
                f"noise_multiplier = {noise:g} · must be between {accounting.SMALLEST_NOISE_MULTIPLIER:g} (below, "
                f"nothing is hidden) and {accounting.LARGEST_NOISE_MULTIPLIER:g} (above, nothing is learnt)",
                "Give privacy.epsilon instead: the noise is then found for you.",
            )
        )
    if refusals or not possible:
        return None, refusals
    values = {**sizes, "delta": delta, "max_grad_norm": settings.max_grad_norm}
    values |= {"clipping": settings.clipping, "parts": settings.parts}
    try:
        if noise is not None:
            plan = DpSgd(**values, noise_multiplier=noise, adjacency=settings.adjacency)
        else:
            assert settings.epsilon is not None  # the settings hold exactly one of the two
            plan = DpSgd.calibrated(epsilon=settings.epsilon, **values)
    except PrivacyRefused as refused:
        return None, refused.refusals
    if noise is not None and plan.epsilon() > LARGEST_EPSILON:
        refusals.append(
            _refusal(
                "epsilon_too_large",
                f"noise_multiplier = {noise:g} · spends epsilon = {plan.epsilon():.4g} over {plan.steps} steps, "
                f"more than {LARGEST_EPSILON:g}",
                "Raise the noise, lower the steps or the batch size, or give privacy.epsilon instead.",
            )
        )
    return plan, refusals


def _size_refusals(steps: int, batch: float, units: int, records: int | None) -> list[dict[str, str]]:
    refusals = []
    if steps < 1:
        refusals.append(_refusal("no_steps", f"steps = {steps} · must be at least 1", "Raise training.steps."))
    if not batch > 0 or not math.isfinite(batch):
        refusals.append(
            _refusal(
                "empty_batch", f"expected_batch_size = {batch} · must be above 0", "Raise the expected batch size."
            )
        )
    if units < 1:
        refusals.append(
            _refusal("too_few_units", f"population = {units} · there is no unit to learn from", "Give data.")
        )
    if batch > units:
        refusals.append(
            _refusal(
                "batch_larger_than_population",
                f"expected_batch_size = {batch:g} · must be at most the population, {units}: the sampling rate would "
                f"be {batch / units if units > 0 else math.inf:.3g}, above 1",
                f"Set the expected batch size to {max(units // 10, 1)} or so.",
            )
        )
    if records is not None and units > 0 and records < 1:
        refusals.append(_refusal("no_records", f"records = {records} · there is nothing to learn from", "Give data."))
    return refusals


def _memory_refusals(parameters: int | None, memory_bytes: int | None) -> list[dict[str, str]]:
    if parameters is None or memory_bytes is None or parameters * BYTES_PER_PARAMETER <= memory_bytes:
        return []
    return [
        _refusal(
            "memory",
            f"parameters = {parameters:,} · need {parameters * BYTES_PER_PARAMETER / 2**30:.2f} GiB for weights, sums, "
            f"noise and optimiser before the first example; {memory_bytes / 2**30:.2f} GiB are there",
            "Choose a smaller model, or train fewer of its parameters.",
        )
    ]


def _refusal(code: str, message: str, next: str) -> dict[str, str]:
    return {"code": code, "message": message, "next": next}


def warnings_of(plan: PrivacyPlan, *, parameters: int | None = None) -> list[dict[str, str]]:
    """What a user should know before starting: dicts with code, message and next. None of it forbids the run."""
    if isinstance(plan, NotPrivate):
        return [
            _refusal(
                "not_private", "mechanism = none · nothing protects the records", "Do not release what comes of it."
            )
        ]
    warnings = []
    epsilon = plan.epsilon()
    if epsilon < 2:
        warnings.append(
            _refusal(
                "epsilon_small",
                f"epsilon = {epsilon:.3g} · below 2 a generator usually needs hundreds of thousands of units",
                "Expect coarse output, or raise privacy.epsilon.",
            )
        )
    if epsilon > 10:
        warnings.append(
            _refusal(
                "epsilon_large",
                f"epsilon = {epsilon:.3g} · above 10 the guarantee is weak: it bounds odds by e^{epsilon:.3g}",
                "Lower privacy.epsilon, or do not rest the case on the guarantee alone.",
            )
        )
    if plan.noise_multiplier < 0.3:
        warnings.append(
            _refusal(
                "noise_small",
                f"noise_multiplier = {plan.noise_multiplier:g} · below 0.3 the bound rests on far tails",
                "Take more noise and more steps, or larger batches.",
            )
        )
    if parameters is not None and plan.noise_multiplier > 0:
        a_step = plan.expected_batch_size / (plan.noise_multiplier * math.sqrt(parameters))
        if a_step < LITTLE_SIGNAL:
            warnings.append(
                _refusal(
                    "few_units",
                    f"population = {plan.population} {plan.unit}s · is few for {parameters:,} parameters at epsilon = "
                    f"{epsilon:.3g}: in each step the noise is at least {1 / a_step:.3g} times as long as what all units together say",
                    "Expect coarse pictures that follow their texts badly. More units help most, then fewer parameters.",
                )
            )
    return warnings


def plan_to_dict(plan: PrivacyPlan) -> dict[str, Any]:
    """Plain JSON values; ``kind`` says which plan it is. ``clipping`` and ``parts`` are left out where they say nothing,
    so that a plan without them is written, and hashed, as it always was."""
    kind = "dp_sgd" if isinstance(plan, DpSgd) else "none"
    values = asdict(plan)
    for name, default in (("clipping", "flat"), ("parts", ())):
        if values.get(name) == default:
            del values[name]
    if "parts" in values:
        values["parts"] = [{**part, "modules": list(part["modules"])} for part in values["parts"]]
    return {"kind": kind, **values}


def plan_from_dict(values: Any) -> PrivacyPlan:
    """Reads what ``plan_to_dict`` wrote. Raises UsageError for an unknown kind, key or value."""
    if not isinstance(values, dict):
        raise UsageError(
            f"plan = {type(values).__name__} · must be a mapping", next="It was written by something else."
        )
    rest = {key: value for key, value in values.items() if key != "kind"}
    kinds: dict[Any, Any] = {"dp_sgd": DpSgd, "none": NotPrivate}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(f"plan.kind = {kind!r} · must be dp_sgd or none", next="It was written by something else.")
    _check_types("plan", rest, _TYPES)
    if "parts" in rest:
        rest["parts"] = tuple(_part_from_dict(part) for part in rest["parts"])
    try:
        return kinds[kind](**rest)
    except (TypeError, OverflowError) as error:
        raise UsageError(
            f"plan = {sorted(rest)} · {error}", next="It was written by another version, or changed."
        ) from None


_TYPES: dict[str, tuple[type, ...]] = {
    "population": (int,),
    "expected_batch_size": (int, float),
    "steps": (int,),
    "noise_multiplier": (int, float),
    "delta": (int, float),
    "max_grad_norm": (int, float),
    "unit": (str,),
    "records_per_unit": (int,),
    "adjacency": (str,),
    "target_epsilon": (int, float, type(None)),
    "population_from_data": (bool,),
    "clipping": (str,),
    "parts": (list,),
}
_PART_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "modules": (list,),
    "max_grad_norm": (int, float),
    "share": (int, float),
}


def _part_from_dict(values: Any) -> PartSettings:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(PartSettings)}:
        given = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise UsageError(
            f"plan.parts = {given} · must have exactly {', '.join(_PART_TYPES)}",
            next="It was written by another version, or changed.",
        )
    _check_types("plan.parts", values, _PART_TYPES)
    if not all(type(module) is str for module in values["modules"]):
        raise UsageError("plan.parts.modules · must be text", next="It was written by something else, or changed.")
    try:
        return PartSettings(**{**values, "modules": tuple(values["modules"])})
    except OverflowError as error:
        raise UsageError(f"plan.parts · {error}", next="It was written by something else, or changed.") from None


def _check_types(where: str, values: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
    for key, value in values.items():
        if key in types and type(value) not in types[key]:
            names = " or ".join(kind.__name__ for kind in types[key])
            raise UsageError(
                f"{where}.{key} = {value!r} · must be {names}", next="It was written by another version, or changed."
            )


def _check_sizes(plan: Any) -> None:
    for name in ("population", "steps", "records_per_unit"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} = {value!r} · must be a whole number >= 1", next="Give a larger number.")
    checks.positive(expected_batch_size=plan.expected_batch_size)
    if plan.expected_batch_size > plan.population:
        raise UsageError(
            f"expected_batch_size = {plan.expected_batch_size:g} · must be at most population = {plan.population}",
            next="Lower the expected batch size.",
        )
    checks.one_of(("record", "person", "site"), unit=plan.unit)
    if plan.unit == "record" and plan.records_per_unit != 1:
        raise UsageError(
            f"records_per_unit = {plan.records_per_unit} · must be 1 when unit is record", next="Set unit: person."
        )
