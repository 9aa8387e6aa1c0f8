"""The noise of a training, step by step: independent, or correlated in blocks with units that are drawn in cycles.

``Independent`` is one source, asked anew for every coordinate of every step. A ``Block`` is what ``correlated`` proves its
claim for: groups, strategy and past noise from one first step on, until the training stops or a step fails. Whatever goes
wrong in a block, the next step begins another one.
"""

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.privacy import correlated
from sfumato.privacy.noise import Source
from sfumato.privacy.sampling import CyclicPoisson
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor


class StepNoise(Protocol):
    """What a step's sum is noised with."""

    def widened(self, std: float, bound: float, dimension: int) -> float:
        """The standard deviation to ask ``added`` for, so that all rounding is paid for."""
        ...

    def added(self, key: Hashable, count: int, std: float, plus: "Tensor | None") -> "Tensor":
        """(count,) float64 on the CPU: ``plus`` and its noise. Args: key: of these coordinates, the same in every step."""
        ...

    def variance(self, std: float) -> float:
        """Of the noise on each coordinate in the present step."""
        ...


class Independent:
    """Noise of every step by itself."""

    def __init__(self, source: Source, random: Random) -> None:
        self._source, self._random = source, random

    def widened(self, std: float, bound: float, dimension: int) -> float:
        return self._source.widened(std, bound, dimension)

    def added(self, key: Hashable, count: int, std: float, plus: "Tensor | None") -> "Tensor":
        return self._source.draw(count, std, self._random, plus)

    def variance(self, std: float) -> float:
        return std**2


class Block:
    """Steps 0 .. ``steps`` - 1 of one strategy of at most ``bands`` bands; a cycle is ``bands`` of them, and one event.

    A shorter block has a narrower strategy, which the same event covers. A cycle is charged at its first step alone, so a
    forked process, which would take the others a second time, is refused (LedgerError).
    """

    def __init__(self, bands: int, steps: int, source: Source, random: Random) -> None:
        self.bands, self.steps = bands, steps
        self._process = os.getpid()
        self.step = -1  # the one that was begun last
        self.sequence: int | None = None  # of the reservation of the present cycle
        self._strategy = correlated.toeplitz(min(bands, steps), steps)
        self._variances = correlated.variances(self._strategy)
        self._source, self._random = source, random
        self._streams: dict[Hashable, correlated.Stream] = {}
        self._sampler: CyclicPoisson | None = None

    @property
    def begins_cycle(self) -> bool:
        return self.step % self.bands == 0

    @property
    def ends_cycle(self) -> bool:
        return self.step % self.bands == self.bands - 1 or self.step == self.steps - 1

    def begin_step(self) -> None:
        correlated.require_process(self._process)
        self.step += 1

    def units(self, num_units: int, sampling_rate: float) -> np.ndarray:
        """Draws those of the step, once. Args: sampling_rate: of a unit in its own group's steps."""
        correlated.require_process(self._process)
        if self._sampler is None:
            self._sampler = CyclicPoisson(num_units, self.bands, sampling_rate, self._random)
        return self._sampler.next()

    def widened(self, std: float, bound: float, dimension: int) -> float:
        return correlated.widened(std, bound, dimension, self._strategy)

    def added(self, key: Hashable, count: int, std: float, plus: "Tensor | None") -> "Tensor":
        correlated.require_process(self._process)
        if key not in self._streams:
            self._streams[key] = correlated.Stream(self._strategy, count, std, self._source)
        stream = self._streams[key]
        if stream.taken != self.step or stream.std != std:
            raise SfumatoError(
                f"noise of step {stream.taken} and standard deviation {stream.std:g} · was asked for in step {self.step} with "
                f"{std:g}: a step must take the noise of every parameter once",
                next="Please report what the loop does.",
                code="correlated_noise",
            )
        return stream.next(self._random, plus)

    def variance(self, std: float) -> float:
        return std**2 * float(self._variances[self.step])
