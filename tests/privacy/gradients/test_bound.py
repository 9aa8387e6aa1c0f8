"""What is noised never exceeds C, in the arithmetic really used: one unit with a huge gradient, layers of millions of numbers."""

import pytest
import torch
from torch import nn

from sfumato.privacy import step_noise
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom

C = 0.7


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9000, 256), nn.Linear(256, 9000, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(words))


CASES = {
    "linear, one position": (lambda: nn.Linear(2500, 2000), lambda: torch.randn(1, 2500)),
    "linear, kept": (lambda: nn.Linear(2000, 1500), lambda: torch.randn(1, 900, 2000)),
    "linear, by Gram matrices": (lambda: nn.Linear(2500, 2000), lambda: torch.randn(1, 40, 2500)),
    "convolution, large picture": (lambda: nn.Conv2d(512, 512, 3), lambda: torch.randn(1, 512, 24, 24)),
    "convolution, small picture": (lambda: nn.Conv2d(512, 512, 3, padding=1), lambda: torch.randn(1, 512, 4, 4)),
    "embedding": (lambda: nn.Embedding(9000, 300), lambda: torch.randint(0, 9000, (1, 5000))),
    "tied embedding": (Tied, lambda: torch.randint(0, 9000, (1, 30))),
    "norm": (lambda: nn.LayerNorm(1_000_000), lambda: torch.randn(1, 1_000_000)),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_huge_gradient_is_clipped_to_no_more_than_the_bound(name, kind, monkeypatch):
    torch.manual_seed(0)
    make, data = CASES[name]
    model, x = make(), data()
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
        x = x.to(torch.bfloat16) if x.is_floating_point() else x
    noised = []
    monkeypatch.setattr(
        step_noise.Independent,
        "added",
        lambda self, key, count, std, plus: noised.append(plus) or plus.double().clone(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=C, noise_multiplier=0, expected_batch_size=1, sampling_rate=0.5, random=TestRandom(0)
    )
    engine.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = model(x)
        loss = (y.float() * torch.randn_like(y.float())).sum() * 1e4
    loss.backward()
    optimizer.step()
    norm = torch.cat([part.double().flatten() for part in noised]).norm()
    assert sum(part.numel() for part in noised) >= 2_000_000
    assert float(norm) <= C
    assert float(norm) >= C * 0.99
