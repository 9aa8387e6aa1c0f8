"""One transformer over tokens: pictures and histories of the phantom clinic in both directions, and language models of texts."""

from sfumato.data import histories
from sfumato.data.settings import DataSettings
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.settings import Autoregressive, Bytes, ModelSettings, PatchTokens, Sampling, Transformer, Words
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.training.settings import PerformanceSettings, TrainingSettings


def clinic_tokens() -> Recipe:
    """Case history to chest film, film to history, and both of nobody, by one transformer, (8, 1/(N ln N))-DP per patient.

    The list of words is the phantom's phrase book, written before there was a record. A history is 45 tokens on average, a
    film 64 of 200. About 4.2 ms of processor time a record, so about 36 minutes of one core. After 57,600 records (229 s) films have
    the rough outline of films and histories are fragments of phrases, and neither follows the other; this length is not measured.
    """
    return Recipe(
        name="clinic-tokens",
        data=DataSettings(source="clinic", units=30_000, public_units=6_000, image_size=32),
        model=ModelSettings(
            image=PatchTokens(patch=4, levels=(8, 5, 5)),
            text=Words(words=histories.pieces("en"), longest=60),
            backbone=Transformer(width=96, depth=2, heads=3, inner=192),
            objective=Autoregressive(),
            sampling=Sampling(guidance=1.5),
        ),
        privacy=PrivacySettings(unit="person", records_per_unit=1, epsilon=8.0, max_grad_norm=1.0),
        training=TrainingSettings(steps=1_000, expected_batch_size=512, learning_rate=3e-3),
        evaluation=EvaluationSettings(samples=1_000),
        performance=PerformanceSettings(max_physical_batch_size=48),
    )


def wordnet() -> Recipe:
    """What a dictionary says of its words, byte by byte, (8, 1/(N ln N))-DP per record."""
    return Recipe(
        name="wordnet",
        data=DataSettings(source="wordnet", public_units=4_000),
        model=_language_model(longest=128),
        privacy=PrivacySettings(unit="record", epsilon=8.0, max_grad_norm=1.0),
        training=TrainingSettings(steps=1_000, expected_batch_size=512, learning_rate=3e-3),
        performance=PerformanceSettings(max_physical_batch_size=48),
    )


def emails() -> Recipe:
    """E-mails, byte by byte, the first 384 of each, (8, 1/(N ln N))-DP per record."""
    recipe = wordnet()
    return Recipe(
        name="emails",
        data=DataSettings(source="emails", public_units=500),
        model=_language_model(longest=384),
        privacy=recipe.privacy,
        training=TrainingSettings(steps=500, expected_batch_size=256, learning_rate=3e-3),
        performance=PerformanceSettings(max_physical_batch_size=16),
    )


def _language_model(longest: int) -> ModelSettings:
    return ModelSettings(
        image=None,
        text=Bytes(longest=longest),
        backbone=Transformer(width=128, depth=3, heads=4, inner=256),
        objective=Autoregressive(),
        sampling=Sampling(guidance=0.0, temperature=0.8),
    )
