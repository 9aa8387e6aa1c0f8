"""The demo: a phantom clinic, case histories to chest films."""

from sfumato.auditing.settings import AuditSettings
from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation.settings import FederationSettings
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainingSettings


def clinic() -> Recipe:
    """Case history to chest film, (8, 1/(N ln N))-DP per patient, on 30,000 generated patients."""
    return Recipe(
        name="clinic",
        data=DataSettings(source="clinic", units=30_000, public_units=6_000, image_size=32),
        model=ModelSettings(
            image=Cosine(kept=16),
            text=HashedWords(buckets=1024, width=128),
            backbone=Mlp(width=384, depth=2),
            objective=Diffusion(noise_multiplicity=1, log_sigma_mean=-0.3, log_sigma_std=1.4),
            sampling=Sampling(guidance=1.0),
        ),
        privacy=PrivacySettings(unit="person", records_per_unit=2, epsilon=8.0, max_grad_norm=0.5),
        training=TrainingSettings(steps=800, expected_batch_size=2_048, learning_rate=1e-2),
        federation=FederationSettings(sites=3, rounds=3, local_steps=40),
        evaluation=EvaluationSettings(samples=2_000, twin=True),
        audit=AuditSettings(members=1_500),
    )
