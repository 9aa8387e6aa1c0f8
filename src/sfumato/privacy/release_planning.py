"""From what was asked of a release to its plan: how one epsilon is divided among a centre, modalities and rows."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.plan import Codebook, Composition, LatentModality, LatentRelease, MeanEmbedding
from sfumato.privacy.releases import noise_multiplier_of
from sfumato.privacy.settings import CodebookSettings, LatentSettings, PrivacySettings

SHARED = "shared"  # the one modality of the shared form


def release_plan(
    settings: PrivacySettings, whom: Mapping[str, Any], dimensions: Mapping[str, int] | None
) -> LatentRelease | MeanEmbedding | Composition:
    """The plan of ``mechanism: latents``, ``mean_embedding`` or ``codebook``.

    Args:
      whom: population, delta, unit, records_per_unit, adjacency, population_from_data.
      dimensions: of the model's latents by modality, or of its ``mean``; of a codebook, its ``categories`` and ``image``.

    Raises: PrivacyRefused where no noise answers.
    """
    if dimensions is None:
        raise UsageError(
            f"mechanism = {settings.mechanism} · needs a model, whose latents are released", next="Plan with a recipe."
        )
    if settings.mean_embedding is not None:
        values = {**whom, "dimension": dimensions["mean"], "max_norm": settings.mean_embedding.max_norm}
        if settings.mean_embedding.first:
            return _two_sums(settings, settings.mean_embedding.first, values, dimensions)
        if settings.noise_multiplier is not None:
            return MeanEmbedding(**values, noise_multiplier=settings.noise_multiplier)
        assert settings.epsilon is not None  # the settings hold exactly one
        return MeanEmbedding.calibrated(epsilon=settings.epsilon, **values)
    if settings.codebook is not None:
        return _codebook(settings, settings.codebook, whom, dimensions)
    assert settings.latents is not None
    return _latents(settings, settings.latents, whom, dimensions)


def _two_sums(
    settings: PrivacySettings, share: float, values: Mapping[str, Any], dimensions: Mapping[str, int]
) -> Composition:
    """Gaussians compose by 1 / sigma^2: the first sum has its share of it, the second one the rest."""
    assert settings.epsilon is not None  # the settings demand it
    if "first" not in dimensions:
        raise UsageError(
            f"privacy.mean_embedding.first = {share} · is for cells of classes, and the model has none",
            next="Set it to 0, or model.class_moments.directions: 2.",
        )
    joint = accounting.calibrate_event(
        Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1.0),
        epsilon=settings.epsilon, delta=values["delta"], adjacency=values["adjacency"],
    )  # fmt: skip
    before = {**values, "dimension": dimensions["first"]}
    return Composition.of(
        MeanEmbedding(**before, noise_multiplier=joint / math.sqrt(share)),
        MeanEmbedding(**values, noise_multiplier=joint / math.sqrt(1 - share)),
        target_epsilon=settings.epsilon,
    )


def _latents(
    settings: PrivacySettings, asked: LatentSettings, whom: Mapping[str, Any], dimensions: Mapping[str, int]
) -> LatentRelease | Composition:
    modalities = released_modalities(asked, dimensions)
    values: dict[str, Any] = {**whom, "modalities": modalities, "form": asked.form}
    if asked.own_noise:
        return LatentRelease(**values, noise_multiplier=noise_multiplier_of(modalities))
    if settings.noise_multiplier is not None:
        return LatentRelease(**values, noise_multiplier=settings.noise_multiplier)
    assert settings.epsilon is not None
    if not asked.centre:
        return LatentRelease.calibrated(epsilon=settings.epsilon, **values)
    # Gaussians compose by 1 / sigma^2: the centre takes its share of it, the k rows of a unit the rest.
    joint = accounting.calibrate_event(
        Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1.0),
        epsilon=settings.epsilon, delta=whom["delta"], adjacency=whom["adjacency"],
    )  # fmt: skip
    rows = whom["records_per_unit"]
    centre = MeanEmbedding(
        **whom, dimension=sum(m.dimension for m in modalities), max_norm=joint_norm(modalities),
        noise_multiplier=joint / math.sqrt(asked.centre),
    )  # fmt: skip
    latents = LatentRelease(**values, noise_multiplier=joint * math.sqrt(rows / (1 - asked.centre)))
    return Composition.of(centre, latents, target_epsilon=settings.epsilon)


def _codebook(
    settings: PrivacySettings, asked: CodebookSettings, whom: Mapping[str, Any], dimensions: Mapping[str, int]
) -> Composition:
    """The centre has its share of epsilon by itself; the response is the strongest that all together still allow."""
    assert settings.epsilon is not None  # the settings demand it
    values = {**whom, "dimension": dimensions["image"], "max_norm": asked.max_norm}
    centre = replace(MeanEmbedding.calibrated(epsilon=settings.epsilon * asked.centre, **values), target_epsilon=None)
    categories = dimensions["categories"]

    def codes(epsilon: float) -> Codebook:
        return replace(Codebook.calibrated(epsilon=epsilon, categories=categories, **whom), target_epsilon=None)

    low, high = (
        0.0,
        settings.epsilon + math.log(categories) + 1.0,
    )  # zero_out compares with chance alone, and is cheaper
    while high - low > 1e-4 * settings.epsilon:
        middle = (low + high) / 2
        fits = Composition.of(centre, codes(middle)).epsilon() <= settings.epsilon
        low, high = (middle, high) if fits else (low, middle)
    return Composition.of(centre, codes(low), target_epsilon=settings.epsilon)


def released_modalities(asked: LatentSettings, dimensions: Mapping[str, int]) -> tuple[LatentModality, ...]:
    """The modalities of the plan: those asked for, or the one that they make together."""
    each = tuple(
        LatentModality(
            name=m.name, dimension=dimensions[m.name], max_norm=m.max_norm, weight=m.weight, noise_std=m.noise_std
        )
        for m in asked.modalities
    )
    if asked.form == "independent":
        return each
    norm = math.sqrt(sum((m.weight * m.max_norm) ** 2 for m in each))
    return (LatentModality(name=SHARED, dimension=sum(m.dimension for m in each), max_norm=norm),)


def joint_norm(modalities: tuple[LatentModality, ...]) -> float:
    """Of all modalities' clipped latents side by side, at most."""
    return math.sqrt(sum(m.max_norm**2 for m in modalities))


def worth(plan: LatentRelease) -> dict[str, float]:
    """By modality: the amplitude of one coordinate of a latent as long as its bound, over its noise: C / (sqrt(d) sigma)."""
    return {m.name: m.max_norm / (math.sqrt(m.dimension) * (m.noise_std or math.inf)) for m in plan.modalities}
