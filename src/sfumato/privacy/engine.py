"""``DifferentialPrivacyEngine``: makes any torch optimizer release only clipped, summed and noised gradients.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.1)
    engine.attach(optimizer)

One step (Abadi et al. 2016, Algorithm 1, arXiv:1607.00133): the ledger reserves the event; units are drawn by Poisson
sampling; one backward pass records what the per-unit gradients are made of; each unit's gradient, over all parameters
and all its rows, is scaled down to norm C; their sum plus N(0, (sigma C)^2) is divided by the expected batch size and
becomes ``.grad``; the optimizer, whichever it is, does the rest.

Shapes: R rows, B units. Rows convention: every protected layer sees the rows as its leading dimension.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import BudgetExhausted, PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.adaptive import AdaptiveClip
from sfumato.privacy.attached import Attached
from sfumato.privacy.drawing import Part, Source, source_of
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.clipping import clipped_sums
from sfumato.privacy.gradients.groups import WHOLE, Partition, listed, parts_of
from sfumato.privacy.gradients.groups import Part as ModelPart
from sfumato.privacy.gradients.terms import Units
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.noise import gaussian, widened
from sfumato.privacy.passes import Passes
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.privacy.sampling import physical_parts, poisson_units
from sfumato.privacy.watch import Gradients, Watch
from sfumato.randomness import Random, SecretRandom
from sfumato.records import Batch

Clipping = Literal["flat", "per_layer", "automatic", "adaptive"]
STATE_FORMAT = 1


class _Engine(Attached):
    """What the private and the ordinary engine share: drawing batches, and following the optimizer's steps."""

    def __init__(
        self, model: nn.Module, plan: PrivacyPlan | None, ledger: Ledger | None, random: Random | None
    ) -> None:
        super().__init__(model)
        self.plan = plan
        self.ledger = ledger
        self.random: Random = random if random is not None else SecretRandom()
        self.stopped: Literal["budget", "steps"] | None = None
        self.steps_started = 0  # draws, each of them charged, over all attempts that the state knows of
        self._expected_batch_size: float | None = plan.expected_batch_size if plan is not None else None
        self._sampling_rate: float | None = plan.sampling_rate if plan is not None else None

    @property
    def for_release(self) -> bool:
        """False if chance comes from a test source: nothing made with it may be released."""
        return self.random.for_release

    def batches(
        self,
        dataset: Any,
        *,
        expected_batch_size: float | None = None,
        steps: int | None = None,
        unit: Sequence[Any] | None = None,
        max_physical_batch_size: int | None = None,
        records_per_unit: int | None = None,
    ) -> Iterator[Any]:
        """Draws ``steps`` batches by Poisson sampling over units; each is charged before its data is touched.

        Ends early, with ``engine.stopped == "budget"``, when the ledger has no room for another step.

        Args:
          dataset: a ``UnitTable`` (yields ``Batch``), or any dataset with a length and an index (yields its items,
            collated; then the loss is a mean over rows).
          expected_batch_size: B, in units, a public constant; the sampling rate is B / number of units, which is
            thereby declared public. Both come from the plan, if there is one.
          unit: for an ordinary dataset, whose item i is: one name per item. Left out, every item is a unit.
          max_physical_batch_size: at most so many units at once; a batch then comes in parts (``Batch.last`` marks the
            final one). Run the whole loop body for every part: ``optimizer.step()`` adds up, and steps on the last.
          records_per_unit: at most so many rows of a unit take part in a step (1 without a plan).
        """
        source = source_of(dataset, unit)
        self._set_rate(expected_batch_size, source.num_units)
        limit = records_per_unit
        if self.plan is not None:
            if limit not in (None, self.plan.records_per_unit):
                raise UsageError(
                    f"records_per_unit = {limit} · the plan says {self.plan.records_per_unit}",
                    next="Leave it to the plan.",
                )
            limit = self.plan.records_per_unit
        if steps is None:
            steps = self._steps_left()
        checks.non_negative(steps=steps)
        if max_physical_batch_size is not None:
            checks.positive(max_physical_batch_size=max_physical_batch_size)
        self._check_attached(max_physical_batch_size)
        self._draws_batches = True
        return self._draw(source, int(steps), max_physical_batch_size, 1 if limit is None else int(limit))

    def _draw(self, source: Source, steps: int, max_physical: int | None, limit: int) -> Iterator[Any]:
        assert self._sampling_rate is not None
        self.stopped = None
        for _ in range(steps):
            self._require_stepped()
            self._begin()
            try:
                sequence = self._reserve()
            except BudgetExhausted:
                self.stopped = "budget"
                return
            units = poisson_units(source.num_units, self._sampling_rate, self.random)
            parts = physical_parts(units, max_physical)
            for i, part in enumerate(parts):
                self._require_stepped()
                last = i == len(parts) - 1
                batch, grouping = source.rows(part, limit, self.random, last)
                self._part = Part(grouping, source.loss_is_over_rows, last, sequence)
                self._expect(self._part)
                yield batch
        self._require_stepped()
        self.stopped = "steps"

    def _set_rate(self, expected_batch_size: float | None, num_units: int) -> None:
        if expected_batch_size is not None:
            checks.positive(expected_batch_size=expected_batch_size)
            if self._expected_batch_size is not None and self._expected_batch_size != expected_batch_size:
                raise UsageError(
                    f"expected_batch_size = {expected_batch_size} · the engine has {self._expected_batch_size} already",
                    next="Say it in one place.",
                )
            self._expected_batch_size = float(expected_batch_size)
        if self._expected_batch_size is None:
            raise UsageError(
                "expected_batch_size = None · must be a public constant, the mean number of units in a batch",
                next="Give engine.batches(dataset, expected_batch_size=..., steps=...).",
            )
        if self._sampling_rate is None:
            if num_units < 1:
                raise UsageError("dataset · has no units to draw from", next="Give a dataset with records.")
            rate = self._expected_batch_size / num_units
            checks.probability(sampling_rate=rate, next="Make expected_batch_size at most the number of units.")
            self._sampling_rate = rate

    def _steps_left(self) -> int:
        if self.plan is None:
            raise UsageError("steps = None · must be given without a plan", next="Give steps=1_000, for example.")
        return max(0, self.plan.steps - self.steps_started)

    def _require_stepped(self) -> None:
        """Hook: raises if the batch just yielded went backward, but not through optimizer.step()."""

    def _begin(self) -> None:
        """Hook: a new draw begins."""

    def _expect(self, part: Part) -> None:
        """Hook: a part is about to be yielded."""

    def _reserve(self) -> int | None:
        raise NotImplementedError


