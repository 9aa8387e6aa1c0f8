"""Small synthetic pictures whose facts are visible: a disc on the left or right, upper or lower, small or large."""

from collections.abc import Callable

import numpy as np
import pytest

from sfumato.models.text_to_image import TextToImage
from sfumato.records import Record

FACTS = {"side": ("left", "right"), "zone": ("lower", "upper"), "size": ("large", "small")}


class Drawer(TextToImage):
    """A model that draws by a function of captions."""

    def __init__(self, draw):
        self.draw = draw

    def generate(self, texts, *, seed, sampling=None):
        return self.draw(list(texts))


def _draw(facts: dict[str, str], rng: np.random.Generator, pixels: int, channels: int) -> np.ndarray:
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    cx = (0.28 if facts["side"] == "left" else 0.72) + rng.normal(0, 0.04)
    cy = (0.28 if facts["zone"] == "upper" else 0.72) + rng.normal(0, 0.04)
    radius = 0.09 if facts["size"] == "small" else 0.18
    disc = 150.0 * (np.hypot(x - cx, y - cy) < radius)
    grey = np.clip(60 + disc + rng.normal(0, 12, (pixels, pixels)), 0, 255)
    return np.repeat(grey[:, :, None], channels, axis=2).astype(np.uint8)


@pytest.fixture
def make_records() -> Callable[..., list[Record]]:
    """make_records(count, seed, pixels=32, channels=1): two records a person, facts in the metadata, a caption saying them."""

    def make(count: int, seed: int, pixels: int = 32, channels: int = 1) -> list[Record]:
        rng = np.random.default_rng(seed)
        records = []
        for index in range(count):
            facts = {name: str(rng.choice(values)) for name, values in FACTS.items()}
            records.append(
                Record(
                    id=f"r{index}",
                    unit=f"person-{index // 2}",
                    text=f"a {facts['size']} disc, {facts['zone']} {facts['side']}",
                    image=_draw(facts, rng, pixels, channels),
                    metadata={"facts": facts},
                )
            )
        return records

    return make


@pytest.fixture
def draw_captions() -> Callable[..., np.ndarray]:
    """draw_captions(captions, seed): a perfect generator for those captions, grey 32 x 32."""

    def draw(captions: list[str], seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        pictures = []
        for caption in captions:
            _, size, _, zone, side = caption.split()
            pictures.append(_draw({"size": size, "zone": zone, "side": side}, rng, 32, 1))
        return np.stack(pictures)

    return draw


@pytest.fixture
def drawer() -> Callable[..., TextToImage]:
    """drawer(function of captions): the model that draws with it."""
    return Drawer
