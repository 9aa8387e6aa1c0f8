"""Real drawings with real captions, few of them: where privacy per record has to be told what it is worth."""

from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainingSettings


def emoji() -> Recipe:
    """Captions to emoji, not private: 5,674 pairs, split by concept. ``--set privacy.mechanism=dp_sgd`` adds privacy."""
    return Recipe(
        name="emoji",
        data=DataSettings(source="emoji", public_units=190, image_size=32, channels=3),
        model=ModelSettings(
            image=Cosine(kept=20),
            text=HashedWords(buckets=4096, width=256),
            backbone=Mlp(width=768, depth=3),
            objective=Diffusion(noise_multiplicity=2, log_sigma_mean=-0.3, log_sigma_std=1.4),
            sampling=Sampling(guidance=1.0),
        ),
        privacy=PrivacySettings(mechanism="none", unit="record", epsilon=8.0),
        training=TrainingSettings(steps=3_000, expected_batch_size=256, learning_rate=1.5e-3, ema_decay=0.995),
        evaluation=EvaluationSettings(samples=600),
    )
