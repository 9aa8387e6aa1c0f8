"""A small convolutional network that reads the facts off a picture: the judge of "does the image match its text".

It is trained on public pictures only, so what it says of generated pictures is post-processing. It is not perfect: every
figure made with it stands beside the same figure on real held-out pictures.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FEATURES = 128  # width of the penultimate layer
BATCH = 64  # pictures
MAX_EPOCHS = 30
MAX_PICTURES_SEEN = 90_000  # over all epochs: about 50 s on one core at 32x32
GRACE = 0.25  # share of the time box before the clock may hasten the schedule: a slow start alone changes nothing
SHIFT = 2  # pixels, the largest random translation


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A trained reader.

    Attributes:
      facts: the values of each fact, in the order of the head's outputs.
      sha256: of its weights, names and shapes included.
      pictures: how many it learnt from.
      epochs: how often it saw each.
      stopped_early: True when the time box, not the epoch cap, ended the training (then another machine gets another judge).
    """

    network: "nn.Module"
    facts: dict[str, tuple[str, ...]]
    image_shape: tuple[int, int, int]  # (H, W, C)
    sha256: str
    pictures: int
    epochs: float
    stopped_early: bool

    @property
    def name(self) -> str:
        return f"judge-cnn, sha256 {self.sha256}"

    def read(self, images: np.ndarray) -> dict[str, list[str]]:
        """The most probable value of each fact. Args: images (N, H, W, C) uint8."""
        _, logits = self._forward(images)
        return {
            fact: [values[index] for index in logits[fact].argmax(1)] if len(images) else []
            for fact, values in self.facts.items()
        }

    def features(self, images: np.ndarray) -> np.ndarray:
        """The penultimate layer. Args: images (N, H, W, C) uint8. Returns: (N, FEATURES) float64."""
        return self._forward(images)[0].astype(np.float64)

    def _forward(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        import torch

        if images.shape[1:] != self.image_shape:
            raise UsageError(
                f"images.shape[1:] = {images.shape[1:]} · the judge learnt from {self.image_shape}",
                next="Resize the pictures to the judge's size and channels.",
            )
        features, logits = (
            [np.zeros((0, FEATURES), np.float32)],
            {f: [np.zeros((0, len(v)))] for f, v in self.facts.items()},
        )
        with torch.inference_mode():
            for part in to_tensor(images).split(256):
                hidden = self.network.features(part)  # type: ignore[operator]
                features.append(hidden.numpy())
                for fact, values in self.network.heads_of(hidden).items():  # type: ignore[operator]
                    logits[fact].append(values.numpy())
        return np.concatenate(features), {fact: np.concatenate(parts) for fact, parts in logits.items()}


def train(images: np.ndarray, facts: Mapping[str, Sequence[str | None]], *, seconds: float, seed: int) -> Judge:
    """Learns to read ``facts`` off public ``images``.

    Args:
      images: (N, H, W, C) uint8, C = 1 or 3.
      facts: by name, one value per picture; None where it is not known.
      seconds: an upper limit; the epoch cap usually ends the training earlier, and then the result is the seed's alone.
    """
    import torch

    checks.positive(seconds=seconds)
    if images.ndim != 4 or images.dtype != np.uint8 or len(images) < 2:
        raise UsageError(
            f"images = {images.dtype} {images.shape} · must be uint8 (N, H, W, C) with N >= 2",
            next="Give public pictures.",
        )
    vocabulary: dict[str, tuple[str, ...]] = {}
    targets: dict[str, Tensor] = {}
    for fact, values in facts.items():
        if len(values) != len(images):
            raise UsageError(
                f"facts[{fact!r}] = {len(values)} values · must be one per picture, {len(images)}", next=""
            )
        vocabulary[fact] = tuple(sorted({value for value in values if value is not None}))
        if not vocabulary[fact]:
            raise UsageError(f"facts[{fact!r}] · no picture has a value", next="Leave this fact out.")
        code = {value: index for index, value in enumerate(vocabulary[fact])}
        targets[fact] = torch.tensor([-1 if value is None else code[value] for value in values])
    if not targets:
        raise UsageError("facts = {} · a judge needs at least one fact to read", next="Use retrieval instead.")

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(images.shape[3], {fact: len(values) for fact, values in vocabulary.items()})
    pixels = to_tensor(images)

    def loss_of(index: "Tensor") -> "Tensor":
        logits = network.heads_of(network.features(augment(pixels[index], generator)))  # type: ignore[operator]
        loss = torch.zeros(())
        for fact, target in targets.items():
            if (target[index] >= 0).any():
                loss = loss + torch.nn.functional.cross_entropy(
                    logits[fact], target[index], ignore_index=-1, label_smoothing=0.05
                )
        return loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        steps, wanted = fit(network, loss_of, len(images), seconds=seconds, generator=generator)
    return Judge(
        network=network,
        facts=vocabulary,
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        sha256=sha256_of(network),
        pictures=len(images),
        epochs=steps * min(BATCH, len(images)) / len(images),
        stopped_early=steps < wanted,
    )


def fit(
    network: "nn.Module",
    loss_of: Callable[["Tensor"], "Tensor"],
    count: int,
    *,
    seconds: float,
    generator: "torch.Generator",
    batch: int = BATCH,
) -> tuple[int, int]:
    """AdamW with a warm-up and a cosine, on at most ``MAX_EPOCHS`` passes, within ``seconds``; ends in evaluation mode.

    The schedule follows the steps; only where the time box would end it early does it follow the clock.

    Args: loss_of: from an index tensor of examples to a scalar loss. Returns: steps taken, steps wanted.
    """
    import torch

    batch = min(batch, count)
    wanted = max(10, min(MAX_EPOCHS * count, MAX_PICTURES_SEEN) // batch)
    step, progress, order = 0, 0.0, torch.zeros(0, dtype=torch.long)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    network.train()
    start = time.monotonic()
    while progress < 1:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        index, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 30, 1.0) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-5
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        clock = ((time.monotonic() - start) / seconds - GRACE) / (1 - GRACE)
        progress = max(step / wanted, clock)
    network.eval()
    return step, wanted


def make_network(channels: int, heads: Mapping[str, int]) -> "nn.Module":
    """Four convolutions, a 4 x 4 grid that keeps *where* (left or right is a fact), a linear layer, one head per fact."""
    from torch import nn

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *block(channels, 16, 1),
                *block(16, 32, 2),
                *block(32, 64, 2),
                *block(64, 64, 1),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(1024, FEATURES),
                nn.ReLU(),
            )
            self.dropout = nn.Dropout(0.2)
            self.heads = nn.ModuleList(nn.Linear(FEATURES, width) for width in heads.values())

        def features(self, images: "Tensor") -> "Tensor":
            return self.body(images)

        def heads_of(self, features: "Tensor") -> dict[str, "Tensor"]:
            features = self.dropout(features)
            return {fact: head(features) for fact, head in zip(heads, self.heads, strict=True)}

    return Network()


def to_tensor(images: np.ndarray) -> "Tensor":
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def augment(images: "Tensor", generator: "torch.Generator") -> "Tensor":
    """Light: a shift of a few pixels, contrast, brightness, a little noise. No flips: left and right are facts."""
    import torch

    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    which = torch.arange(count)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    shifted = padded[which, channel, rows, columns]
    contrast = 0.9 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
    strength = 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = strength * torch.randn(shifted.shape, generator=generator)
    return shifted * contrast + brightness + noise


def sha256_of(network: "nn.Module") -> str:
    """Of every tensor of the state, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
