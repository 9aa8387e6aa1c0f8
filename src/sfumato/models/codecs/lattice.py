"""Numbers to tokens and back on fixed public grids: a block of numbers (a patch, a frame) becomes a few tokens.

Each number has evenly spaced values in a public range; the values of a few numbers together are one token. Fitted to nothing.
Source: finite scalar quantisation (Mentzer et al. 2024, arXiv:2309.15505, section 3.1), of a fixed transform in place of a trained one.

Shapes: R records, P blocks, K numbers a block, S tokens a block, V tokens to choose from.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.errors import UsageError


@dataclass(frozen=True)
class Lattice:
    """The s-th token of a block tells the next ``len(levels[s])`` of its numbers, each by one of so many values.

    Numbers are in units of their range: 0 is the middle, -1 and 1 are the ends, what is beyond counts as an end. Numbers that
    no token tells come back as 0. The tokens of another place in the block are other tokens.

    Attributes:
      levels: by token, how many values each of its numbers can take.
      blocks: P.
      numbers: K.
    """

    levels: tuple[tuple[int, ...], ...]
    blocks: int
    numbers: int

    def __post_init__(self) -> None:
        told = sum(len(levels) for levels in self.levels)
        if not told or not all(self.levels) or told > self.numbers or min(min(levels) for levels in self.levels) < 2:
            raise UsageError(
                f"levels = {self.levels} · must be 2 or more for each of at most {self.numbers} numbers",
                next="Correct the levels, or enlarge the blocks.",
            )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each place of a block has."""
        return tuple(math.prod(levels) for levels in self.levels)

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(first token, one past the last) at each of the P S places of a sequence."""
        firsts = [sum(self.sizes[:s]) for s in range(len(self.sizes))]
        return tuple((first, first + size) for first, size in zip(firsts, self.sizes, strict=True)) * self.blocks

    def encode(self, values: Tensor) -> Tensor:
        """(R, P, K) -> (R, P S) int64."""
        columns, number = [], 0
        for (first, _), levels in zip(self.ranges, self.levels, strict=False):
            code = torch.zeros(values.shape[:2], dtype=torch.int64)
            for count in levels:
                steps = (values[:, :, number].double() + 1) / 2 * count
                code = code * count + steps.floor().clamp(0, count - 1).long()
                number += 1
            columns.append(first + code)
        return torch.stack(columns, 2).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """(R, P S) -> (R, P, K) float32. A token that belongs to another place counts as the nearest of its own."""
        tokens = tokens.reshape(len(tokens), self.blocks, len(self.sizes))
        values = torch.zeros(len(tokens), self.blocks, self.numbers)
        number = 0
        for place, ((first, last), levels) in enumerate(zip(self.ranges, self.levels, strict=False)):
            told = self._values(tokens[:, :, place].clamp(first, last - 1) - first, levels)
            values[:, :, number : number + len(levels)] = told
            number += len(levels)
        return values

    def coordinates(self) -> Tensor:
        """(V, S + K): of each token its place as a unit vector, and the values that it stands for."""
        found = torch.zeros(self.vocabulary, len(self.sizes) + self.numbers)
        number = 0
        for place, ((first, last), levels) in enumerate(zip(self.ranges, self.levels, strict=False)):
            found[first:last, place] = 1.0
            start = len(self.sizes) + number
            found[first:last, start : start + len(levels)] = self._values(torch.arange(last - first), levels)
            number += len(levels)
        return found

    @staticmethod
    def _values(code: Tensor, levels: tuple[int, ...]) -> Tensor:
        """(...) -> (..., numbers of this token): the middles of the steps."""
        told = []
        for count in reversed(levels):
            told.append((2.0 * (code % count) + 1.0) / count - 1.0)
            code = code // count
        return torch.stack(told[::-1], -1)
