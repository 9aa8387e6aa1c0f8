"""Every family x codec that is built, by name: a row here, and the contract (``test_contract.py``) holds it to its word.

A family adds its rows: the smallest settings of each codec and backbone that it works with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tests.models.conftest import SHAPE, TINY, TINY_UNET
from tests.models.token_models import SHORT, TINY_BYTES, TINY_SOUNDS, TINY_TOKENS

from sfumato.models.settings import ModelSettings, TermAxis, Terms
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Modality, Record

SAMPLES, SAMPLE_RATE = 400, 800
PICTURES = Shapes(picture=SHAPE)
EVERYTHING = Shapes(picture=SHAPE, samples=SAMPLES, sample_rate=SAMPLE_RATE)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Attributes:
    learning_rate: of Adam, for the test that training lowers the loss.
    largest: of the oracle's float64 and the engine's float32, how far apart, relative.
    """

    settings: ModelSettings
    shapes: Shapes = PICTURES
    learning_rate: float = 1e-2
    largest: float = 2e-5


_TERMS = Terms(axes=(TermAxis(name="side", more=("left",), less=("right",)),), width=8)

COMBINATIONS: dict[str, Combination] = {
    "diffusion-cosine-words-mlp": Combination(settings=TINY),
    "diffusion-pixels-words-unet": Combination(settings=TINY_UNET),
    "diffusion-cosine-terms-mlp": Combination(
        settings=ModelSettings(
            image=TINY.image, text=_TERMS, backbone=TINY.backbone, objective=TINY.objective, sampling=TINY.sampling
        )
    ),
    "autoregressive-words-patches": Combination(settings=TINY_TOKENS),
    "autoregressive-bytes": Combination(settings=TINY_BYTES, shapes=Shapes()),
    "autoregressive-bytes-patches-mu_law": Combination(settings=TINY_SOUNDS, shapes=SHORT),
}


def records(
    counts: Sequence[int], modalities: Sequence[Modality], *, seed: int = 0, shapes: Shapes = EVERYTHING
) -> list[Record]:
    """Unit number i has counts[i] records of these modalities, all different; another seed, entirely other records."""
    rng = np.random.default_rng(seed)
    made = []
    for unit, count in enumerate(counts):
        for number in range(count):
            words = f"patient {unit} visit {number} number {rng.integers(1000)} " + ("left" if unit % 2 else "right")
            picture = rng.integers(0, 256, shapes.picture or SHAPE, dtype=np.uint8)
            samples, rate = shapes.samples or SAMPLES, shapes.sample_rate or SAMPLE_RATE
            tone = np.sin(2 * np.pi * rng.uniform(20, rate / 2 - 20) * np.arange(samples) / rate + rng.uniform(0, 6))
            sound = (0.4 * tone + 0.05 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32)
            values = {"text": words, "image": picture, "audio": sound}
            made.append(
                Record(
                    id=f"{unit}-{number}",
                    unit=f"unit-{unit:03d}",
                    sample_rate=rate if "audio" in modalities else None,
                    **{name: values[name] for name in MODALITIES if name in modalities},
                )
            )
    return made
