"""Small records and small models."""

import numpy as np
import pytest
import torch

from sfumato.models import model as models
from sfumato.models.generative import Generative
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Pixels, Sampling, UNet
from sfumato.records import Record

SHAPE = (8, 8, 1)
TINY = ModelSettings(
    image=Cosine(kept=4),
    text=HashedWords(buckets=32, width=8),
    backbone=Mlp(width=16, depth=2),
    objective=Diffusion(noise_multiplicity=3),
    sampling=Sampling(steps=4),
)
TINY_UNET = ModelSettings(
    image=Pixels(),
    text=HashedWords(buckets=16, width=8),
    backbone=UNet(channels=(8, 16), layers_per_block=1),
    sampling=Sampling(steps=2),
)


def records(counts: list[int], seed: int = 0) -> list[Record]:
    """Unit number i has counts[i] records: noise with a caption of its own."""
    rng = np.random.default_rng(seed)
    return [
        Record(
            id=f"{unit}-{number}",
            unit=f"unit-{unit:03d}",
            text=f"patient {unit} film {number} " + ("left" if unit % 2 else "right"),
            image=rng.integers(0, 256, SHAPE, dtype=np.uint8),
        )
        for unit, count in enumerate(counts)
        for number in range(count)
    ]


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """No weight is zero any more, so that every part of the model takes part."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def tiny() -> Generative:
    model = models.build(TINY, picture_shape=SHAPE)
    disturbed(model)
    return model
