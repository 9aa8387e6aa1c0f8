"""Two small heads that bring a picture and its text together: what retrieval is measured with where no facts are known.

Contrastive training couples the examples of a batch and could not be done in private; here all pairs are public.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.evaluation import features as extractors
from sfumato.evaluation import judge

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WIDTH = 128  # of the shared space
BUCKETS = 2048  # of hashed words and letter triples
BATCH = 256  # pairs


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Attributes:
    name: the extractors under the two heads, and the sha256 of the trained weights.
    picture_features: what a Fréchet distance is measured on, with its own name.
    """

    network: "nn.Module"
    image_inputs: Callable[[np.ndarray], np.ndarray]
    text_inputs: Callable[[Sequence[str]], np.ndarray]
    picture_features: Callable[[np.ndarray], np.ndarray]
    name: str
    picture_extractor: str
    pairs: int
    stopped_early: bool

    def images(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8 -> (N, WIDTH) in the shared space."""
        return _run(self.network.image, self.image_inputs(images))  # type: ignore[arg-type]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> (N, WIDTH) in the shared space."""
        return _run(self.network.text, self.text_inputs(texts))  # type: ignore[arg-type]


def train(
    images: np.ndarray,
    texts: Sequence[str],
    groups: Sequence[str],
    *,
    seconds: float,
    seed: int,
    pretrained: bool = True,
) -> Pairing:
    """Learns from public pairs; pairs of one group (one concept in several styles) are not each other's negatives.

    Uses EfficientNet-Lite0 and MiniLM where installed (and ``pretrained``), else a small network of our own and hashed words.
    """
    import torch
    from torch import nn

    checks.positive(seconds=seconds)
    if not len(images) == len(texts) == len(groups) or len(images) < 2:
        raise UsageError(
            f"{len(images)} images, {len(texts)} texts, {len(groups)} groups · must be equally many, two or more",
            next="Give public pairs.",
        )
    picture = extractors.image_extractor() if pretrained else None
    sentence = extractors.text_extractor() if pretrained else None
    image_inputs = picture or _pixels
    text_inputs = sentence or hashed_words

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image: nn.Module
            if picture is None:
                body: nn.Module = judge.make_network(images.shape[3], {}).body  # type: ignore[assignment]
                self.image = nn.Sequential(body, nn.Linear(judge.FEATURES, WIDTH))
            else:
                self.image = nn.Sequential(nn.LayerNorm(1280), nn.Dropout(0.3), nn.Linear(1280, WIDTH))
            width = BUCKETS if sentence is None else 384
            self.text = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, WIDTH))
            self.log_scale = nn.Parameter(torch.tensor(2.0))

    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.from_numpy(a).float() for a in (image_inputs(images), text_inputs(texts)))
    group = torch.from_numpy(np.unique(np.asarray(groups, str), return_inverse=True)[1].astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()

        def loss_of(index: "Tensor") -> "Tensor":
            pictures = x[index] if picture is not None else judge.augment(x[index], generator)
            a = nn.functional.normalize(network.image(pictures), dim=1)
            b = nn.functional.normalize(network.text(y[index]), dim=1)
            logits = a @ b.T * network.log_scale.exp().clamp(max=100)
            same = group[index][:, None] == group[index]
            logits = logits.masked_fill(same & ~torch.eye(len(index), dtype=torch.bool), -1e9)
            own = torch.arange(len(index))
            return nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)

        # Half of the pairs at most, so that an epoch has two steps even where they are few.
        batch = max(2, min(BATCH, len(images) // 2))
        steps, wanted = judge.fit(network, loss_of, len(images), seconds=seconds, generator=generator, batch=batch)

    weights = judge.sha256_of(network)

    def own_features(pictures: np.ndarray) -> np.ndarray:
        return _run(network.image[0], _pixels(pictures))  # type: ignore[index]

    under = f"{picture.name if picture else 'own small convolutions'} + {sentence.name if sentence else 'hashed words'}"
    return Pairing(
        network=network,
        image_inputs=image_inputs,
        text_inputs=text_inputs,
        picture_features=picture or own_features,
        name=f"contrastive heads on {under}, sha256 {weights}",
        picture_extractor=picture.name if picture else f"own small convolutions, sha256 {weights}",
        pairs=len(images),
        stopped_early=steps < wanted,
    )


def hashed_words(texts: Sequence[str]) -> np.ndarray:
    """Words and letter triples by CRC-32 into buckets, of unit length. Returns: (N, BUCKETS)."""
    counts = np.zeros((len(texts), BUCKETS))
    for row, text in enumerate(texts):
        for word in text.lower().split():
            marked = f"<{word.strip('.,;:!?()')}>"
            for piece in {marked, *(marked[i : i + 3] for i in range(len(marked) - 2))}:
                counts[row, zlib.crc32(piece.encode()) % BUCKETS] += 1
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)


def _pixels(images: np.ndarray) -> np.ndarray:
    return judge.to_tensor(images).numpy()


def _run(network: "torch.nn.Module", inputs: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        parts = [network(part.float()) for part in torch.from_numpy(inputs).split(256)]
    return torch.cat(parts).numpy().astype(np.float64)
