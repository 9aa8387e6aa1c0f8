"""The case: four hospitals that train one model of case histories, chest films and auscultation, and show nobody a record."""

from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation.mechanism_settings import TrimmedMean
from sfumato.federation.settings import FederationSettings
from sfumato.models.settings import (
    Cosine,
    MeanGenerator,
    MelSpectrogram,
    Mlp,
    ModelSettings,
    RandomFeatures,
    Terms,
    Variational,
    WarmStart,
)
from sfumato.privacy.settings import PrivacySettings, WarmStartSettings
from sfumato.recipe import Recipe
from sfumato.recipes.clinic import FINDINGS, SOUND_TERMS, TERMS, sound_moments
from sfumato.training.settings import TrainingSettings

SEEN = ("encoders.text", "encoders.image", "decoders.text", "decoders.image", "released.mean")


def hospitals() -> Recipe:
    """Four hospitals of very different patients, (8, 1/(N ln N))-DP per patient at each of them, N the number of all.

    A text, an image and an audio encoder around one latent, and a generator of all three that they share. Before the first
    round each hospital releases noisy sums of its films and sounds, once, with most of its guarantee; the rounds begin at what
    they tell. The lung clinic records no sounds: it trains, sends and receives the parts of histories and films. The district
    hospital has few patients. The mean of every coordinate leaves out the largest and the smallest site, and no release may
    be longer than an honest one can be: one hospital may send anything.
    """
    return Recipe(
        name="hospitals",
        data=DataSettings(
            source="clinic",
            hospitals=4,
            units=30_000,
            public_units=6_000,
            image_size=32,
            modalities=("text", "image", "audio"),
            may_lack=True,
            audio_seconds=1.0,
            sample_rate=4_000,
        ),
        model=ModelSettings(
            image=Cosine(kept=12),
            audio=MelSpectrogram(bands=32, window=256, hop=64, kept=(12, 40), aligned_below=110.0),
            text=Terms(axes=(*TERMS, *FINDINGS, *SOUND_TERMS)),
            backbone=Mlp(width=96, depth=1),
            objective=Variational(experts="mixture_of_products", latent=24, text_weight=4.0, audio_weight=0.2),
            warm_start=WarmStart(
                release=MeanGenerator(
                    image=Cosine(kept=12, amplitude=1.2, decay=1.2),
                    text=Terms(axes=(*TERMS, *FINDINGS)),
                    random_features=RandomFeatures(pairs=True, longest=6.0),
                ),
                sounds=sound_moments(),
                sound_share=0.5,
                records=6_000,
                steps=600,
                learning_rate=5e-3,
            ),
        ),
        privacy=PrivacySettings(
            unit="person", records_per_unit=2, epsilon=8.0, max_grad_norm=1.0, warm_start=WarmStartSettings(share=0.7)
        ),
        training=TrainingSettings(steps=125, expected_batch_size=2_048, learning_rate=2e-3, warmup_steps=4),
        federation=FederationSettings(
            sites=4,
            rounds=5,
            local_steps=25,
            aggregation=TrimmedMean(trimmed=1),
            proximal=0.01,
            least_sites=3,
            holds={"lung": SEEN},
        ),
        evaluation=EvaluationSettings(samples=1_000, directions=("text→image+audio",), watch_seconds=10.0),
    )
