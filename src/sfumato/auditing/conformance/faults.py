"""Several steps: what is charged against what is released (A), what is carried from one step to the next (S), and what a
killed run does again (F).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.adapter import Run
from sfumato.auditing.conformance.bench import Bench, Released, spread
from sfumato.auditing.conformance.noise import independent
from sfumato.auditing.conformance.outcome import Finding, Undecided
from sfumato.auditing.conformance.sensitivity import TOLERANCE, exceeds, lone, mu

STEPS = 6


class Watched:
    """The batches of a run, and what the model's parameters were whenever something may have been released: after every step
    of a torch optimizer, and before every batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self._model = model
        self._batches = batches
        self._seen = [self._vector()]
        self._steps = 0

    def _vector(self) -> Tensor:
        return torch.cat([p.detach().double().flatten() for p in self._model.parameters()])

    def look(self, *_: object) -> None:
        now = self._vector()
        if not torch.equal(now, self._seen[-1]):
            self._seen.append(now)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self.look()
            yield batch.clone()
        self.look()

    def __len__(self) -> int:
        return len(self._batches)

    def released(self) -> list[Tensor]:
        self.look()
        return [before - after for before, after in zip(self._seen, self._seen[1:], strict=False)]


def trained(bench: Bench, batches: Sequence[Tensor], sigma: float, seed: int) -> tuple[Run, list[Tensor]]:
    """The run of ``Trainer.train``, and what it released, one vector after another."""
    train = bench.trainer.train
    if train is None:
        raise Undecided("the adapter gives no train")
    return _observed(bench, batches, seed, lambda model, watched, g: train(model, watched, sigma, g), "train")


def _observed(
    bench: Bench, batches: Sequence[Tensor], seed: int, act: Callable[..., Run], what: str
) -> tuple[Run, list[Tensor]]:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    runs: list[Run] = []
    watches: list[Watched] = []

    def whole(model: nn.Module, generator: torch.Generator) -> None:
        watched = Watched(model, batches)
        watches.append(watched)
        handle = register_optimizer_step_post_hook(watched.look)
        try:
            runs.append(act(model, watched, generator))
        finally:
            handle.remove()

    bench.observe(probe.model_of("probe", bench.dtype), seed, whole, what)
    run = runs[0]
    if not isinstance(run, Run):
        raise Undecided(f"{what} returned {type(run).__name__}, not a conformance.Run")
    if run.released is not None:
        return run, [torch.as_tensor(r).detach().double().flatten() for r in run.released]
    return run, watches[0].released()


def charged(bench: Bench, alpha: float) -> Finding:
    """Row 11: as many events as releases, each with the noise that is charged."""
    run, released = trained(bench, [bench.crowd(2)] * STEPS, bench.claim.noise_multiplier, 50)
    figures = {"released": float(len(released)), "charged": float(run.charged), "steps": float(STEPS)}
    said = f"{len(released)} releases, {run.charged} charged"
    if run.noise_multiplier > bench.claim.noise_multiplier * (1 + 1e-6):
        said += f" at a noise multiplier of {run.noise_multiplier:.4g}, claimed {bench.claim.noise_multiplier:.4g}"
        return Finding(violated=True, because=said, figures=figures)
    if len(released) < STEPS:
        raise Undecided(f"only {len(released)} changes of the parameters were seen in {STEPS} steps")
    return Finding(violated=run.charged < len(released), because=said, figures=figures)


def _later_moves(bench: Bench) -> tuple[float, float]:
    """How far later releases move for a unit of the first batch, in C: in the unit's own tensor, and in those of the units
    that the later batches have of their own. Every batch has its own tensor, so that one thing is not taken for another."""
    length = 0.5 * probe.LARGE
    own = [bench.unit(probe.in_tensor(i), length) for i in range(4)]
    first = torch.cat([bench.unit(probe.in_tensor(0)), own[1]])
    with_, without = (trained(bench, [batch, own[2], own[3]], 0.0, 60)[1] for batch in (first, own[1]))
    if not with_:
        raise Undecided("no change of the parameters was seen")
    if len(with_) != len(without) or len(with_) < 3:
        raise Undecided(f"{len(with_)} releases with the unit, {len(without)} without: they cannot be compared")
    bound = lone(bench, probe.everywhere()).norm
    split = len(with_) // 3  # a step may release several vectors
    moves = [(a - b).split(probe.SIZES) for a, b in zip(with_[split:], without[split:], strict=True)]
    kept = max(float(move[0].norm()) for move in moves)
    carried = max(float(torch.cat([move[2], move[3]]).norm()) for move in moves)
    return kept / bound, carried / bound


def kept_gradients(bench: Bench, alpha: float) -> Finding:
    """Row 11: a unit of the first batch must not be added again later."""
    kept, _ = _later_moves(bench)
    said = f"a unit of the first batch is in later steps with {kept:.3g} C"
    return Finding(violated=kept > TOLERANCE[bench.dtype], because=said, figures={"kept_over_bound": kept})


def carried_bound(bench: Bench, alpha: float) -> Finding:
    """Row 12: how later units are clipped must not follow earlier ones, unless that is released with noise and charged."""
    _, carried = _later_moves(bench)
    said = f"a unit of the first batch changes what later units are scaled to by {carried:.3g} C"
    return Finding(violated=carried > TOLERANCE[bench.dtype], because=said, figures={"carried_over_bound": carried})


