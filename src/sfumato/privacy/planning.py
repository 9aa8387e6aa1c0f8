"""From what was asked to a plan, or to every reason why there cannot be one; and what a user should know beforehand."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.clip_estimate import with_estimated_bound
from sfumato.privacy.plan import Composition, DpSgd, LatentRelease, NotPrivate, PrivacyPlan, TrainingPlan
from sfumato.privacy.release_planning import release_plan, worth
from sfumato.privacy.settings import OF_RELEASES, PrivacySettings
from sfumato.privacy.warm_planning import with_warm_start

MIN_UNITS = 100  # with fewer, no choice of delta < 1/N means anything and any useful noise drowns the data
LARGEST_EPSILON = 100.0  # above it the plan says "private" and protects nobody: e^100
LITTLE_SIGNAL = 0.5  # longest sum of gradients / length of the noise; a rule of thumb, not measured
BYTES_PER_PARAMETER = 32  # float32: weights, gradient, clipped sum, two Adam moments, moving average; float64: noise


def automatic_delta(population: int) -> float:
    """1 / (N ln N): below 1/N, by a factor that grows with N."""
    return 1.0 / (population * math.log(population))


def training_plan(settings: PrivacySettings, **sizes: Any) -> TrainingPlan:
    """``make_plan`` for what trains on the records themselves, in steps and no more. Raises UsageError for a release, and
    for an estimate before the steps."""
    if settings.max_grad_norm == "auto":
        raise UsageError(
            "max_grad_norm = auto · is estimated for one training, not yet at every site of a federation",
            next="Give privacy.max_grad_norm a number.",
        )
    if settings.warm_start is not None:
        raise UsageError(
            "warm_start · is a release before the steps, and here there are steps alone",
            next="Set privacy.warm_start and model.warm_start: null.",
        )
    if settings.mechanism in OF_RELEASES:
        raise UsageError(
            f"mechanism = {settings.mechanism} · is no training in steps on the records",
            next="Set privacy.mechanism: dp_sgd.",
        )
    plan = make_plan(settings, **sizes)
    assert isinstance(plan, DpSgd | NotPrivate)
    return plan


def make_plan(
    settings: PrivacySettings,
    *,
    steps: int,
    expected_batch_size: float,
    population: int,
    records: int | None = None,
    parameters: int | None = None,
    memory_bytes: int | None = None,
    dimensions: Mapping[str, int] | None = None,
) -> PrivacyPlan:
    """Turns what was asked for into a plan, or refuses with every reason why it cannot work.

    Args:
      steps, expected_batch_size: T and B; B in units.
      population: the number of units counted in the data. It is used, and declared public, if the settings give none.
      records: the number of records in the data, if known.
      parameters: how many numbers are trained, if known.
      memory_bytes: the memory that training may use, if known.
      dimensions: of what is released, by name, where the mechanism is a release; of a warm start, ``warm_start``.

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
        if settings.mechanism in OF_RELEASES:
            plan, more = _release(settings, sizes, delta, possible, dimensions)
        else:
            plan, more = _dp_sgd(settings, sizes, delta, possible, dimensions)
        refusals += more
    if refusals or plan is None:
        words = "; ".join(reason["message"] for reason in refusals)
        raise PrivacyRefused(
            words, next=refusals[0]["next"], code=refusals[0]["code"] if len(refusals) == 1 else None, refusals=refusals
        )
    return plan


_NO_ARITHMETIC = {"no_steps", "empty_batch", "batch_larger_than_population"}  # no epsilon can be computed


def _release(
    settings: PrivacySettings,
    sizes: dict[str, Any],
    delta: float,
    possible: bool,
    dimensions: Mapping[str, int] | None,
) -> tuple[PrivacyPlan | None, list[dict[str, str]]]:
    """The plan of a release, and what speaks against its epsilon or noise."""
    refusals = _target_refusals(settings)
    if refusals or not possible:
        return None, refusals
    whom = {name: value for name, value in sizes.items() if name not in ("expected_batch_size", "steps")}
    try:
        plan = release_plan(settings, {**whom, "delta": delta, "adjacency": settings.adjacency}, dimensions)
    except PrivacyRefused as refused:
        return None, refused.refusals
    if plan.epsilon() > LARGEST_EPSILON:
        refusals.append(
            _refusal(
                "epsilon_too_large",
                f"epsilon = {plan.epsilon():.4g} · is what this noise spends, more than {LARGEST_EPSILON:g}",
                "Give privacy.epsilon instead: the noise is then found for you.",
            )
        )
    return plan, refusals


def _target_refusals(settings: PrivacySettings) -> list[dict[str, str]]:
    """What speaks against the epsilon or the noise that was asked for."""
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
    return refusals


