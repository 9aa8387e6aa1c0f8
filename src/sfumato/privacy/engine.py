"""``DifferentialPrivacyEngine``: makes any torch optimizer release only clipped, summed and noised gradients.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.1)
    engine.attach(optimizer)

One step (Abadi et al. 2016, Algorithm 1, arXiv:1607.00133): the ledger reserves the event; units are drawn by Poisson
sampling; one backward pass records what the per-unit gradients are made of; each unit's gradient, over all parameters
and all its rows, is scaled down to norm C; their sum plus N(0, (sigma C)^2) is divided by the expected batch size and
becomes ``.grad``; the optimizer, whichever it is, does the rest.

Shapes: R rows, B units. Rows convention: every protected layer sees the rows as its leading dimension.

With several processes (``torch.distributed``; docs/processes.md) the step is that of one process: see ``processes`` for
who draws whom, and ``reduction`` for the sum and the noise.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.adaptive import AdaptiveClip
from sfumato.privacy.chance import LossChance
from sfumato.privacy.charging import Charges
from sfumato.privacy.correlated import check_memory
from sfumato.privacy.discrete import source_named
from sfumato.privacy.draws import STATE_FORMAT, Draws
from sfumato.privacy.gradients.arithmetic import exact
from sfumato.privacy.gradients.bookkeeping import Layer, Tape
from sfumato.privacy.gradients.clipping import clipped_sums
from sfumato.privacy.gradients.groups import WHOLE, Part, Partition, listed, parts_of
from sfumato.privacy.gradients.terms import Sums, Term, Units
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.not_private import NotPrivateEngine as NotPrivateEngine
from sfumato.privacy.passes import Passes
from sfumato.privacy.plan import DpSgd, NotPrivate, TrainingPlan
from sfumato.privacy.processes import Processes, is_sharded, sharding_problem, wrapper_problem
from sfumato.privacy.reduction import Reduction
from sfumato.privacy.sampling import truncated_poisson_units
from sfumato.privacy.settings import NoiseSource
from sfumato.privacy.sources import PhysicalPart
from sfumato.privacy.step_noise import Block, Independent, StepNoise
from sfumato.privacy.watch import Gradients, Watch, left_alone
from sfumato.randomness import Random
from sfumato.records import Batch

Clipping = Literal["flat", "per_layer", "automatic", "adaptive"]


class DifferentialPrivacyEngine(Draws):
    """Differentially private training of one model with one optimizer, or with one for each of its parts.

    Guarantee: what ``optimizer.step()`` does to the parameters, over all steps together, is (epsilon, delta)-private
    for adding or removing one unit, with ``get_epsilon(delta)``; provided that the batches are Poisson-sampled
    (``engine.batches`` does that; in a hand-written loop it is the loop's promise) and that the loss is one loss per
    unit, each from that unit's rows alone. Buffers that a forward pass changes are not protected and therefore refused;
    so is a frozen parameter that changes.

    Args:
      max_grad_norm: C, the bound on a unit's gradient, over all parameters together.
      noise_multiplier: sigma; the noise has standard deviation sigma C. 0 is no noise: epsilon is infinite.
      expected_batch_size, sampling_rate: B and q; for hand-written loops. ``batches`` finds them itself.
      loss_reduction: how the loop makes one number of its losses: their "mean" or their "sum".
      clipping: "flat", one clip; "per_layer", each of L layers to C / sqrt(L), so that together they keep C;
        "automatic", AUTO-S, every gradient normalised to about C; "adaptive" (or an ``AdaptiveClip``), C follows a
        quantile of the norms from ``max_grad_norm`` on, and sigma pays for the counting too.
      parts: parts of the model with a bound each, in place of ``max_grad_norm``, and with a noise multiplier each or
        ``noise_multiplier`` for all together (gradients/groups.py). A trainable parameter in no part is refused.
      bands: b > 1: correlated noise over b steps, with units in b groups drawn in turn (``correlated``). For ``engine.batches``
        alone, of which every call begins a new block: a cycle of b steps is one event, charged whole at its first step.
      noise_source: "gaussian", or "discrete": drawn exactly on the integers (``discrete``).
      ledger: writes every event durably before the data is touched.
      random: where sampling and noise come from; SecretRandom, unless it is a test.
      processes: who trains this model together; all that ``torch.distributed`` knows, if it is initialised. Then the
        batch size and the rate are those of all together, and process 0 alone has a ledger.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float | None = None,
        noise_multiplier: float | None = None,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        clipping: Clipping | AdaptiveClip = "flat",
        parts: Mapping[str, Part] | None = None,
        bands: int = 1,
        noise_source: NoiseSource = "gaussian",
        ledger: Ledger | None = None,
        random: Random | None = None,
        plan: DpSgd | None = None,
        processes: Processes | None = None,
    ) -> None:
        problem = wrapper_problem(model)
        if problem is not None:
            raise UnsupportedLayer(f"model = {type(model).__name__} · {problem}", next="Give the engine such a module.")
        checks.one_of(("mean", "sum"), loss_reduction=loss_reduction)
        self._adaptive = AdaptiveClip() if clipping == "adaptive" else None
        if isinstance(clipping, AdaptiveClip):
            self._adaptive, clipping = clipping, "adaptive"
        checks.one_of(("flat", "per_layer", "automatic", "adaptive"), clipping=clipping)
        if self._adaptive is not None and parts is not None:
            raise UsageError("clipping = adaptive · follows one bound, but parts have several", next="Use 'flat'.")
        super().__init__(model, plan, ledger, random, processes)
        if expected_batch_size is not None:
            checks.positive(expected_batch_size=expected_batch_size)
            self._expected_batch_size = float(expected_batch_size)
        if sampling_rate is not None:
            checks.probability(sampling_rate=sampling_rate)
            checks.positive(sampling_rate=sampling_rate)
            self._sampling_rate = float(sampling_rate)
        checks.positive(bands=bands)
        if bands > 1 and self._adaptive is not None:
            raise UsageError(
                f"bands = {bands}, clipping = adaptive · correlated noise needs one bound for all steps",
                next="Use 'flat'.",
            )
        if bands > 1 and plan is not None and plan.adjacency == "replace_one":
            raise UsageError(
                f"bands = {bands}, adjacency = replace_one · correlated noise is proved for add_or_remove and zero_out",
                next="Choose one of these, or bands = 1.",
            )
        self.bands = int(bands)
        self._source = source_named(noise_source)
        self._noise: StepNoise = Independent(self._source, self.random)
        self._largest_batch = plan.largest_batch if plan is not None else None
        self._block: Block | None = None  # of correlated noise
        self._draws_left = 0
        self._variances: dict[nn.Parameter, float] = {}  # of what was released last
        self.loss_reduction = loss_reduction
        self.clipping: Clipping = clipping
        self.non_finite = 0  # units whose gradient was not finite, so far, in all processes; internal, never released
        self._non_finite_here = 0  # since the last step, in this process
        self._charges = Charges(ledger, self.processes)
        self._reductions: dict[str, Reduction] = {}  # for each optimizer
        self._count = 0.0  # of the batch: the sum of 1[norm <= C] - 1/2
        self._checked_all_recorded: set[str] = set()
        self._watch: Watch | None = None  # since the batch was drawn, or its first layer called
        self._tape = Tape(model)
        self._tape.on_first_call = self._watch_hand_written
        self._gradients = Gradients(model)
        self._passes = Passes(self._tape, self._trainable)
        self._loss_chance = LossChance(model, self.random)
        try:
            if not self._tape.layers:
                raise UsageError("model · has no trainable parameter", next="Unfreeze what should be trained.")
            self._refuse_other_sharding()
            self._partition = Partition(
                self._tape.layers,
                model,
                parts=parts,
                max_grad_norm=max_grad_norm,
                noise_multiplier=noise_multiplier,
                clipping=clipping,
            )
            # what an event says; for parts, sigma is what it was given as, not what the roundings of its shares make
            self.noise_multiplier = float(
                self._partition.noise_multiplier if noise_multiplier is None else noise_multiplier
            )
            self._initial_bound = self._partition.max_grad_norm
            self._share_noise()
            if bands > 1:
                check_memory(bands, sum(p.numel() for p in self._tape.parameters))
        except Exception:
            self._tape.detach()
            raise

    @classmethod
    def from_plan(
        cls,
        model: nn.Module,
        plan: DpSgd,
        *,
        ledger: Ledger | None = None,
        random: Random | None = None,
        processes: Processes | None = None,
    ) -> "DifferentialPrivacyEngine":
        """The engine that does what the plan says."""
        if plan.max_grad_norm == "estimated":
            raise UsageError(
                "max_grad_norm = estimated · is not known yet",
                next="Find it with norms.estimated_bound, and give the engine replace(plan, max_grad_norm=...).",
            )
        return cls(
            model,
            max_grad_norm=None if plan.parts else plan.max_grad_norm,
            noise_multiplier=plan.noise_multiplier,
            clipping=plan.clipping,
            parts=parts_of(plan),
            bands=plan.bands,
            noise_source=plan.noise,
            ledger=ledger,
            random=random,
            plan=plan,
            processes=processes,
        )

    @property
    def max_grad_norm(self) -> float:
        """The bound on a unit's gradient over everything; where clipping is adaptive, that of the next step."""
        return self._partition.max_grad_norm

    def noise_variance(self, parameter: nn.Parameter) -> float:
        """Of the noise on each coordinate of the parameter's ``.grad``: of the last step, or before it of the first."""
        if parameter not in self._variances:
            part = self._partition.part_of[parameter]
            return self._noise.variance(part.noise_std(self._noise)) / (self._expected_batch_size or 1.0) ** 2
        return self._variances[parameter]

    def detach(self) -> None:
        super().detach()
        self._tape.detach()
        self._loss_chance.give_back()

    def get_epsilon(self, delta: float, accountant: str = "pld") -> float:
        """An upper bound on the epsilon spent so far, at ``delta``: by the ledger if there is one, else by our count.

        Raises: UsageError where the sampling rate is not known, or the accountant does not apply.
        """
        if self._sampling_rate is None and not self._charges.in_a_ledger:
            raise UsageError(
                "sampling_rate = None · is needed to say what a step costs",
                next="Use engine.batches(dataset, expected_batch_size=, steps=), or give the engine "
                "expected_batch_size= and sampling_rate= (batch size / number of units).",
            )
        adjacency = self.plan.adjacency if isinstance(self.plan, DpSgd) else "add_or_remove"
        value = accounting.epsilon(self._charges.spent, delta, accountant, adjacency)
        if value is None:
            raise UsageError(
                f"accountant = {accountant!r} · has no bound for Poisson-sampled steps", next="Use 'pld' or 'rdp'."
            )
        return value

    @property
    def spent(self) -> list[Event]:
        """Everything charged so far: by the ledger if there is one (process 0 tells the others), else by our count."""
        return list(self._charges.spent)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, up to where the ledger had come, whether chance came from a test source, and (adaptive clipping) the
        bound of the next step. Never the noise, never which units were drawn."""
        return {
            "format": STATE_FORMAT,
            "steps_started": self.steps_started,
            "for_release": self.for_release,
            **self._charges.state(),
            **({"max_grad_norm": self.max_grad_norm} if self._adaptive is not None else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the count of a stopped run. Raises LedgerError if the state is newer than the ledger."""
        keys = {"format", "steps_started", "events", "ledger_sequence"}
        keys |= {"max_grad_norm"} if self._adaptive is not None else set()
        if set(state) - {"ledger_position", "for_release"} != keys or state["format"] != STATE_FORMAT:
            raise UsageError(
                f"state = {sorted(state)} · must have {sorted(keys)} in format {STATE_FORMAT}",
                next="Give what engine.state_dict() returned.",
            )
        self._charges.load(state)
        self.steps_started = int(state["steps_started"])
        self._continue_chance(state)
        if self._adaptive is not None:
            checks.positive(max_grad_norm=state["max_grad_norm"])
            self._partition.parts[0].max_grad_norm = float(state["max_grad_norm"])

    def check_independence(self, losses: Callable[[Batch], Tensor], batch: Batch) -> None:
        """Raises UnsupportedLayer when one unit's loss or gradient moves with another unit's data, naming the layer.

        Args: losses: batch -> (B,); batch: at least two units. Chance inside ``losses`` is repeated from torch's seed.
        """
        from sfumato.privacy.gradients.reference import find_coupling

        if any(is_sharded(p) for p in self.model.parameters()):
            raise UsageError(
                "check_independence · looks at gradients of whole parameters, and these are sharded",
                next="Check the model before fully_shard is applied to it.",
            )
        self._tape.enabled = False
        try:
            with left_alone(self.model):
                found = find_coupling(self.model, losses, batch)
        finally:
            self._tape.enabled = True
        if found is not None:
            raise UnsupportedLayer(
                f"{found} · one unit's gradient changes with another unit's data, so there is no per-unit gradient",
                next="Use layers that treat rows alone (GroupNorm, LayerNorm) and a loss of one unit at a time.",
            )

    # -- one step, in the order of the module's text --

    def _steps_left(self) -> int:
        """A cycle of correlated noise that was begun is spent whole."""
        if not isinstance(self.plan, DpSgd):
            return super()._steps_left()
        if self.ledger is not None and self.ledger.plan is not None:
            return self.plan.steps_left(self.ledger.remaining(self.plan.event(1)))
        return self.plan.steps_left(self.plan.event().count - self._charges.count)

    def _begin_draws(self, steps: int) -> None:
        self._draws_left, self._block = steps, None

    def _renew_chance(self) -> None:
        self._loss_chance.renew()

    def _end_draws(self) -> None:
        self._loss_chance.give_back()

    def _event(self) -> Event:
        """What is charged at once: a step; with bands, a cycle."""
        assert self._sampling_rate is not None
        if isinstance(self.plan, DpSgd):
            return self.plan.event(1)
        return Event(sampling_rate=self.bands * self._sampling_rate, noise_multiplier=self.noise_multiplier)

    def _reserve(self, ahead: int) -> int | None:
        """Returns: what to commit when this step is done: of a cycle, with its last step."""
        if self._block is None:
            return self._charge(self.steps_started, ahead)
        if self._block.begins_cycle:
            before = self._charges.count
            self._block.sequence = self._charge(before, -(-ahead // self.bands))
        else:
            self.steps_started += 1
        return self._block.sequence if self._block.ends_cycle else None

    def _draw_units(self, num_units: int) -> np.ndarray:
        assert self._sampling_rate is not None
        if self._block is not None:
            return self._block.units(num_units, self.bands * self._sampling_rate)
        if self._largest_batch is not None:
            return truncated_poisson_units(num_units, self._sampling_rate, self._largest_batch, self.random)
        return super()._draw_units(num_units)

    def _charge(self, number: int, ahead: int) -> int | None:
        sequence = self._charges.charge(self._event(), number, ahead)
        self.steps_started += 1
        return sequence

    def _join(self, part: str) -> None:
        if self.bands > 1 and part != WHOLE:
            raise UsageError(
                f"bands = {self.bands} · with an optimizer for each part: a batch may step one and not the other, and their "
                "noise would be of different steps",
                next="Use one optimizer for all parts, or bands=1.",
            )
        super()._join(part)
        if self.processes.together:
            self._charges.join()
        if self._expected_batch_size is not None and self._sampling_rate is not None:  # a hand-written loop may follow
            self._renew_chance()
        layers = [layer for layer in self._tape.layers if part == WHOLE or self._partition.owner(layer).name == part]
        self._reductions[part] = Reduction(layers, self.processes)

    def _public_settings(self) -> dict[str, Any]:
        bounds = {part.name: (part.bound, part.std) for part in self._partition.parts}
        return {
            **super()._public_settings(),
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "clipping": self._adaptive or self.clipping,
            "bands": self.bands,
            "noise_source": self._source.name,
            "loss_reduction": self.loss_reduction,
            "parts": bounds,
            "trained": list(self._tape.parameters.values()),
        }

    def _set_rate(self, expected_batch_size: float | None, num_units: int) -> None:
        super()._set_rate(expected_batch_size, num_units)
        assert self._sampling_rate is not None
        checks.probability(
            sampling_rate=self.bands * self._sampling_rate,
            next=f"Each of the {self.bands} groups must hold a batch: take fewer bands, or smaller batches.",
        )
        self._check_truncation(num_units)
        self._share_noise()

    def _check_truncation(self, num_units: int) -> None:
        if self._largest_batch is None:
            return
        if self.processes.together:
            raise UsageError(
                f"largest_batch = {self._largest_batch} · in {self.processes.size} processes, each of which knows its own "
                "units only",
                next="Train in one process, or leave out largest_batch.",
            )
        assert self.plan is not None
        if num_units != self.plan.population:
            raise UsageError(
                f"population = {self.plan.population} · truncated sampling is accounted for exactly so many units, and the data "
                f"set has {num_units}",
                next="Give the plan the true number, which is public then.",
            )

    def _share_noise(self) -> None:
        """Adaptive clipping: what of sigma is left for the gradient. Raises PrivacyRefused before anything is charged."""
        if self._adaptive is not None and self._expected_batch_size is not None:
            self._partition.parts[0].noise_multiplier = self._adaptive.gradient_noise_multiplier(
                self.noise_multiplier, self._expected_batch_size
            )

    def _begin(self) -> None:
        if self.bands > 1:
            if self._block is None:  # the first step of engine.batches, or the first after an error in a step
                self._noise = self._block = Block(self.bands, self._draws_left, self._source, self.random)
            self._block.begin_step()
        self._draws_left -= 1
        self._forget_sums()
        self._watch = Watch(self.model)

    def _watch_hand_written(self) -> None:
        """In a hand-written loop a step begins with the first layer that is called."""
        if not self._draws_batches:
            if (
                self._watch is not None and self._part is not None
            ):  # of a batch whose first micro-batch was added already
                self._watch.require_process()
            self._watch = Watch(self.model)

    def _forget_sums(self) -> None:
        """Before a new batch; now and then also a look at whether all processes have the same parameters still."""
        for reduction in self._reductions.values():
            reduction.clear()
        self._count = 0.0
        if self.steps_started & (self.steps_started - 1) == 0 or self.steps_started % 128 == 0:
            self.processes.require_equal({name: p for p, name in self._tape.parameters.items()})

    def _expect(self, part: PhysicalPart) -> None:
        self._tape.clear()
        self._tape.give_units(part.units)

    def _require_stepped(self) -> None:
        if self._watch is not None:
            self._watch.require_process()
        skipped = self._part is not None and self._draws_batches and not self._part.stepped
        if self._tape.has_records or skipped:
            self._tape.clear()
            self._part = None
            raise UsageError(
                "optimizer.step() · was not called for a batch that was drawn and charged: whether there is noise must not "
                "depend on who is in it",
                next="Step once for every batch or part, also for an empty one (its loss may be anything) and for one "
                "whose loss is not finite (such gradients count as zero).",
            )
        if self._part is not None and self._part.stepped and self._part.last:
            self._commit(self._part)  # of several optimizers, not all were stepped

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.processes.agreeing():
            name = self._check_step(optimizer, args, kwargs)
        part = self._part if self._draws_batches else self._hand_written_part()
        assert part is not None
        part.stepped.add(name)
        try:
            with torch.no_grad(), exact(next(iter(self._tape.parameters)).device):
                self._add(part, name)
                for parameter in self._parameters_of(name):
                    parameter.grad = None
                if part.last:
                    self._release(name)
        except BaseException:
            self._give_up(part)
            raise

    def _give_up(self, part: PhysicalPart) -> None:
        """After an error in a step: what was added up of its batch may be half a batch, and is for nobody. It stays spent."""
        self._tape.clear()
        for reduction in self._reductions.values():
            reduction.clear()
        self._count = 0.0
        self._block = None  # some of its noise was taken, some not
        part.stepped.update(self._optimizers)  # no second try with the same batch
        if not self._draws_batches:
            self._part = None

    def _check_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Returns: which part the optimizer trains."""
        if any(x is not None for x in args[1:]) or kwargs.get("closure") is not None:  # args[0] is the optimizer
            raise UsageError(
                f"{type(optimizer).__name__}.step(closure) · would compute gradients that are not protected",
                next="Call backward() before, and step() without a closure.",
            )
        self._passes.require_step_allowed()
        if self._watch is not None:
            self._watch.require_process()
        name = next(name for name, held in self._optimizers.items() if held is optimizer)
        self._check_optimizer(optimizer, name)
        if self._tape.rows != 0:  # the gradients of no rows are zero
            self._gradients.check(self._tape, optimizer)
        if not self._draws_batches:
            self._check_hand_written()
        elif self._part is None or name in self._part.stepped:
            raise PrivacyRefused(
                "optimizer.step() · without a batch of its own: every step is charged, and every batch is for one step",
                next="Step once for every batch that engine.batches gives.",
                code="step_without_batch",
            )
        self._loss_chance.require_unseeded()
        return name

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = self._part
        with self.processes.agreeing():
            if self._watch is not None:
                self._watch.check_step()
        if part is not None and part.last and len(part.stepped) == len(self._optimizers):
            self._commit(part)
        if not self._draws_batches:
            self._renew_chance()
            if part is not None and part.last:
                self._part = None

    def _commit(self, part: PhysicalPart) -> None:
        if part.sequence is not None:
            self._charges.commit(part.sequence)
            part.sequence = None

    def _check_hand_written(self) -> None:
        if self.bands > 1 or self._largest_batch is not None:
            raise UsageError(
                f"bands = {self.bands}, largest_batch = {self._largest_batch} · are about who is drawn, and a hand-written loop "
                "draws itself",
                next="Use engine.batches(dataset, expected_batch_size=, steps=).",
            )
        if self._expected_batch_size is None or self._sampling_rate is None:
            raise UsageError(
                f"expected_batch_size = {self._expected_batch_size}, sampling_rate = {self._sampling_rate} · "
                "must be known before a step",
                next="Use engine.batches(dataset, expected_batch_size=, steps=), or give the engine "
                "expected_batch_size= and sampling_rate= (batch size / number of units).",
            )
        if len(self._optimizers) > 1:
            raise UsageError(
                f"optimizer.step() · a hand-written loop with {len(self._optimizers)} optimizers does not say which "
                "steps are of one batch",
                next="Use engine.batches(dataset, expected_batch_size=, steps=).",
            )
        if not self._tape.has_records and self._tape.rows != 0:
            raise UsageError(
                "optimizer.step() · no backward() came before it", next="Call loss.backward() before optimizer.step()."
            )

    def _hand_written_part(self) -> PhysicalPart:
        """The rows of a loop over the user's own loader. The step is charged before anything of it is summed, noised or
        released, but after the loop's own backward pass: only ``engine.batches`` charges before the data is touched."""
        more = self._passes.accumulating
        if self._part is not None and not self._part.last:  # of a batch that was charged with its first micro-batch
            sequence = self._part.sequence
        else:
            self._forget_sums()
            sequence = self._reserve(1)  # nobody knows how many more will come
        self._part = PhysicalPart(None, False, not more, sequence)
        return self._part

    def _add(self, part: PhysicalPart, name: str) -> None:
        """Adds the clipped gradients of a physical part to the sum of its batch."""
        with self.processes.agreeing():
            layers, terms, units = self._taken(part, name)
        reduction = self._reductions[name]
        if layers:
            device = layers[0].parameters[0].device
            scale = part.scale(units, self.loss_reduction).to(device)
            clips, group_of = self._partition.clips(layers)

            def give(number: int, sums: Sums) -> None:
                for parameter, value in sums.items():
                    reduction.add(parameter, value)
                reduction.layer_done(layers[number])

            clipped = clipped_sums(terms, units.to(device), scale, clips, group_of, give)
            self._non_finite_here += clipped.non_finite
            if self._adaptive is not None:
                self._count += self._adaptive.count(clipped.norms[0], self.max_grad_norm)
        reduction.part_done()

    def _taken(self, part: PhysicalPart, name: str) -> tuple[list[Layer], list[list[Term]], Units]:
        """What the backward pass of a physical part has left, checked."""
        layers, terms, rows = self._tape.take()
        if self._watch is not None:
            self._watch.check_forward()
        units = part.units if part.units is not None else Units(None, rows)
        if not layers and units.num_rows:
            raise UsageError(
                "optimizer.step() · no backward() came before it, though the batch has rows",
                next="Call losses.mean().backward() before optimizer.step().",
            )
        others = [str(layer) for layer in layers if name and self._partition.owner(layer).name != name]
        if others:
            raise UsageError(
                f"{type(self._optimizers[name]).__name__}.step() · is for part {name}, but {listed(others)} took part in "
                "backward()",
                next=f"Put forward, backward() and step() into `with engine.training({name!r}):`.",
            )
        if layers and rows:
            self._check_all_recorded(name, {p for group in terms for term in group for p in term.parameters})
        return layers, terms, units

    def _release(self, name: str) -> None:
        """.grad = (sum + noise) / expected batch size + what is public. Then the sum is dropped."""
        assert self._expected_batch_size is not None
        size, parameters = self._expected_batch_size, self._parameters_of(name)
        stds = {parameter: self._partition.part_of[parameter].noise_std(self._noise) for parameter in parameters}
        self._variances |= {parameter: self._noise.variance(std) / size**2 for parameter, std in stds.items()}
        public = self._passes.take_public(parameters, self.processes)
        for parameter, gradient in self._reductions[name].released(stds, size, self._noise):
            self._gradients.write(parameter, gradient + public[parameter] if parameter in public else gradient)
        here, count = self.processes.total([self._non_finite_here, self._count])
        self.non_finite, self._non_finite_here = self.non_finite + int(here), 0
        if self._adaptive is not None:
            part = self._partition.parts[0]
            std = self._source.widened(self._adaptive.count_std(self.noise_multiplier, size), 0.5, 1)
            total = torch.tensor([count], dtype=torch.float64)
            noisy = self.processes.decide(lambda: float(self._source.draw(1, std, self.random, total)))
            part.max_grad_norm = self._adaptive.next_bound(part.max_grad_norm, noisy, size, self._initial_bound)

    def _parameters_of(self, part: str) -> Iterable[nn.Parameter]:
        return list(self._tape.parameters if part == WHOLE else self._partition.named(part).parameters)

    def _names_of(self, optimizer: torch.optim.Optimizer, part: str) -> dict[int, str]:
        if part == WHOLE:
            return super()._names_of(optimizer, part)
        return {id(p): name for p, name in self._partition.named(part).parameters.items()}

    # -- what must never pass in silence --

    def _check_all_recorded(self, part: str, recorded: set[nn.Parameter]) -> None:
        """At the first step with rows: a parameter that no layer used would only ever receive noise."""
        if part not in self._checked_all_recorded:
            names = self._tape.parameters
            missing = [names[p] for p in self._parameters_of(part) if p.requires_grad and p not in recorded]
            if missing:
                raise UsageError(
                    f"{listed(missing)} · took no part in the loss, and would receive noise alone",
                    next="Use it in the loss, or freeze it with requires_grad_(False).",
                )
            self._checked_all_recorded.add(part)

    def _refuse_other_sharding(self) -> None:
        problems = sharding_problem(self.model, self.processes)
        if problems:
            raise UnsupportedLayer(
                f"{len(problems)} parameters are split in a way that is not supported: {'; '.join(problems[:20])}",
                next="Use torch.distributed.fsdp.fully_shard over one mesh of all processes, and no other parallelism.",
            )


def make_engine(
    model: nn.Module,
    plan: TrainingPlan,
    ledger: Ledger | None = None,
    random: Random | None = None,
    processes: Processes | None = None,
) -> DifferentialPrivacyEngine | NotPrivateEngine:
    """The engine that a plan asks for; one loop serves both."""
    match plan:
        case DpSgd():
            return DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=random, processes=processes)
        case NotPrivate():
            return NotPrivateEngine.from_plan(model, plan, random=random, processes=processes)