def counted(bench: Bench, alpha: float) -> Finding:
    """Row 12: all that a step releases together, a count beside the sum included, loses no more than was claimed."""
    unit = bench.unit(probe.everywhere(), 1.0)
    quiet = bench.run(unit)
    extras = len(quiet.blocks) - quiet.tensors
    if not extras:
        if bench.claim.clipping == "adaptive":
            raise Undecided("adaptive clipping also releases a count (or the next bound), and step did not return it")
        return Finding(violated=False, because="a step returns nothing beside the sum")
    noise = spread(bench.noises(unit))
    moved = quiet.minus(bench.rest())
    sure, likely = mu(moved, noise, alpha), mu(moved, noise)
    figures = {
        "claimed_noise_multiplier": bench.claim.noise_multiplier,
        "effective_noise_multiplier": 1 / likely if likely else math.inf,
        "of_the_sum_alone": 1 / max(mu(moved.sums, noise[: moved.tensors]), 1e-300),
    }
    said = f"sum and count together: effective noise multiplier {figures['effective_noise_multiplier']:.3g}"
    beside = exceeds(bench, moved.sums, noise[: moved.tensors], alpha)  # then it is not the count
    found = sure * bench.claim.noise_multiplier > 1 + TOLERANCE[bench.dtype] and not beside
    return Finding(violated=found, because=f"{said}, claimed {bench.claim.noise_multiplier:.3g}", figures=figures)


def noise_of_a_run(bench: Bench, alpha: float) -> Finding:
    """Row 16: the steps of one run have noise of their own."""
    _, released = trained(bench, [bench.zeros(1)] * 8, bench.claim.noise_multiplier, 70)
    return independent(_as_noises(released), alpha)


def resumed(bench: Bench, alpha: float) -> Finding:
    """Row 16: after a kill and a resume no noise comes back, and no batch."""
    resume = bench.trainer.resume
    if resume is None:
        raise Undecided("the adapter gives no resume")
    batches = [bench.zeros(1)] * 8
    sigma = bench.claim.noise_multiplier
    run, released = _observed(
        bench, batches, 80, lambda model, watched, g: resume(model, list(watched), 5, sigma, g), "resume"
    )
    noise = independent(_as_noises(released), alpha)
    if noise.violated:
        return replace(noise, because=f"over a kill and a resume: {noise.because}")
    if run.drawn is None:
        raise Undecided("resume did not say which units were drawn before and after")
    sets = [tuple(np.sort(np.asarray(drawn)).tolist()) for drawn in run.drawn]
    # long enough that chance does not draw the same batch twice: a batch of b of N units has probability q^b (1-q)^(N-b)
    again = [drawn for i, drawn in enumerate(sets) if len(drawn) >= 8 and drawn in sets[:i]]
    if not any(len(drawn) >= 8 for drawn in sets):
        raise Undecided(
            "resume drew no batch of 8 units or more, so that a replayed batch could not be told from chance"
        )
    said = f"{len(again)} of {len(sets)} batches were drawn twice; noise: {noise.because}"
    return Finding(violated=bool(again), because=said, figures={**noise.figures, "replayed": float(len(again))})


def _as_noises(released: Sequence[Tensor]) -> list[Released]:
    if len(released) < 2:
        raise Undecided(f"{len(released)} releases were seen: too few to compare their noise")
    return [Released(tuple(vector.split(probe.SIZES)), len(probe.SIZES)) for vector in released]


# -- the same trainer with a bug: positive controls --


def charged_once(bench: Bench) -> Bench:
    """Everything is charged as one event."""
    train = bench.trainer.train
    if train is None:
        return bench
    return bench.with_trainer(train=lambda *given: replace(train(*given), charged=1))


def gradients_added_again(bench: Bench) -> Bench:
    """Every batch also has the units of the one before."""
    train = bench.trainer.train
    if train is None:
        return bench

    def again(model, batches, sigma, generator):  # type: ignore[no-untyped-def]
        before: list[Tensor] = []
        mixed = []
        for batch in batches:
            mixed.append(torch.cat([*before, batch]))
            before = [batch]
        run, seen = _observed(bench, mixed, 60, lambda m, watched, g: train(m, watched, sigma, g), "train")
        return replace(run, released=seen)

    return bench.with_trainer(train=again)


def bound_follows_data(bench: Bench) -> Bench:
    """What comes after a batch of two or more units is scaled down."""
    train = bench.trainer.train
    if train is None:
        return bench

    def following(model, batches, sigma, generator):  # type: ignore[no-untyped-def]
        given = list(batches)
        run, seen = _observed(bench, given, 60, lambda m, watched, g: train(m, watched, sigma, g), "train")
        factor = 0.8 if len(given[0]) > 1 else 1.0
        return replace(run, released=[vector * (factor if i else 1.0) for i, vector in enumerate(seen)])

    return bench.with_trainer(train=following)


def noise_again(bench: Bench) -> Bench:
    """The second step's noise is the first's."""
    train = bench.trainer.train
    if train is None:
        return bench

    def again(model, batches, sigma, generator):  # type: ignore[no-untyped-def]
        run, seen = _observed(bench, list(batches), 70, lambda m, watched, g: train(m, watched, sigma, g), "train")
        return replace(run, released=[seen[0], *seen[:-1]])

    return bench.with_trainer(train=again)


def resumed_with_its_past(bench: Bench) -> Bench:
    """The last step before the kill is done again, with its noise and its batch."""
    resume = bench.trainer.resume
    if resume is None:
        return bench

    def again(model, batches, stop_after, sigma, generator):  # type: ignore[no-untyped-def]
        act = lambda m, watched, g: resume(m, list(watched), stop_after, sigma, g)  # noqa: E731
        run, seen = _observed(bench, list(batches), 80, act, "resume")
        drawn = list(run.drawn or [])
        return replace(run, released=[*seen, *seen[-1:]], drawn=[*drawn, *drawn[-1:]])

    return bench.with_trainer(resume=again)
