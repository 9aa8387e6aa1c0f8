"""Is it useful? A network that learnt from generated pictures only, tested on real ones.

What is chosen is chosen without the real test pictures: the number of passes is fixed, or the pass is taken that reads a
held-out part of the *generated* pictures best. (Protocols that take the pass that reads the test set best report more.)
Sounds go in as spectrograms (``audio.spectrograms``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.evaluation import judge

if TYPE_CHECKING:
    from torch import nn

Network = Literal["cnn", "mlp", "logistic_regression"]
NETWORKS: tuple[Network, ...] = ("cnn", "mlp", "logistic_regression")
EPOCHS: dict[Network, int] = {"cnn": 10, "mlp": 20, "logistic_regression": 20}
WORDS: dict[Network, str] = {  # what a figure says was trained
    "cnn": "CNN of two 3x3 convolutions (32, 64), each pooled by 2, and a hidden layer of 128",
    "mlp": "MLP with one hidden layer of 256",
    "logistic_regression": "logistic regression on pixels",
}
RATES: dict[Network, float] = {"cnn": 1e-3, "mlp": 1e-3, "logistic_regression": 5e-3}
BATCH = 128
LEAST_STEPS = 300  # where the pictures are few, they are passed more often
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Attributes:
    value: share of the test pictures whose label is read right.
    low, high: Wilson's 95 % interval over the test pictures (Wilson 1927). The spread over training seeds is not in it.
    majority: the share of the most frequent test label: what needs no picture.
    network: what was trained, in words, with the sha256 of its weights.
    by_label: for each label of the test pictures, the share read right.
    """

    value: float
    low: float
    high: float
    majority: float
    network: str
    trained_on: int
    tested_on: int
    epochs: int
    chosen_by: str
    by_label: dict[str, float]