def _dp_sgd(
    settings: PrivacySettings,
    sizes: dict[str, Any],
    delta: float,
    possible: bool,
    dimensions: Mapping[str, int] | None,
) -> tuple[DpSgd | Composition | None, list[dict[str, str]]]:
    """The private plan, and what speaks against its epsilon or noise."""
    refusals = _target_refusals(settings)
    if refusals or not possible:
        return None, refusals
    noise = settings.noise_multiplier
    values: dict[str, Any] = {**sizes, "delta": delta}
    if settings.max_grad_norm != "auto":
        values["max_grad_norm"] = settings.max_grad_norm
    values |= {"clipping": settings.clipping, "parts": settings.parts, "adjacency": settings.adjacency}
    values |= {"bands": settings.bands, "largest_batch": settings.largest_batch, "noise": settings.noise}
    try:
        if noise is not None:
            plan: DpSgd | Composition = DpSgd(**values, noise_multiplier=noise)
        elif settings.warm_start is not None:
            assert settings.epsilon is not None  # the settings see to it
            if dimensions is None:
                raise UsageError("warm_start · needs a model, of which is released", next="Plan with a recipe.")
            of = settings.clip_estimate
            plan = with_warm_start(
                epsilon=settings.epsilon,
                share=settings.warm_start.share,
                dimension=dimensions["warm_start"],
                clip_estimate=None if of is None else (of.share, of.quantile),
                **values,
            )
        elif settings.clip_estimate is not None:
            assert settings.epsilon is not None  # the settings see to it
            of = settings.clip_estimate
            plan = with_estimated_bound(epsilon=settings.epsilon, share=of.share, quantile=of.quantile, **values)
        else:
            assert settings.epsilon is not None  # the settings hold exactly one of the two
            plan = DpSgd.calibrated(epsilon=settings.epsilon, **values)
    except PrivacyRefused as refused:
        return None, refused.refusals
    if noise is not None and plan.epsilon() > LARGEST_EPSILON:
        refusals.append(
            _refusal(
                "epsilon_too_large",
                f"noise_multiplier = {noise:g} · spends epsilon = {plan.epsilon():.4g} over {sizes['steps']} steps, "
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


def warnings_of(plan: PrivacyPlan, *, parameters: int | None = None, sites: Sequence[int] = ()) -> list[dict[str, str]]:
    """What a user should know before starting: dicts with code, message and next. None of it forbids the run.

    Args: sites: of a federation whose plan for one of its sites this is, the number of units at every site.
    """
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
    for stage in plan.stages if isinstance(plan, Composition) else (plan,):
        if isinstance(stage, LatentRelease):
            warnings.append(_worth_warning(stage))
        elif isinstance(stage, DpSgd):
            warnings += _of_steps(stage, epsilon, parameters, sites)
    return warnings


def _worth_warning(plan: LatentRelease) -> dict[str, str]:
    names = ", ".join(f"{name} {value:.2g}" for name, value in worth(plan).items())
    return _refusal(
        "latents_noisy",
        f"latents = {plan.form} · of every {plan.unit}'s own release, one coordinate's signal over its noise is at most about "
        f"{names}: one {plan.unit} is hardly seen in it, only what many have in common",
        "Keep the latents short; or release a mean over all (mechanism: mean_embedding), or train with dp_sgd.",
    )


def _of_steps(plan: DpSgd, epsilon: float, parameters: int | None, sites: Sequence[int]) -> list[dict[str, str]]:
    """In a mean over K sites, weighted by units, every site's noise is as long as at one place with all units, so K of them are sqrt(K)
    times as long; the batch is that of all."""
    units, noises = sum(sites) or plan.population, max(1, len(sites))
    batch = plan.expected_batch_size * units / plan.population
    warnings = []
    if plan.noise_multiplier < 0.3:
        warnings.append(
            _refusal(
                "noise_small",
                f"noise_multiplier = {plan.noise_multiplier:g} · below 0.3 the bound rests on far tails",
                "Take more noise and more steps, or larger batches.",
            )
        )
    if parameters is not None and plan.noise_multiplier > 0:
        a_step = batch / (plan.noise_multiplier * math.sqrt(noises * parameters))
        if a_step < LITTLE_SIGNAL:
            at = f" at {noises} sites" if sites else ""
            warnings.append(
                _refusal(
                    "few_units",
                    f"population = {units} {plan.unit}s{at} · is few for {parameters:,} parameters at epsilon = "
                    f"{epsilon:.3g}: in each step the noise is at least {1 / a_step:.3g} times as long as what all units together say",
                    "Expect coarse pictures that follow their texts badly. More units help most, then fewer parameters.",
                )
            )
    return warnings
