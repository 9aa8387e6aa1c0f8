"""What the trainer is really used on: is its loss one unit's, what leaves with the model, what happened before (tests S, L).

Hints from the source are never verdicts: they say where to look.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.auditing.conformance.adapter import Trainer
from sfumato.auditing.conformance.bench import Bench, called
from sfumato.auditing.conformance.outcome import Finding, Undecided

HINTS = {
    "clip_grad_norm_": "clips a gradient that is summed already: row 1",
    "clip_grad_value_": "clips elements of a summed gradient: row 2",
    "manual_seed": "seeds a generator: noise that can be drawn again cancels, row 16",
    "WeightedRandomSampler": "draws units at rates of their own: row 9",
    "BatchNorm1d": "couples units, and keeps averages without noise: rows 6, 14",
    "BatchNorm2d": "couples units, and keeps averages without noise: rows 6, 14",
    "SyncBatchNorm": "couples units, and keeps averages without noise: rows 6, 14",
}
HINTED_ARGUMENTS = {
    "shuffle": "shuffling is not Poisson sampling: row 7",
    "drop_last": "whether there is a step must not depend on who is there: row 10",
}


def _own(bench: Bench, seed: int, count: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """The trainer's model, some units for it, and the same with another last unit."""
    make, units = bench.trainer.model, bench.trainer.units
    if make is None or units is None:
        raise Undecided("the adapter gives no model() and units()")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = called("model", make)
    generator = torch.Generator().manual_seed(bench.seed * 11 + seed)
    inputs, others = (called("units", units, count, generator) for _ in range(2))
    changed = torch.cat([inputs[:-1], others[-1:]])
    if torch.equal(changed, inputs):
        raise Undecided("units() gave the same unit twice: nothing could be changed")
    return model, inputs, changed


def independent_losses(bench: Bench, alpha: float) -> Finding:
    """Row 6: loss and gradient of the other units stay as they are when one unit changes."""
    model, inputs, changed = _own(bench, 1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if names:
        return Finding(
            violated=True, because=f"{', '.join(names)}: batch norm, one unit's outputs depend on the others"
        )
    (losses, gradient), (other_losses, other_gradient) = (_of_others(model, rows) for rows in (inputs, changed))
    moved = max(_relative(losses, other_losses), _relative(gradient, other_gradient))
    limit = 1e-5 if losses.dtype != torch.float64 else 1e-10
    said = f"losses and gradients of three units move by {moved:.3g} of themselves when a fourth changes"
    return Finding(violated=not moved <= limit, because=said, figures={"moved": moved})


def _of_others(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = called("model(inputs)", model, inputs)
    if losses.shape != (len(inputs),):
        raise Undecided(f"model(inputs) is {tuple(losses.shape)}, not one loss per unit, ({len(inputs)},)")
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(losses[:-1].sum(), parameters, allow_unused=True, materialize_grads=True)
    return losses.detach()[:-1], torch.cat([g.flatten() for g in grads])


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def what_leaves(bench: Bench, alpha: float) -> Finding:
    """Row 14: after a step, everything of the model but what is noised is the same for neighbouring data, bit by bit."""
    sigma = bench.claim.noise_multiplier
    states = []
    for which in (0, 1):
        model, *batches = _own(bench, 2)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        inputs = batches[which]
        bench.observe(model, 90, lambda m, g, inputs=inputs: bench.trainer.step(m, inputs, sigma, g))
        states.append({n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items() if n not in trained})
    leaking = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    said = (
        f"{', '.join(leaking)} depends on the data and has no noise"
        if leaking
        else "buffers and frozen weights are the same"
    )
    return Finding(violated=bool(leaking), because=said, figures={"leaking": float(len(leaking))})


def preparation(bench: Bench, alpha: float) -> Finding:
    """Row 21: what one unit is prepared to does not depend on the others."""
    prepare = bench.trainer.prepare
    if prepare is None:
        raise Undecided(
            "the adapter gives no prepare; what happens before training is the boundary that a claim must name"
        )
    if bench.trainer.units is not None:
        generator = torch.Generator().manual_seed(bench.seed * 13 + 3)
        inputs, others = (called("units", bench.trainer.units, 6, generator) for _ in range(2))
        changed = torch.cat([inputs[:-1], others[-1:]])
    else:
        inputs = bench.crowd(6) / 7
        changed = torch.cat([inputs[:-1], -3 * inputs[-1:]])
    before, after = (called("prepare", prepare, rows.clone()) for rows in (inputs, changed))
    if len(before) != len(inputs) or len(after) != len(inputs):
        return Finding(
            violated=True, because=f"{len(before)} of {len(inputs)} units are left: which ones depends on the data"
        )
    moved = _relative(before[:-1].double(), after[:-1].double())
    said = f"prepared units move by {moved:.3g} of themselves when another changes"
    return Finding(violated=not moved <= 1e-7, because=said, figures={"moved": moved})


def hints(trainer: Trainer) -> list[str]:
    """Lines of the adapter's source at which to look; nothing is decided by them."""
    try:
        source = inspect.getsourcefile(trainer.step)  # type: ignore[arg-type]
    except TypeError:
        return []
    if source is None or not Path(source).is_file():
        return []
    found: dict[tuple[int, str], None] = {}
    for node in ast.walk(ast.parse(Path(source).read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in HINTS:
            found[node.lineno, f"{name} {HINTS[name]}"] = None  # type: ignore[attr-defined]
        if isinstance(node, ast.keyword) and node.arg in HINTED_ARGUMENTS:
            if isinstance(node.value, ast.Constant) and node.value.value is True:
                found[node.value.lineno, f"{node.arg}=True: {HINTED_ARGUMENTS[node.arg]}"] = None
    return [f"{Path(source).name}:{line}: {text}" for line, text in sorted(found)]


# -- controls --


class _Coupled(nn.Module):
    """Each loss less the batch's mean."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        losses = self.model(inputs)
        return losses - 0.5 * losses.mean()


def coupled_losses(bench: Bench) -> Bench:
    make = bench.trainer.model
    return bench if make is None else bench.with_trainer(model=lambda: _Coupled(make()))


def a_buffer_with_data(bench: Bench) -> Bench:
    """The batch's mean stays in a buffer."""
    make, step = bench.trainer.model, bench.trainer.step
    if make is None:
        return bench

    def model() -> nn.Module:
        module = make()
        module.register_buffer("running_mean_of_the_data", torch.zeros(()))
        return module

    def leaking(module: nn.Module, inputs: Tensor, sigma: float, generator: torch.Generator):  # type: ignore[no-untyped-def]
        extras = step(module, inputs, sigma, generator)
        module.running_mean_of_the_data = inputs.double().mean()
        return extras

    return bench.with_trainer(model=model, step=leaking)


def centred(bench: Bench) -> Bench:
    """The data's mean is taken off."""
    prepare: Callable[[Tensor], Tensor] | None = bench.trainer.prepare
    if prepare is None:
        return bench
    return bench.with_trainer(prepare=lambda inputs: prepare(inputs) - inputs.double().mean().to(inputs.dtype) / 8)
