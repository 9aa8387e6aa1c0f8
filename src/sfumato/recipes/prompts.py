"""Prompt learning: hospitals that each read something else off their films, with one pair of encoders and a prompt that they share."""

from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation.settings import FederationSettings
from sfumato.models.prompt_settings import Classes, DpFpl, Prompts, SmallPair
from sfumato.models.settings import ModelSettings
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainingSettings

KINDS = Classes(columns=("kind",), names={"nodule": "nodule", "consolidation": "consolidation", "cavity": "cavity"})
ZONES = Classes(columns=("zone",), names={"upper": "upper zone", "middle": "middle zone", "lower": "lower zone"})
HEARTS = Classes(
    columns=("heart", "effusion"),
    names={
        "normal+none": "normal heart and no effusion",
        "normal+present": "normal heart and pleural effusion",
        "enlarged+none": "enlarged heart and no effusion",
        "enlarged+present": "enlarged heart and pleural effusion",
    },
)


def prompts() -> Recipe:
    """Three hospitals learn a prompt by DP-FPL, (2, 1/(N ln N))-DP per patient at each of them, N of all; a minute or two on one core.

    The district hospital tells kinds of findings apart, the lung clinic zones, the heart centre hearts and effusions. The
    encoders are small, trained on public films and histories, and frozen; give a CLIP checkpoint instead by
    model.objective.encoders: {kind: clip, path: ...}. What comes out tells pictures apart, and generates nothing.
    """
    return Recipe(
        name="prompts",
        data=DataSettings(source="clinic", units=12_000, public_units=3_000, image_size=32),
        model=ModelSettings(
            image=None,
            text=None,
            objective=Prompts(
                classes={"A": KINDS, "B": ZONES, "C": HEARTS},
                method=DpFpl(rank=4),
                encoders=SmallPair(steps=300),
                tokens=8,
            ),
        ),
        privacy=PrivacySettings(unit="person", records_per_unit=2, epsilon=2.0, max_grad_norm=0.2),
        training=TrainingSettings(
            steps=60,
            expected_batch_size=900,
            optimizer="sgd",
            learning_rate=1.0,
            schedule="constant",
            warmup_steps=0,
            ema_decay=0.0,
        ),
        federation=FederationSettings(sites=3, rounds=12, local_steps=5),
        evaluation=EvaluationSettings(samples=1_500, usefulness=()),
    )
