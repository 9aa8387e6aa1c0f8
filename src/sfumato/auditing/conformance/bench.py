"""Runs a trainer's step on chosen units, and looks at what came out. Everything is remembered: a control that puts a bug
into the same trainer reuses what the trainer did.

A *broken* bench stands for the same trainer with a bug that the suite put in: what a check finds there is its positive
control.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.adapter import Claim, Trainer
from sfumato.auditing.conformance.outcome import Undecided

Bug = Callable[["Bench", Tensor, float, int, str], "Released"]


@dataclass(frozen=True, slots=True)
class Released:
    """What one step released: by how much each of the model's tensors moved, and whatever else the step gave out.

    Attributes:
      blocks: float64 vectors; each may have noise of its own.
      tensors: how many of the blocks are the model's.
    """

    blocks: tuple[Tensor, ...]
    tensors: int

    @property
    def vector(self) -> Tensor:
        """(P,): the model's blocks."""
        return torch.cat(self.blocks[: self.tensors])

    def minus(self, other: "Released") -> "Released":
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Released(tuple(a - b for a, b in pairs), self.tensors)

    def plus(self, other: "Released", factor: float = 1.0) -> "Released":
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Released(tuple(a + factor * b for a, b in pairs), self.tensors)

    def scaled(self, factor: float) -> "Released":
        return Released(tuple(block * factor for block in self.blocks), self.tensors)

    @property
    def sums(self) -> "Released":
        """Without what was released beside the sum: a count has a sensitivity of its own, and is row 12's."""
        return Released(self.blocks[: self.tensors], self.tensors)

    @property
    def norm(self) -> float:
        """Of the model's blocks together."""
        return float(self.vector.norm())

    @property
    def finite(self) -> bool:
        return all(bool(block.isfinite().all()) for block in self.blocks)


class Bench:
    """A trainer on the test bench.

    Args:
      seed: of the whole pass; every run with noise gets one of its own, made from this.
      noise_runs: with how many noisy steps the noise is measured.
    """

    def __init__(self, trainer: Trainer, *, seed: int = 0, noise_runs: int = 16, games: int = 48) -> None:
        self.trainer = trainer
        self.seed = seed
        self.noise_runs = noise_runs
        self.games = games
        self._known: dict[Any, Released | Undecided] = {}
        self._bug: Bug | None = None
        self._inner: Bench | None = None
        self._wide: Bench | None = None

    @property
    def claim(self) -> Claim:
        return self.trainer.claim

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.claim.dtype)

    def broken(self, bug: Bug) -> "Bench":
        """The same trainer, with a bug in what its steps release."""
        other = Bench(self.trainer, seed=self.seed, noise_runs=self.noise_runs, games=self.games)
        other._bug, other._inner = bug, self
        return other

    def with_trainer(self, **changes: Any) -> "Bench":
        """The same trainer, with other calls or another claim."""
        trainer = replace(self.trainer, **changes)
        return Bench(trainer, seed=self.seed, noise_runs=self.noise_runs, games=self.games)

    def in_float64(self) -> "Bench":
        """The same trainer on float64 models, with the same bug."""
        if self.claim.dtype == "float64":
            return self
        if self._bug is not None and self._inner is not None:
            return self._inner.in_float64().broken(self._bug)
        if self._wide is None:
            self._wide = self.with_trainer(claim=replace(self.claim, dtype="float64"))
        return self._wide

    def run(self, inputs: Tensor, noise_multiplier: float = 0.0, seed: int = 0, kind: str = "probe") -> Released:
        """One step on exactly these units. Raises Undecided where the trainer raises."""
        key = (kind, inputs.dtype, tuple(inputs.shape), inputs.numpy().tobytes(), float(noise_multiplier), seed)
        if key not in self._known:
            try:
                self._known[key] = self._run(inputs, noise_multiplier, seed, kind)
            except Undecided as undecided:
                self._known[key] = undecided
        value = self._known[key]
        if isinstance(value, Undecided):
            raise value
        return value

    def _run(self, inputs: Tensor, noise_multiplier: float, seed: int, kind: str) -> Released:
        if self._bug is not None and self._inner is not None:
            return self._bug(self._inner, inputs, noise_multiplier, seed, kind)
        wanted = inputs.dtype if inputs.is_floating_point() else torch.float64
        return self.observe(
            probe.model_of(kind, self.dtype if kind == "probe" else wanted),
            seed,
            lambda model, generator: self.trainer.step(model, inputs.clone(), noise_multiplier, generator),
        )

    def observe(
        self, model: nn.Module, seed: int, act: Callable[[nn.Module, torch.Generator], Any], what: str = "step"
    ) -> Released:
        """What a call does to a model. Torch's global generator is seeded for it, and restored."""
        before = [p.detach().clone() for p in model.parameters()]
        # two seeds: a trainer that draws from both generators must not draw the same numbers twice
        generator = torch.Generator().manual_seed(self._seed(seed, 1))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed(seed, 2))  # torch.manual_seed costs as much as a step
            extras = called(what, act, model, generator)
        moved = [(b.double() - p.detach().double()).flatten() for b, p in zip(before, model.parameters(), strict=True)]
        others = [torch.as_tensor(extra).detach().double().reshape(-1) for extra in (extras or ())]
        return Released((*moved, *others), len(moved))

    def _seed(self, seed: int, stream: int) -> int:
        return ((self.seed * 1_000_003 + seed) * 4 + stream) % 2**62

    # -- units --

    def unit(self, direction: Tensor, length: float = probe.LARGE) -> Tensor:
        """(1, P): a unit whose gradient has this direction, and this length in units of C."""
        return (direction * length * self.claim.max_grad_norm).to(self.dtype)[None]

    def nobody(self) -> Tensor:
        return torch.zeros(0, sum(probe.SIZES), dtype=self.dtype)

    def zeros(self, count: int) -> Tensor:
        """Units without a gradient."""
        return torch.zeros(count, sum(probe.SIZES), dtype=self.dtype)

    def crowd(self, count: int = 8) -> Tensor:
        """Units that agree, all above the bound."""
        return self.unit(probe.everywhere()).expand(count, -1).clone()

    def rest(self) -> Released:
        """What is released of nobody, without noise; where a trainer cannot do that, of a unit without a gradient."""
        try:
            return self.run(self.nobody())
        except Undecided:
            return self.run(self.zeros(1))

    # -- what noise looks like --

    def noises(
        self, inputs: Tensor, runs: int | None = None, noise_multiplier: float | None = None, first: int = 1
    ) -> list[Released]:
        """Noise of several runs: what they released, less what the same step releases without noise."""
        quiet = self.run(inputs)
        sigma = self.claim.noise_multiplier if noise_multiplier is None else noise_multiplier
        if runs is None:  # a block of one number needs more runs
            runs = self.noise_runs if len(quiet.blocks) == quiet.tensors else max(self.noise_runs, 96)
        return [self.run(inputs, sigma, first + i).minus(quiet) for i in range(runs)]


def spread(noises: Sequence[Released]) -> list[tuple[float, int]]:
    """(root mean square, degrees of freedom) of every block."""
    out = []
    for block in range(len(noises[0].blocks)):
        values = torch.stack([noise.blocks[block] for noise in noises])
        out.append((float(values.square().mean().sqrt()), values.numel()))
    return out


def called(what: str, function: Callable[..., Any], *given: Any) -> Any:
    """A call of the adapter. Raises Undecided where it raises: that is a reason, and no verdict."""
    try:
        return function(*given)
    except Undecided:
        raise
    except Exception as error:
        raise Undecided(f"{what} raised {type(error).__name__}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