class DifferentialPrivacyEngine(_Engine):
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
      ledger: writes every event durably before the data is touched.
      random: where sampling and noise come from; SecretRandom, unless it is a test.
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
        parts: Mapping[str, ModelPart] | None = None,
        ledger: Ledger | None = None,
        random: Random | None = None,
        plan: DpSgd | None = None,
    ) -> None:
        checks.one_of(("mean", "sum"), loss_reduction=loss_reduction)
        self._adaptive = AdaptiveClip() if clipping == "adaptive" else None
        if isinstance(clipping, AdaptiveClip):
            self._adaptive, clipping = clipping, "adaptive"
        checks.one_of(("flat", "per_layer", "automatic", "adaptive"), clipping=clipping)
        if self._adaptive is not None and parts is not None:
            raise UsageError("clipping = adaptive · follows one bound, but parts have several", next="Use 'flat'.")
        super().__init__(model, plan, ledger, random)
        if expected_batch_size is not None:
            checks.positive(expected_batch_size=expected_batch_size)
            self._expected_batch_size = float(expected_batch_size)
        if sampling_rate is not None:
            checks.probability(sampling_rate=sampling_rate)
            checks.positive(sampling_rate=sampling_rate)
            self._sampling_rate = float(sampling_rate)
        self.loss_reduction = loss_reduction
        self.clipping: Clipping = clipping
        self.non_finite = 0  # units whose gradient was not finite, so far; internal, never released
        self._events: list[Event] = []
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._count = 0.0  # of the batch: the sum of 1[norm <= C] - 1/2
        self._checked_all_recorded: set[str] = set()
        self._watch: Watch | None = None  # since the batch was drawn
        self._tape = Tape(model)
        self._gradients = Gradients(model)
        self._passes = Passes(self._tape, self._trainable)
        try:
            if not self._tape.layers:
                raise UsageError("model · has no trainable parameter", next="Unfreeze what should be trained.")
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
        except Exception:
            self._tape.detach()
            raise

    @classmethod
    def from_plan(
        cls, model: nn.Module, plan: DpSgd, *, ledger: Ledger | None = None, random: Random | None = None
    ) -> "DifferentialPrivacyEngine":
        """The engine that does what the plan says."""
        return cls(
            model,
            max_grad_norm=None if plan.parts else plan.max_grad_norm,
            noise_multiplier=plan.noise_multiplier,
            clipping=plan.clipping,
            parts=parts_of(plan),
            ledger=ledger,
            random=random,
            plan=plan,
        )

    @property
    def max_grad_norm(self) -> float:
        """The bound on a unit's gradient over everything; where clipping is adaptive, that of the next step."""
        return self._partition.max_grad_norm

    def detach(self) -> None:
        super().detach()
        self._tape.detach()

    def get_epsilon(self, delta: float, accountant: str = "pld") -> float:
        """An upper bound on the epsilon spent so far, at ``delta``: by the ledger if there is one, else by our count.

        Raises: UsageError where the sampling rate is not known, or the accountant does not apply.
        """
        if self._sampling_rate is None and self.ledger is None:
            raise UsageError(
                "sampling_rate = None · is needed to say what a step costs",
                next="Use engine.batches(dataset, expected_batch_size=, steps=), or give the engine "
                "expected_batch_size= and sampling_rate= (batch size / number of units).",
            )
        events = self.ledger.spent() if self.ledger is not None else self._events
        value = accounting.epsilon(events, delta, accountant)
        if value is None:
            raise UsageError(
                f"accountant = {accountant!r} · has no bound for Poisson-sampled steps", next="Use 'pld' or 'rdp'."
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        """What was spent, up to where the ledger had come, and (adaptive clipping) the bound of the next step. Never the
        noise, never which units were drawn."""
        return {
            "format": STATE_FORMAT,
            "steps_started": self.steps_started,
            "events": [event.to_dict() for event in self._events],
            "ledger_sequence": self.ledger.sequence if self.ledger is not None else None,
            **({"max_grad_norm": self.max_grad_norm} if self._adaptive is not None else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the count of a stopped run. Raises LedgerError if the state is newer than the ledger."""
        keys = {"format", "steps_started", "events", "ledger_sequence"}
        keys |= {"max_grad_norm"} if self._adaptive is not None else set()
        if set(state) != keys or state["format"] != STATE_FORMAT:
            raise UsageError(
                f"state = {sorted(state)} · must have {sorted(keys)} in format {STATE_FORMAT}",
                next="Give what engine.state_dict() returned.",
            )
        if self.ledger is not None and state["ledger_sequence"] is not None:
            self.ledger.require_at_least(int(state["ledger_sequence"]))
        self._events = [Event.from_dict(event) for event in state["events"]]
        self.steps_started = int(state["steps_started"])
        if self._adaptive is not None:
            checks.positive(max_grad_norm=state["max_grad_norm"])
            self._partition.parts[0].max_grad_norm = float(state["max_grad_norm"])

    def check_independence(self, losses: Callable[[Batch], Tensor], batch: Batch) -> None:
        """Raises UnsupportedLayer when one unit's loss or gradient moves with another unit's data, naming the layer.

        Args: losses: batch -> (B,); batch: at least two units. Chance inside ``losses`` is repeated from torch's seed.
        """
        from sfumato.privacy.gradients.reference import find_coupling

        self._tape.enabled = False
        try:
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
        if self.plan is not None and self.ledger is not None and self.ledger.plan is not None:
            return self.ledger.remaining_steps
        return super()._steps_left()

    def _reserve(self) -> int | None:
        assert self._sampling_rate is not None
        event = Event(sampling_rate=self._sampling_rate, noise_multiplier=self.noise_multiplier)
        sequence = self.ledger.reserve(event, self.steps_started) if self.ledger is not None else None
        self._events = list(accounting.merged([*self._events, event]))
        self.steps_started += 1
        return sequence

    def _set_rate(self, expected_batch_size: float | None, num_units: int) -> None:
        super()._set_rate(expected_batch_size, num_units)
        self._share_noise()

    def _share_noise(self) -> None:
        """Adaptive clipping: what of sigma is left for the gradient. Raises PrivacyRefused before anything is charged."""
        if self._adaptive is not None and self._expected_batch_size is not None:
            self._partition.parts[0].noise_multiplier = self._adaptive.gradient_noise_multiplier(
                self.noise_multiplier, self._expected_batch_size
            )

    def _begin(self) -> None:
        self._sums, self._count = {}, 0.0
        self._watch = Watch(self.model)

    def _expect(self, part: Part) -> None:
        self._tape.clear()
        self._tape.give_units(part.units)

    def _require_stepped(self) -> None:
        if self._tape.has_records:
            self._tape.clear()
            raise UsageError(
                "optimizer.step() · was not called after backward(), so the step would be lost",
                next="Step the optimizer that was attached, once for every batch or part.",
            )
        if self._part is not None and self._part.stepped and self._part.last:
            self._commit(self._part)  # of several optimizers, not all were stepped

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in args[1:]) or kwargs.get("closure") is not None:  # args[0] is the optimizer
            raise UsageError(
                f"{type(optimizer).__name__}.step(closure) · would compute gradients that are not protected",
                next="Call backward() before, and step() without a closure.",
            )
        self._passes.require_step_allowed()
        name = next(name for name, held in self._optimizers.items() if held is optimizer)
        self._check_optimizer(optimizer, name)
        if self._tape.rows != 0:  # the gradients of no rows are zero
            self._gradients.check(self._tape, optimizer)
        part = self._part if self._draws_batches else self._hand_written_part()
        if part is None or name in part.stepped:
            raise PrivacyRefused(
                "optimizer.step() · without a batch of its own: every step is charged, and every batch is for one step",
                next="Step once for every batch that engine.batches gives.",
                code="step_without_batch",
            )
        part.stepped.add(name)
        with torch.no_grad():
            self._add(part, name)
            for parameter in self._parameters_of(name):
                parameter.grad = None
            if part.last:
                self._release(name)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = self._part
        if self._watch is not None:
            self._watch.check_step()
        if part is not None and part.last and len(part.stepped) == len(self._optimizers):
            self._commit(part)
        if not self._draws_batches and part is not None and part.last:
            self._part = None

    def _commit(self, part: Part) -> None:
        if part.sequence is not None and self.ledger is not None:
            self.ledger.commit(part.sequence)
            part.sequence = None

    def _hand_written_part(self) -> Part:
        """The rows of a loop over the user's own loader: a step is charged when its data is about to be used."""
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
        more = self._passes.accumulating
        if self._part is not None and not self._part.last:  # of a batch that was charged with its first micro-batch
            sequence = self._part.sequence
        else:
            self._sums, self._count = {}, 0.0
            sequence = self._reserve()
        self._part = Part(None, False, not more, sequence)
        return self._part

    def _add(self, part: Part, name: str) -> None:
        """Adds the clipped gradients of a physical part to the sum of its batch."""
        layers, terms, rows = self._tape.take()
        if self._draws_batches and self._watch is not None:
            self._watch.check_forward()
        units = part.units if part.units is not None else Units(None, rows)
        if not layers:
            if units.num_rows:
                raise UsageError(
                    "optimizer.step() · no backward() came before it, though the batch has rows",
                    next="Call losses.mean().backward() before optimizer.step().",
                )
            return
        others = [str(layer) for layer in layers if name and self._partition.owner(layer).name != name]
        if others:
            raise UsageError(
                f"{type(self._optimizers[name]).__name__}.step() · is for part {name}, but {listed(others)} took part in "
                "backward()",
                next=f"Put forward, backward() and step() into `with engine.training({name!r}):`.",
            )
        if rows:
            self._check_all_recorded(name, {p for group in terms for term in group for p in term.parameters})
        device = layers[0].parameters[0].device
        scale = part.scale(units, self.loss_reduction).to(device)
        units = units.to(device)
        clips, group_of = self._partition.clips(layers)
        clipped = clipped_sums(terms, units, scale, clips, group_of)
        self.non_finite += clipped.non_finite
        if self._adaptive is not None:
            self._count += self._adaptive.count(clipped.norms[0], self.max_grad_norm)
        for parameter, value in clipped.sums.items():
            self._sums[parameter] = self._sums[parameter] + value if parameter in self._sums else value

    def _release(self, name: str) -> None:
        """.grad = (sum + noise) / expected batch size + what is public, in float64 until the last rounding."""
        assert self._expected_batch_size is not None
        for parameter in self._parameters_of(name):
            total = self._sums.pop(parameter, None)
            plus = None if total is None else total.reshape(-1).cpu()
            std = self._partition.part_of[parameter].noise_std
            noisy = gaussian(parameter.numel(), std, self.random, plus).div_(self._expected_batch_size)
            gradient = noisy.view(parameter.shape).to(parameter.device)
            if parameter in self._passes.public:
                gradient += self._passes.public.pop(parameter)
            self._gradients.write(parameter, gradient.to(parameter.dtype))
        if self._adaptive is not None:
            part, size = self._partition.parts[0], self._expected_batch_size
            std = widened(self._adaptive.count_std(self.noise_multiplier, size), 0.5, 1)
            count = gaussian(1, std, self.random, torch.tensor([self._count], dtype=torch.float64))
            part.max_grad_norm = self._adaptive.next_bound(part.max_grad_norm, float(count), size, self._initial_bound)

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


class NotPrivateEngine(_Engine):
    """The same face without protection: ordinary gradients of the mean loss, over the expected batch size.

    The non-private twin of a run: same sampling, same loop, no clipping, no noise; epsilon is infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        random: Random | None = None,
        plan: NotPrivate | None = None,
    ) -> None:
        super().__init__(model, plan, None, random)
        if expected_batch_size is not None:
            self._expected_batch_size = expected_batch_size
        if sampling_rate is not None:
            self._sampling_rate = sampling_rate
        self._sums: dict[nn.Parameter, Tensor] = {}

    @classmethod
    def from_plan(
        cls, model: nn.Module, plan: NotPrivate, *, ledger: Ledger | None = None, random: Random | None = None
    ) -> "NotPrivateEngine":
        """The twin of ``DifferentialPrivacyEngine.from_plan``; there is no event to write into a ledger."""
        return cls(model, random=random, plan=plan)

    def get_epsilon(self, delta: float, accountant: str = "pld") -> float:
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"format": STATE_FORMAT, "steps_started": self.steps_started, "events": [], "ledger_sequence": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_started = int(state["steps_started"])

    def check_independence(self, losses: Callable[[Batch], Tensor], batch: Batch) -> None:
        """Nothing to check: no unit is protected."""

    def _reserve(self) -> None:
        self.steps_started += 1

    def _begin(self) -> None:
        self._sums = {}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes.require_step_allowed()
        part, last = self._part, True
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                gradient = parameter.grad  # in a hand-written loop: ordinary training as it is
                if part is not None and part.units is not None and self._expected_batch_size is not None:
                    last = part.last
                    size = part.units.num_rows if part.over_rows else part.units.num_units
                    scaled = None if gradient is None or not size else gradient * (size / self._expected_batch_size)
                    gradient = _added(self._sums.pop(parameter, None), scaled)
                if last:
                    parameter.grad = _added(gradient, self._passes.public.pop(parameter, None))
                elif gradient is not None:
                    self._sums[parameter], parameter.grad = gradient, None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing is charged."""

    def accumulate(self, *, more: bool = True) -> AbstractContextManager[None]:
        raise UsageError(
            "engine.accumulate() · without privacy, how many rows a micro-batch of a hand-written loop has is not known",
            next="Use engine.batches(..., max_physical_batch_size=), or scale and add the losses yourself.",
        )


def make_engine(
    model: nn.Module, plan: PrivacyPlan, ledger: Ledger | None = None, random: Random | None = None
) -> DifferentialPrivacyEngine | NotPrivateEngine:
    """The engine that a plan asks for; one loop serves both."""
    match plan:
        case DpSgd():
            return DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=random)
        case NotPrivate():
            return NotPrivateEngine.from_plan(model, plan, random=random)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
