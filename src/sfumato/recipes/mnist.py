"""Real handwritten digits, and real clothes, from captions."""

from dataclasses import replace

from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling
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
