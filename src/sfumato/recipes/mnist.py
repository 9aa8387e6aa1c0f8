"""Real handwritten digits, and real clothes, from captions."""

from dataclasses import replace

from sfumato.data.examples import CLOTHES, DIGITS
from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling, TermAxis, Terms
from sfumato.privacy.settings import PrivacySettings
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
    """The ten digits by their labels alone, (10, 1/(N ln N))-DP per picture: the protocol of benchmarks/quality.py."""
    recipe = mnist()
    return replace(
        recipe,
        name="mnist-labels",
        data=replace(recipe.data, limit_units=55_000),
        model=replace(recipe.model, text=Terms(axes=_labels(DIGITS["en"]), width=128)),
        privacy=replace(recipe.privacy, epsilon=10.0),
    )


def fashion_labels() -> Recipe:
    """The ten articles of clothing by their labels alone; mnist-labels on other data."""
    recipe = mnist_labels()
    return replace(
        recipe,
        name="fashion-labels",
        data=replace(recipe.data, source="fashion-mnist"),
        model=replace(recipe.model, text=Terms(axes=_labels(CLOTHES["en"]), width=128)),
    )


def _labels(names: tuple[str, ...]) -> tuple[TermAxis, ...]:
    """One axis a label, 1 for it; a label within another's name ("shirt" in "t-shirt") is not meant by it."""
    return tuple(
        TermAxis(name=name, more=(name,), less=tuple(other for other in names if other != name and name in other))
        for name in names
    )
