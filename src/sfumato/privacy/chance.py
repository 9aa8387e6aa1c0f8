"""Chance inside a loss (noise levels, dropout), while an engine trains: the global generators of torch, numpy and Python, from
its secret source.

What a loss draws is in no event of the ledger, and need not be, on three conditions (docs/privacy.md has the proof): each
row's draws are independent of the other rows' and of the data; nobody knows them; and every step has its own. Under a seed that
somebody knows they fail: one row more shifts the draws, thus the gradients, of all rows after it.

So the state of the CPU's generator, 624 words, is drawn anew for every physical part of a batch, not one of the 2^32
streams that ``torch.manual_seed`` can begin: of such a state the first 623 words that a loss takes are exactly uniform. A GPU's
generator takes 64 bits. numpy's and Python's global generators, which some models mask with, are of the same kind as torch's and
get words of their own. The caller's states are put back.

Not reached: a generator of the loss's own (``torch.Generator``, ``numpy.random.default_rng``), and those of other devices.
"""

import os
import random as python_random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import PrivacyRefused, SfumatoError
from sfumato.randomness import Random

_WORDS = 624  # of 32 bits: the state of MT19937
_STATE = np.dtype([("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("words", "<u8", (_WORDS,))])
_MARK = int.from_bytes(os.urandom(8)) >> 1  # stands as the seed of every state that an engine has made in this process


class LossChance:
    """torch's generators of the CPU and of the GPUs that hold ``model``.

    Args: random: the engine's source; chance in losses comes from another stream than its noise (``Random.apart``).
    """

    def __init__(self, model: nn.Module, random: Random) -> None:
        self._model = model
        self._random = random.apart()
        self._before: dict[torch.Generator, Tensor] = {}  # the caller's states
        self._others: tuple[Any, Any] | None = None  # numpy's and Python's

    def renew(self) -> None:
        """From here on losses draw what nobody has drawn."""
        for generator in _generators(self._model.parameters()):
            if generator not in self._before:
                self._before[generator] = generator.get_state()
            if generator.device.type == "cpu":
                generator.set_state(_state(self._random, generator.get_state()))
                if generator.initial_seed() != _MARK:
                    raise SfumatoError(
                        f"torch {torch.__version__} · keeps the state of its generator in another form than 624 words",
                        next="Use the version of torch that is in requirements.lock.",
                        code="generator_form",
                    )
            else:
                generator.manual_seed(int.from_bytes(self._random.bytes(8)) >> 1)
        if self._others is None:
            self._others = np.random.get_state(), python_random.getstate()
        np.random.set_state(("MT19937", self._words(), 0, 0, 0.0))
        python_random.setstate((3, (*self._words().tolist(), 0), None))

    def _words(self) -> np.ndarray:
        return np.frombuffer(self._random.bytes(4 * _WORDS), dtype="<u4")

    def require_unseeded(self) -> None:
        """Raises PrivacyRefused if the CPU's generator was seeded since (``torch.manual_seed`` does it for all devices)."""
        if self._random.for_release and self._before and torch.default_generator.initial_seed() != _MARK:
            raise PrivacyRefused(
                f"torch.initial_seed() = {torch.initial_seed()} · torch was seeded while the engine was at work: who knows what "
                "a loss draws can tell its rows apart, which no noise pays for",
                next="Seed before the training, draw with a torch.Generator of your own, or use torch.random.fork_rng().",
                code="seeded",
            )

    def give_back(self) -> None:
        """The caller's states, as they were before the first ``renew``."""
        before, self._before = self._before, {}
        for generator, state in before.items():
            generator.set_state(state)
        others, self._others = self._others, None
        if others is not None:
            np.random.set_state(others[0])
            python_random.setstate(others[1])


def _generators(parameters: Iterable[nn.Parameter]) -> list[torch.Generator]:
    indices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    return [torch.default_generator, *(torch.cuda.default_generators[i] for i in indices)]


def _state(random: Random, like: Tensor) -> Tensor:
    """A state of the CPU's generator with fresh words, of which the next to be taken is the first."""
    state = like.numpy().copy()
    fields = state[: _STATE.itemsize].view(_STATE)[0]
    fields["seed"], fields["left"], fields["seeded"], fields["next"] = _MARK, _WORDS, 1, 0
    fields["words"] = np.frombuffer(random.bytes(4 * _WORDS), dtype="<u4")
    state[_STATE.itemsize :] = 0  # no half of a pair of normals is kept
    return torch.from_numpy(state)
