"""Real drawings with real captions, few of them: where privacy per record has to be told what it is worth."""

from dataclasses import replace

from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.public_start import PublicStart
from sfumato.training.settings import PerformanceSettings, TrainingSettings


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


def emoji_private() -> Recipe:
    """Icons of three other sets first, which are public, then the emoji, (8, 1/(N ln N))-DP per emoji, N = 5,111.

    Measured on concepts that neither training saw: Fréchet distance 4.5 (public start alone 6.0, without privacy 3.3), by our own small
    network; by EfficientNet it is no better than the public start. 854 s of public training, 119 s of private. Every parameter is
    trained privately: a layer, or the biases alone, gave less (docs/results.md).
    """
    recipe = emoji()
    return replace(
        recipe,
        name="emoji-private",
        model=replace(recipe.model, image=Cosine(kept=16), backbone=Mlp(width=512, depth=3)),
        public_start=PublicStart(
            data=replace(recipe.data, source="icons", public_units=0),
            steps=2_400,
            records_at_once=256,
            learning_rate=2e-3,
            ema_decay=0.995,
        ),
        privacy=replace(recipe.privacy, mechanism="dp_sgd", max_grad_norm=0.3),
        training=TrainingSettings(
            steps=240, expected_batch_size=1_024, learning_rate=3e-3, ema_decay=0.97, warmup_steps=3
        ),
        evaluation=replace(recipe.evaluation, twin=True),
        performance=PerformanceSettings(max_physical_batch_size=512),
    )
