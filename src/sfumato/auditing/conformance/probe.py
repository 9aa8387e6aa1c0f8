"""Models and units for the tests: a model in which a unit's gradient IS its data, and small models of every kind.

The hostile unit of privacy.md section 3 lives in gradient space: ordinary data with an odd input do not show tensor-wise
clipping of the mean, or micro-batch clipping.

Shapes: B units, P parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZES = (40, 8, 24, 64, 16, 104)  # numbers in the probe's tensors: P = 256
LARGE = 1e4  # a hostile gradient, in units of C


class Probe(nn.Module):
    """Six linear layers of one input, which is 1: loss_i = <parameters, inputs_i>, so that unit i's gradient is inputs_i.

    (B, P) -> (B,). All parameters are 0, so that what they become is what was added to them, without rounding.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, size, bias=False, dtype=dtype) for size in SIZES)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        ones = inputs.new_ones(len(inputs), 1)
        pieces = inputs.split(SIZES, dim=1)
        values = [(layer(ones) * piece).sum(1) for layer, piece in zip(self.layers, pieces, strict=True)]
        return torch.stack(values).sum(0)


class _Scaled(nn.Module):
    """A model whose losses are so large that every unit is above the bound."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: Tensor) -> Tensor:
        return 1e3 * self.losses(inputs)

    def losses(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError


class Biased(_Scaled):
    """Weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def losses(self, inputs: Tensor) -> Tensor:
        return (self.second(torch.tanh(self.first(inputs))) - 1).square().sum(1)


class Shared(_Scaled):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def losses(self, inputs: Tensor) -> Tensor:
        return (self.last(torch.tanh(self.layer(torch.tanh(self.layer(inputs))))) - 1).square().sum(1)


class Positions(_Scaled):
    """One layer at several positions of a unit, which agree: the norm of a sum, not the sum of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 4), nn.Linear(4, 1)

    def losses(self, inputs: Tensor) -> Tensor:
        repeated = inputs[:, None, :].expand(-1, 6, -1)
        return self.last(torch.tanh(self.layer(repeated))).flatten(1).sum(1)


class Normed(_Scaled):
    """A layer norm with weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def losses(self, inputs: Tensor) -> Tensor:
        return (self.last(self.norm(self.first(inputs))) - 1).square().sum(1)


class Worded(_Scaled):
    """An embedding in which words repeat; word 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 2)

    def losses(self, inputs: Tensor) -> Tensor:
        return (self.last(self.words(inputs).sum(1)) - 1).square().sum(1)


class Ignoring(_Scaled):
    """Predicts each word from the one before; word 0 is ignored in the loss, whose mean is over the others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def losses(self, inputs: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.words(inputs[:, :-1])))
        targets = inputs[:, 1:]
        values = nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none", ignore_index=0)
        return values.sum(1) / (targets != 0).sum(1).clamp(min=1)


class Tied(Ignoring):
    """The same, with one matrix for words and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bias": Biased,
    "shared module": Shared,
    "several positions": Positions,
    "layer norm": Normed,
    "embedding": Worded,
    "ignored tokens": Ignoring,
    "tied weights": Tied,
}


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    """The same model every time; "probe" or one of MODELS."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        return Probe(dtype) if kind == "probe" else MODELS[kind]().to(dtype)


def inputs_of(kind: str, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random units for one of MODELS."""
    generator = torch.Generator().manual_seed(seed)
    if issubclass(MODELS[kind], Worded | Ignoring):  # type: ignore[arg-type]
        words = torch.randint(1, 4, (count, 8), generator=generator)  # few words, so that they repeat
        words[:, 6:] = 0
        return words
    return torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)


def signs(count: int, seed: int = 3) -> Tensor:
    """(count,) float64 of +1 and -1."""
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def everywhere() -> Tensor:
    """(P,): length 1, equal in every coordinate but for its sign."""
    count = sum(SIZES)
    return signs(count) / count**0.5


def in_tensor(index: int) -> Tensor:
    """(P,): length 1, inside one tensor."""
    pieces = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    pieces[index] = signs(SIZES[index]) / SIZES[index] ** 0.5
    return torch.cat(pieces)


def in_coordinate(index: int) -> Tensor:
    """(P,): length 1, in the first coordinate of one tensor."""
    direction = torch.zeros(sum(SIZES), dtype=torch.float64)
    direction[sum(SIZES[:index])] = 1.0
    return direction
