"""Real handwritten digits, and real clothes, from captions."""

from dataclasses import replace

from sfumato.data.examples import CLOTHES, DIGITS
from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import (
    Changes,
    ClassMoments,
    Cosine,
    Diffusion,
    HashedWords,
    Mlp,
    ModelSettings,
    Sampling,
    TermAxis,
    Terms,
)
from sfumato.privacy.settings import MeanEmbeddingSettings, PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainingSettings


def mnist() -> Recipe:
    """Captions such as "a handwritten seven" to digits, (8, 1/(N ln N))-DP per picture, N = 60,000."""
    return Recipe(
        name="mnist",
        data=DataSettings(source="mnist", public_units=10_000, image_size=28),
        model=ModelSettings(
            image=Cosine(kept=16),
            text=HashedWords(buckets=512, width=128),
            backbone=Mlp(width=512, depth=2),
            objective=Diffusion(noise_multiplicity=1, log_sigma_mean=-0.3, log_sigma_std=1.4),
            sampling=Sampling(guidance=1.5),
        ),
        privacy=PrivacySettings(unit="record", epsilon=8.0, max_grad_norm=0.7),
        training=TrainingSettings(steps=1_500, expected_batch_size=4_096, learning_rate=4e-3, ema_decay=0.995),
        evaluation=EvaluationSettings(samples=2_000),
    )


def fashion_mnist() -> Recipe:
    """Captions such as "a photo of a sandal" to pictures of clothes; the mnist recipe on other data."""
    recipe = mnist()
    return replace(recipe, name="fashion-mnist", data=replace(recipe.data, source="fashion-mnist"))


def mnist_labels() -> Recipe:
    """The ten digits by their labels alone, (10, 1/(N ln N))-DP per picture: the protocol of benchmarks/quality.py.

    Not trained in steps: noisy sums over labels and their cells, and Gaussians fitted to them through what everybody knows of
    handwriting (slants, sizes) and through the range of grey levels.
    """
    recipe = mnist()
    moments = ClassMoments(
        classes=_labels(DIGITS["en"]),
        image=Cosine(kept=16),
        level=-0.75,  # most of a digit is dark
        longest=0.6,
        directions=2,
        changes=Changes(turn=8.0, shear=0.15, scale=0.08, shift=0.025),
        passes=20,
    )
    return replace(
        recipe,
        name="mnist-labels",
        data=replace(recipe.data, limit_units=55_000),
        model=ModelSettings(image=Cosine(kept=16), text=Terms(axes=moments.classes), class_moments=moments),
        privacy=PrivacySettings(
            mechanism="mean_embedding",
            unit="record",
            epsilon=10.0,
            mean_embedding=MeanEmbeddingSettings(first=0.15),
        ),
    )


def fashion_labels() -> Recipe:
    """The ten articles of clothing by their labels alone; mnist-labels on other data."""
    recipe = mnist_labels()
    moments = recipe.model.class_moments
    assert moments is not None
    clothes = replace(
        moments,
        classes=_labels(CLOTHES["en"]),
        level=-0.4,
        longest=0.9,
        changes=Changes(scale=0.05, shift=0.018, brightness=0.1),
    )
    return replace(
        recipe,
        name="fashion-labels",
        data=replace(recipe.data, source="fashion-mnist"),
        model=replace(recipe.model, text=Terms(axes=clothes.classes), class_moments=clothes),
    )


def _labels(names: tuple[str, ...]) -> tuple[TermAxis, ...]:
    """One axis a label, 1 for it; a label within another's name ("shirt" in "t-shirt") is not meant by it."""
    return tuple(
        TermAxis(name=name, more=(name,), less=tuple(other for other in names if other != name and name in other))
        for name in names
    )