def train_on_synthetic(
    pictures: np.ndarray,
    labels: Sequence[str | int] | np.ndarray,
    test_pictures: np.ndarray,
    test_labels: Sequence[str | int] | np.ndarray,
    *,
    network: Network = "cnn",
    seed: int = 0,
    epochs: int | None = None,
    held_out: float = 0.0,
    device: str = "cpu",
) -> Accuracy:
    """Trains ``network`` on ``pictures`` and says how well it reads ``test_pictures``.

    AdamW, cosine schedule, no augmentation, no dropout. The same seed gives the same network on the same machine. A test
    label that no training picture has is never read right.

    Args:
      pictures: (N, H, W, C) uint8, generated (or real: the baseline).
      labels: N of them, strings or whole numbers.
      test_pictures: (M, H, W, C) uint8, real; looked at once, after training.
      epochs: passes; None takes ``EPOCHS`` (more where the pictures are so few that it makes less than ``LEAST_STEPS`` steps).
      held_out: a share of the training pictures to choose the pass by; 0 takes the last pass.

    Raises: UsageError where shapes or numbers do not fit.
    """
    import torch

    if network not in NETWORKS:
        raise UsageError(f"network = {network!r} · must be one of {', '.join(NETWORKS)}", next="Choose one of these.")
    if not 0 <= held_out <= 0.5:
        raise UsageError(f"held_out = {held_out} · must be between 0 and 0.5", next="0.1 is usual.")
    if epochs is not None:
        checks.positive(epochs=epochs)
    names = _checked(pictures, labels, "pictures"), _checked(test_pictures, test_labels, "test_pictures")
    if pictures.shape[1:] != test_pictures.shape[1:]:
        raise UsageError(
            f"test_pictures.shape[1:] = {test_pictures.shape[1:]} · must be that of pictures, {pictures.shape[1:]}",
            next="Resize them.",
        )
    code = {value: index for index, value in enumerate(sorted(set(names[0])))}  # classes are what was learnt from
    targets, test_targets = (np.array([code.get(name, -1) for name in part], np.int64) for part in names)

    order = np.random.default_rng(seed).permutation(len(pictures))
    aside = round(held_out * len(pictures))
    if held_out and not 0 < aside < len(pictures):
        raise UsageError(f"held_out = {held_out} · of {len(pictures)} pictures leaves a part empty", next="Give more.")
    chosen, kept = order[:aside], order[aside:]
    passes = epochs or max(EPOCHS[network], math.ceil(LEAST_STEPS * min(BATCH, len(kept)) / len(kept)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained = make_network(network, pictures.shape[1:], len(code)).to(device)
    best = _fit(trained, pictures, targets, kept, chosen, passes, RATES[network], seed, device)
    read = predict(trained, test_pictures, device)
    right = read == test_targets
    low, high = wilson(int(right.sum()), len(right))
    tested = np.array(names[1])
    counts = {value: int((tested == value).sum()) for value in sorted(set(names[1]))}
    return Accuracy(
        value=float(right.mean()),
        low=low,
        high=high,
        majority=max(counts.values()) / len(right),
        network=f"{WORDS[network]}, sha256 {judge.sha256_of(trained.cpu())}",
        trained_on=len(kept),
        tested_on=len(right),
        epochs=best,
        chosen_by=f"accuracy on {aside} held-out training pictures" if aside else "fixed number of passes",
        by_label={value: float(right[tested == value].mean()) for value in counts},
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 %."""
    share, z2 = hits / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # At 0 and at all the ends are exact; rounding must not move them past the share.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def make_network(network: Network, shape: tuple[int, ...], classes: int) -> "nn.Module":
    """(R, C, H, W) -> (R, classes). Args: shape (H, W, C)."""
    from torch import nn

    height, width, channels = shape
    size = height * width * channels
    match network:
        case "logistic_regression":
            return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
        case "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, classes))
        case "cnn":
            inside = 64 * (height // 4) * (width // 4)
            if not inside:
                raise UsageError(f"pictures are {height} x {width} · cnn needs 4 x 4", next="Use mlp.")
            return nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(inside, 128), nn.ReLU(), nn.Linear(128, classes),
            )  # fmt: skip


def predict(network: "nn.Module", pictures: np.ndarray, device: str = "cpu") -> np.ndarray:
    """The most probable class of each picture, (N,) int64."""
    import torch

    with torch.inference_mode():
        parts = [
            network(judge.to_tensor(pictures[start : start + 512]).to(device)).argmax(1).cpu().numpy()
            for start in range(0, len(pictures), 512)
        ]
    return np.concatenate(parts)


def _fit(
    network: "nn.Module",
    pictures: np.ndarray,
    targets: np.ndarray,
    kept: np.ndarray,
    chosen: np.ndarray,
    passes: int,
    rate: float,
    seed: int,
    device: str,
) -> int:
    """Trains in place; returns the pass whose weights it ends with."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, len(kept))
    steps = len(kept) // batch
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * steps)
    best, best_share, best_weights = passes, -1.0, None
    network.train()
    for epoch in range(1, passes + 1):
        order = kept[torch.randperm(len(kept), generator=generator).numpy()]
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            logits = network(judge.to_tensor(pictures[rows]).to(device))
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets[rows]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if len(chosen):
            share = float((predict(network, pictures[chosen], device) == targets[chosen]).mean())
            if share > best_share:
                best, best_share = epoch, share
                best_weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    if best_weights is not None:
        network.load_state_dict(best_weights)
    network.eval()
    return best


def _checked(pictures: np.ndarray, labels: Sequence[str | int] | np.ndarray, name: str) -> list[str]:
    """Labels as words."""
    if pictures.ndim != 4 or pictures.dtype != np.uint8 or len(pictures) < 2:
        raise UsageError(
            f"{name} = {pictures.dtype} {pictures.shape} · must be uint8 (N, H, W, C) with N >= 2",
            next="Give pictures.",
        )
    if len(labels) != len(pictures):
        raise UsageError(f"labels = {len(labels)} · must be one for each of {name}, {len(pictures)}", next="")
    return [str(label) for label in labels]
