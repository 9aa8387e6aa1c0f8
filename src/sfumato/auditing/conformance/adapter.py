"""What a trainer claims, and the few calls through which it is tested. An adapter is a function that returns a ``Trainer``.

Every call is optional but ``step``: what is not given makes its rows INCONCLUSIVE, with the reason, never CONSISTENT.
``model(inputs)`` of a model that the suite hands over gives one loss per row, shape (B,); a row is a unit. The trainer
trains that model **in place**, with SGD in effect: what the parameters moved by is what the step released. Any fixed
learning rate and any fixed divisor will do; the suite measures the scale.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato import checks
from sfumato.errors import SfumatoError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    Extras = Sequence[Tensor | float] | None
    Step = Callable[[nn.Module, Tensor, float, torch.Generator], Extras]
    StepOfPersons = Callable[[nn.Module, Tensor, Tensor, float, torch.Generator], Extras]
    StepTogether = Callable[[nn.Module, Tensor, float, torch.Generator, int], Extras]
    Sample = Callable[[int, float, int, torch.Generator], Sequence[np.ndarray]]
    Train = Callable[[nn.Module, Iterable[Tensor], float, torch.Generator], "Run"]
    Resume = Callable[[nn.Module, Sequence[Tensor], int, float, torch.Generator], "Run"]
    Accountant = Callable[[float, float, int, float], float]

Adjacency = Literal["add_or_remove", "zero_out", "replace_one"]
Unit = Literal["record", "person", "site"]
Clipping = Literal["flat", "per_layer", "automatic", "adaptive", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the trainer says of itself; the suite holds it to every word.

    Attributes:
      max_grad_norm: C, the L2 bound on one unit's part in a step, over all parameters together.
      noise_multiplier: sigma: the standard deviation of the noise on the sum is sigma C. Of everything that a step releases
        together, if it releases several things.
      clipping: how the bound is kept; "other" is tested too, but not against the slow reference.
      sampling_rate, population, expected_batch_size, steps: q, N, B, T of the run that the claim is about.
      epsilon, delta: what is claimed for that run.
      adjacency, unit: what neighbouring data sets are.
      dtype: the type that the trainer really computes in.
      hardened_noise: it claims to resist attacks on the low bits of floating-point numbers.
    """

    max_grad_norm: float
    noise_multiplier: float
    clipping: Clipping = "flat"
    sampling_rate: float | None = None
    population: int | None = None
    expected_batch_size: float | None = None
    steps: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    adjacency: Adjacency = "add_or_remove"
    unit: Unit = "record"
    dtype: Literal["float32", "float64"] = "float32"
    hardened_noise: bool = False

    def __post_init__(self) -> None:
        checks.positive(max_grad_norm=self.max_grad_norm, noise_multiplier=self.noise_multiplier)
        checks.one_of(("flat", "per_layer", "automatic", "adaptive", "other"), clipping=self.clipping)
        checks.one_of(("add_or_remove", "zero_out", "replace_one"), adjacency=self.adjacency)
        checks.one_of(("record", "person", "site"), unit=self.unit)
        checks.one_of(("float32", "float64"), dtype=self.dtype)
        if self.sampling_rate is not None:
            checks.probability(sampling_rate=self.sampling_rate)
        if self.delta is not None:
            checks.probability(delta=self.delta)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What ``train`` or ``resume`` did.

    Attributes:
      charged: how many Gaussian events were charged for it.
      noise_multiplier: of these events.
      released: what was released, one vector (P,) after another; None where every release is a step of a torch optimizer,
        or one change of the parameters for every batch: then the suite sees it for itself.
      drawn: of ``resume``: the units of every batch that was trained on, in order, before and after the stop.
    """

    charged: int
    noise_multiplier: float
    released: "Sequence[Tensor] | None" = None
    drawn: "Sequence[np.ndarray] | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """A private trainer, as the suite sees it.

    Attributes (g is a torch.Generator; torch's global one of the CPU is seeded too):
      step(model, inputs, noise_multiplier, g): one private step on exactly these units, (B, ...) with B = 0 too; without
        noise where the multiplier is 0. Returns None, or a list of whatever else the step releases (a count, a bound).
      sample(population, sampling_rate, steps, g): the units that each of the steps draws, as arrays of indices.
      train(model, batches, noise_multiplier, g) -> Run: one step for each of the batches, and what is charged for them.
      resume(model, batches, stop_after, noise_multiplier, g) -> Run: the same, but killed after so many steps, with a
        checkpoint of at least one step earlier, and started again from that.
      accountant(noise_multiplier, sampling_rate, steps, delta) -> epsilon: of the claim's adjacency.
      step_of_persons(model, inputs, owner, noise_multiplier, g): rows (R, ...) of persons owner (R,).
      step_together(model, inputs, noise_multiplier, g, processes): one step by so many processes on the same units.
      model(), units(count, g): a model that the trainer is really used on (``model(inputs)`` gives (B,) losses), and
        random inputs for it.
      prepare(inputs): what is done to the data before training.
      lower_bound(members, nonmembers, delta, confidence): the trainer's own audit.
    """

    claim: Claim
    step: "Step"
    name: str = ""
    sample: "Sample | None" = None
    train: "Train | None" = None
    resume: "Resume | None" = None
    accountant: "Accountant | None" = None
    step_of_persons: "StepOfPersons | None" = None
    step_together: "StepTogether | None" = None
    model: "Callable[[], nn.Module] | None" = None
    units: "Callable[[int, torch.Generator], Tensor] | None" = None
    prepare: "Callable[[Tensor], Tensor] | None" = None
    lower_bound: "Callable[[np.ndarray, np.ndarray, float, float], float] | None" = None
    notes: Sequence[str] = field(default=())


def load(target: str) -> Trainer:
    """The trainer that ``module:function`` or ``path/to/file.py:function`` returns.   [shell]

    Raises: UsageError where there is no such thing, it raises, or it returns something else; a missing package goes through.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(
            f"trainer = {target} · must be MODULE:FUNCTION or FILE.py:FUNCTION",
            next="For example my_adapter.py:trainer. docs/conformance.md shows how to write one.",
        )
    try:
        function = getattr(_module(place, target), name, None)
        value: Any = function() if callable(function) else None
    except (SfumatoError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise UsageError(
            f"trainer = {target} · raised {type(error).__name__}: {error}",
            next="Correct the adapter; it must return a Trainer.",
        ) from error
    if not callable(function):
        raise UsageError(f"trainer = {target} · {place} has no function {name}", next="Correct the name.")
    if not isinstance(value, Trainer):
        raise UsageError(
            f"trainer = {target} · returned {type(value).__name__}, not a conformance.Trainer",
            next="Return sfumato.auditing.conformance.Trainer(claim=..., step=...).",
        )
    return value


def _module(place: str, target: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        try:
            found = importlib.util.find_spec(place)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UsageError(f"trainer = {target} · there is no module {place}", next="Give the path of the file.")
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"trainer = {target} · there is no file {path}", next="Correct the path.")
    spec = importlib.util.spec_from_file_location(f"sfumato_audited_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
