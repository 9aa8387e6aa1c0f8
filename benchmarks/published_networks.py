"""The three networks that DPImageBench (arXiv:2503.14681) reads generated pictures with; for a GPU, some hours each on one.

ResNet-110 (He et al. 2016, arXiv:1512.03385, section 4.2), WRN-40-4 with dropout .3 (Zagoruyko & Komodakis 2016, arXiv:1605.07146) and
ResNeXt-29, 8 groups, widened by 4 (Xie et al. 2017, arXiv:1611.05431, section 5.2). Adam, learning rate .01, times .2 every 20 of
50 passes, batches of 256. The pass is chosen by held-out *generated* pictures.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.evaluation.usefulness import wilson

PASSES, BATCH, RATE = 50, 256, 1e-2


class Basic(nn.Module):
    """Two 3x3 convolutions, normalised after each; ``before`` normalises before each instead, as wide networks do."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, before: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.before = before
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs if before else outputs), nn.BatchNorm2d(outputs)])
        self.dropout = nn.Dropout(dropout)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            inside = torch.relu(self.norms[0](x))
            y = torch.relu(self.norms[1](self.first(inside)))
            return self.shortcut(x) + self.second(self.dropout(y))
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.shortcut(x) + self.norms[1](self.second(y)))


class Grouped(nn.Module):
    """1x1, grouped 3x3, 1x1 (the third form of the paper's figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, groups: int = 8, widened: int = 4) -> None:
        super().__init__()
        inner = groups * outputs // widened
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.layers(x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def stages(block: Callable[..., nn.Module], first: int, widths: Sequence[int], blocks: int, channels: int) -> nn.Module:
    """Three stages; the second and third halve the picture."""
    layers: list[nn.Module] = [nn.Conv2d(channels, first, 3, 1, 1, bias=False)]
    inputs = first
    for stage, width in enumerate(widths):
        for number in range(blocks):
            layers.append(block(inputs, width, 2 if stage and not number else 1))
            inputs = width
    return nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make(name: str, channels: int, classes: int) -> nn.Module:
    match name:
        case "ResNet-110":
            body, width = stages(Basic, 16, (16, 32, 64), 18, channels), 64
        case "WRN-40-4":
            body, width = stages(_wide, 16, (64, 128, 256), 6, channels), 256
        case "ResNeXt-29":
            body, width = stages(Grouped, 64, (256, 512, 1024), 3, channels), 1024
        case other:
            raise AssertionError(f"not a network of the protocol: {other}")
    return nn.Sequential(body, nn.Linear(width, classes))


def _wide(inputs: int, outputs: int, stride: int) -> nn.Module:
    return Basic(inputs, outputs, stride, before=True, dropout=0.3)


NETWORKS = ("ResNet-110", "WRN-40-4", "ResNeXt-29")


def read_by_published(
    name: str,
    pictures: np.ndarray,
    labels: Sequence[str],
    test_pictures: np.ndarray,
    test_labels: Sequence[str],
    *,
    held_out: int,
    passes: int = PASSES,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains on generated pictures, chooses the pass by ``held_out`` of them, reads the real ones once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print(f"{name}: no GPU: this takes days", file=sys.stderr, flush=True)
    names = sorted(set(labels))
    code = {label: index for index, label in enumerate(names)}
    torch.manual_seed(seed)
    network = make(name, pictures.shape[-1], len(names)).to(device)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).numpy()
    targets = torch.tensor([code[label] for label in labels])
    aside, kept = order[:held_out], order[held_out:]
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.2)
    best, best_pass, weights = -1.0, 0, network.state_dict()
    for number in range(1, passes + 1):
        network.train()
        for rows in np.array_split(np.random.default_rng([seed, number]).permutation(kept), max(1, len(kept) // BATCH)):
            loss = nn.functional.cross_entropy(network(_tensor(pictures[rows], device)), targets[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        share = float((_read(network, pictures[aside], device) == targets[aside].numpy()).mean())
        if share > best:
            best, best_pass = share, number
            weights = {key: value.detach().clone() for key, value in network.state_dict().items()}
        print(f"{name}: pass {number} of {passes}, held-out generated {share:.4f}", file=sys.stderr, flush=True)
    network.load_state_dict(weights)
    right = _read(network, test_pictures, device) == np.array([code.get(label, -1) for label in test_labels])
    low, high = wilson(int(right.sum()), len(right))
    return {
        "value": float(right.mean()), "low": low, "high": high, "network": name, "epochs": best_pass,
        "trained_on": len(kept), "tested_on": len(right), "chosen_by": f"accuracy on {held_out} held-out generated pictures",
    }  # fmt: skip


def _tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _read(network: nn.Module, pictures: np.ndarray, device: torch.device) -> np.ndarray:
    network.eval()
    with torch.inference_mode():
        parts = [
            network(_tensor(pictures[i : i + 1000], device)).argmax(1).cpu() for i in range(0, len(pictures), 1000)
        ]
    return torch.cat(parts).numpy()
