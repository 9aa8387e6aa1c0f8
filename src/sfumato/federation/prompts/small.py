"""A small pair of encoders, trained here by contrast on public pairs of picture and caption: for benchmarks without CLIP's weights.

Texts are read word by word (after the context vectors) by a causal transformer, pictures of one channel by a small convolutional
network with a grid of patches. Training is CLIP's symmetric contrastive loss, on public pairs only: nothing here is private.

Shapes: as in ``encoders``.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.federation.prompts.encoders import Texts

START, END, UNKNOWN = 0, 1, 2
CAPTION = "a picture of {}"


class SmallEncoders(nn.Module):
    """Args: words: that it knows, public. width: W; features: E; longest: L at most."""

    def __init__(
        self, words: Sequence[str], *, width: int = 64, features: int = 32, longest: int = 32, layers: int = 1
    ) -> None:
        super().__init__()
        self.width, self.features, self.longest = width, features, longest
        self.words = tuple(sorted(set(words)))
        self._numbers = {word: UNKNOWN + 1 + number for number, word in enumerate(self.words)}
        self.token = nn.Embedding(len(self._numbers) + 3, width)
        self.place = nn.Parameter(torch.randn(longest, width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.end_norm = nn.LayerNorm(width)
        self.from_text = nn.Linear(width, features, bias=False)
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.GELU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.GELU(),
        )  # fmt: skip
        self.from_picture = nn.Linear(64, features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    @property
    def scale(self) -> float:
        return float(self.log_scale.detach().exp())

    def texts(self, names: Sequence[str], tokens: int) -> Texts:
        """A word that is not known is one token for all such words; what is too long is cut."""
        rows = [
            [START, *[END] * tokens, *(self._numbers.get(word, UNKNOWN) for word in words_of(name))] for name in names
        ]
        rows = [[*row[: self.longest - 1], END] for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
        return Texts(ids, torch.tensor([len(row) - 1 for row in rows]))

    def read(self, texts: Texts, context: Tensor) -> Tensor:
        embedded = self.token(texts.ids)
        hidden = torch.cat([embedded[:, :1], context.to(embedded), embedded[:, 1 + context.shape[1] :]], 1)
        hidden = hidden + self.place[: hidden.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        chosen = hidden[torch.arange(len(hidden)), texts.end]
        return nn.functional.normalize(self.from_text(self.end_norm(chosen)), dim=-1)

    def captions(self, names: Sequence[str]) -> Tensor:
        """(K, E) of texts as they are, with a gradient."""
        texts = self.texts(names, 0)
        return self.read(texts, torch.zeros(len(names), 0, self.width))

    @torch.no_grad()
    def hand_written(self, names: Sequence[str]) -> Tensor:
        return self.captions([CAPTION.format(name) for name in names])

    def pictures(self, pixels: Tensor) -> Tensor:
        """(N, 1 + V, E). Args: pixels: (N, 1, H, W) in [0, 1]."""
        patches = self.network(pixels * 2 - 1).flatten(2).transpose(1, 2)  # (N, V, 64)
        both = torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return nn.functional.normalize(self.from_picture(both), dim=-1)

    @torch.no_grad()
    def look(self, pictures: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(pictures)).float().mean(-1)[:, None] / 255
        return torch.cat([self.pictures(part) for part in pixels.split(512)])


def words_of(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


class _Block(nn.Module):
    """Causal attention and a small network, each after a norm. Plain products: gradients of many outputs at once go through them."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.mixed, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.then = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        q, k, v = self.mixed(self.before(hidden)).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        hidden = hidden + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width))
        return hidden + self.then(hidden)


def trained(
    pixels: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    **sizes: int,
) -> SmallEncoders:
    """Encoders trained on public pairs, then frozen.

    Args: pixels: (N, 1, H, W) in [0, 1]; captions: one for each. A caption that two pictures of a batch share counts once.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        known = sorted({word for text in captions for word in words_of(text)})
        model = SmallEncoders(known, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        told = [captions[int(i)] for i in chosen]
        different = sorted(set(told))
        which = torch.tensor([different.index(text) for text in told])
        likeness = model.pictures(pixels[chosen])[:, 0] @ model.captions(different).T * model.log_scale.exp()
        to_text = nn.functional.cross_entropy(likeness, which)
        shared = nn.functional.one_hot(which, len(different)).float()  # (batch, different)
        to_picture = -(likeness.log_softmax(0) * shared / shared.sum(0)).sum(0).mean()
        optimizer.zero_grad()
        (to_text + to_picture).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()
