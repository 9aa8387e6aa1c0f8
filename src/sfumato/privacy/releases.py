"""Plans of what is released once: latents, codes, a mean embedding, estimates. What is made of it is post-processing."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.events import Adjacency, Event
from sfumato.privacy.private_plan import PrivatePlan, whole
from sfumato.privacy.questions import Quantile, Question, UnitCount, sums_of


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentModality:
    """One modality of a latent release.

    Attributes:
      name: of the modality.
      dimension: d_m, of its latent.
      max_norm: C_m, to which every latent is clipped: z min(1, C / |z|).
      weight: w_m, how much its error counts when the noise is split.
      noise_std: sigma_m, of every coordinate; None lets the formula split it.
    """

    name: str
    dimension: int
    max_norm: float = 1.0
    weight: float = 1.0
    noise_std: float | None = None

    def __post_init__(self) -> None:
        whole(1, dimension=self.dimension)
        checks.positive(max_norm=self.max_norm, weight=self.weight)
        if self.noise_std is not None:
            checks.positive(noise_std=self.noise_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gaussian(PrivatePlan):
    """One event, a Gaussian over all units, whose noise can be found for an epsilon."""

    noise_multiplier: float

    @classmethod
    def calibrated(cls, *, epsilon: float, before: Sequence[Event] = (), **values: Any) -> Self:
        """The plan with the least noise that spends, together with the events ``before`` it, at most ``epsilon``.

        Args: values: every other field, but for noise_multiplier and target_epsilon.
        """
        sought = cls(**values, noise_multiplier=1.0)
        noise = accounting.calibrate_event(
            sought.events()[0], before=tuple(before), epsilon=epsilon, delta=sought.delta, adjacency=sought.adjacency
        )
        return cls(**values, noise_multiplier=noise, target_epsilon=epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentRelease(_Gaussian):
    """Every unit's latents, clipped and noised, released once; whatever is trained on them is post-processing.

    Guarantee: k = ``records_per_unit`` rows for every one of the N units, each row with one latent for every modality
    (zero where the unit has no such record), clipped to C_m, plus N(0, sigma_m^2) on every coordinate, are
    (epsilon(), delta)-private under ``adjacency``: the rows of a unit are k Gaussian mechanisms of noise multiplier
    (sum_m (C_m / sigma_m)^2)^(-1/2). Rows are in an order that does not depend on the data. It protects the records, not
    what made latents of them: the encoder is public and frozen, or has a plan of its own in a ``Composition``.

    Local: who looks counts the rows, so N is public and add_or_remove is refused. No amplification by sampling.

    Attributes:
      form: independent (a clip and a noise for every modality), or shared (one latent, one clip, one noise).
      modalities: of the rows; one for shared.
      noise_multiplier: (sum_m (C_m / sigma_m)^2)^(-1/2).
    """

    modalities: tuple[LatentModality, ...]
    form: Literal["independent", "shared"] = "independent"
    adjacency: Adjacency = "zero_out"

    def __post_init__(self) -> None:
        self.check_common()
        checks.positive(noise_multiplier=self.noise_multiplier)
        checks.one_of(("independent", "shared"), form=self.form)
        checks.one_of(("replace_one", "zero_out"), adjacency=self.adjacency)
        names = [modality.name for modality in self.modalities]
        if not names or len(set(names)) < len(names) or (self.form == "shared" and len(names) != 1):
            raise UsageError(
                f"modalities = {names} · must have different names, and be one for a shared latent",
                next="Name every modality once; an aligned latent of several is one modality.",
            )
        given = [modality.noise_std is not None for modality in self.modalities]
        if any(given) and not all(given):
            raise UsageError("noise_std · is given for some modalities", next="Give it for all of them, or for none.")
        split = self.modalities if all(given) else split_noise(self.modalities, self.noise_multiplier)
        if not math.isclose(noise_multiplier_of(split), self.noise_multiplier, rel_tol=1e-9):
            raise UsageError(
                f"noise_multiplier = {self.noise_multiplier:g} · the modalities' noise makes {noise_multiplier_of(split):g}",
                next="Leave out noise_std, or take noise_multiplier_of(modalities).",
            )
        object.__setattr__(self, "modalities", split)

    def events(self) -> tuple[Event, ...]:
        return (
            Event(
                mechanism="gaussian",
                sampling_rate=1.0,
                noise_multiplier=self.noise_multiplier,
                count=self.records_per_unit,
            ),
        )

    def mechanism(self, spent: Sequence[Event]) -> dict[str, Any]:
        return {
            "name": "latent_release",
            "form": self.form,
            "noise_multiplier": self.noise_multiplier,
            "modalities": [
                {"name": m.name, "dimension": m.dimension, "max_norm": m.max_norm, "noise_std": m.noise_std}
                for m in self.modalities
            ],
            "rows_per_unit": self.records_per_unit,
            **self.spending(spent),
        }


def noise_multiplier_of(modalities: Sequence[LatentModality]) -> float:
    """(sum_m (C_m / sigma_m)^2)^(-1/2)."""
    return math.fsum((m.max_norm / (m.noise_std or math.inf)) ** 2 for m in modalities) ** -0.5


def split_noise(modalities: Sequence[LatentModality], noise_multiplier: float) -> tuple[LatentModality, ...]:
    """The sigma_m that minimise sum_m w_m d_m sigma_m^2 for one joint noise multiplier:
    sigma_m^2 = kappa C_m / sqrt(w_m d_m), kappa = noise_multiplier^2 sum_m C_m sqrt(w_m d_m) (Lagrange)."""
    kappa = noise_multiplier**2 * math.fsum(m.max_norm * math.sqrt(m.weight * m.dimension) for m in modalities)
    return tuple(
        replace(m, noise_std=math.sqrt(kappa * m.max_norm / math.sqrt(m.weight * m.dimension))) for m in modalities
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Codebook(PrivatePlan):
    """Every unit's latent as ``codes`` of a public codebook, each of them told with randomised response.

    Guarantee: each of the k ``codes`` codes of a unit, one of ``categories``, is kept with probability
    1 - p + p / categories, else replaced by another one, all equally likely; p is ``noise``. Local: N is public.
    """

    categories: int
    noise: float
    codes: int = 1
    adjacency: Adjacency = "replace_one"

    def __post_init__(self) -> None:
        self.check_common()
        whole(1, codes=self.codes)
        checks.positive(noise=self.noise)
        accounting.check_adjacency(self.events(), self.adjacency)

    def events(self) -> tuple[Event, ...]:
        return (
            Event(
                mechanism="randomized_response",
                sampling_rate=1.0,
                noise_multiplier=self.noise,
                categories=self.categories,
                count=self.codes * self.records_per_unit,
            ),
        )

    @property
    def keep_probability(self) -> float:
        """That a code is told as it is: e^eps / (e^eps + K - 1)."""
        return 1 - self.noise + self.noise / self.categories

    def mechanism(self, spent: Sequence[Event]) -> dict[str, Any]:
        return {
            "name": "codebook",
            "categories": self.categories,
            "codes": self.codes,
            "noise": self.noise,
            "keep_probability": self.keep_probability,
            "rows_per_unit": self.records_per_unit,
            **self.spending(spent),
        }

    @classmethod
    def calibrated(cls, *, epsilon: float, **values: Any) -> "Codebook":
        """All codes of a unit together at most epsilon-private (delta counts for nothing): epsilon / (k codes) each."""
        checks.positive(epsilon=epsilon)
        categories = values["categories"]
        one = epsilon / (values.get("codes", 1) * values.get("records_per_unit", 1))
        noise = categories / (math.exp(one) + categories - 1)
        return cls(**values, noise=noise, target_epsilon=epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanEmbedding(_Gaussian):
    """One noisy sum of bounded features over all units, released once: a generator fitted to it is post-processing.

    Guarantee: the sum over units of a feature vector of L2 norm at most ``max_norm`` (the mean over at most k records of
    a unit), plus N(0, (noise_multiplier max_norm)^2) on every coordinate, divided by the public N.

    Source: Harder et al. 2021 (DP-MERF), arXiv:2002.11603. Differs: a noisy sum over a public constant, so that
    add_or_remove and zero_out cost max_norm once.
    """

    dimension: int
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        self.check_common()
        whole(1, dimension=self.dimension)
        checks.positive(max_norm=self.max_norm)
        checks.non_negative(noise_multiplier=self.noise_multiplier)

    def events(self) -> tuple[Event, ...]:
        return (Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=self.noise_multiplier),)

    def mechanism(self, spent: Sequence[Event]) -> dict[str, Any]:
        return {
            "name": "mean_embedding",
            "dimension": self.dimension,
            "max_norm": self.max_norm,
            "noise_multiplier": self.noise_multiplier,
            **self.spending(spent),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate(_Gaussian):
    """The answer to one question about the data, noised (``questions``, ``estimate``).

    Guarantee: a unit is taken with ``sampling_rate`` (1: all are), contributes to each of the question's sums at most k =
    ``records_per_unit`` records, and moves them no further than the question says; on every coordinate of each sum is
    N(0, ``noise_std``^2). Where there are T > 1 sums they are asked one after another of the same units; together
    they are one Gaussian mechanism of ``noise_multiplier`` (``events.joint_noise_multiplier``), so that is one event, also
    under sampling.

    Attributes:
      name: what is estimated, in words that may be published.
      noise_multiplier: of all sums together.
      sampling_rate: of the units, by Poisson sampling; below 1 for quantiles only, whose answer needs no scaling up.
    """

    name: str
    question: Question
    sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        self.check_common()
        checks.non_negative(noise_multiplier=self.noise_multiplier)
        checks.probability(sampling_rate=self.sampling_rate)
        checks.positive(sampling_rate=self.sampling_rate)
        if isinstance(self.question, UnitCount) and self.adjacency != "add_or_remove":
            raise UsageError(
                f"adjacency = {self.adjacency} · the number of units is public there, and need not be asked",
                next="Take add_or_remove, or leave the question out.",
            )
        if self.sampling_rate < 1 and not isinstance(self.question, Quantile):
            raise UsageError(
                f"sampling_rate = {self.sampling_rate} · is for quantiles; other answers would have to be scaled up",
                next="Leave it out.",
            )

    @property
    def bound(self) -> float:
        """C of the event, of which the accountants make the sensitivity: C, or 2 C under replace_one.

        With all units an exchange moves a sum by the diameter at most, so C is half of it. A sampled unit also differs
        from not being there, so C is not below the radius then.
        """
        k = self.records_per_unit
        if self.adjacency == "replace_one" and self.sampling_rate == 1:
            return self.question.diameter(k) / 2
        return self.question.radius(k)

    @property
    def noise_std(self) -> float:
        """On every coordinate of each sum."""
        return self.noise_multiplier * math.sqrt(sums_of(self.question)) * self.bound

    def events(self) -> tuple[Event, ...]:
        return (
            Event(
                mechanism="gaussian" if self.sampling_rate == 1 else "poisson_gaussian",
                sampling_rate=self.sampling_rate,
                noise_multiplier=self.noise_multiplier,
            ),
        )

    def mechanism(self, spent: Sequence[Event]) -> dict[str, Any]:
        return {
            "name": "estimate",
            "of": self.name,
            "question": json.loads(json.dumps(asdict(self.question))),
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "noise_std": self.noise_std,
            **self.spending(spent),
        }
