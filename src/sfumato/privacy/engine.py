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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import BudgetExhausted, PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.drawing import Part, Source, source_of
from sfumato.privacy.gradients.bookkeeping import Layer, Tape
from sfumato.privacy.gradients.clipping import Clip, clip_to, clipped_sums, normalise_to
from sfumato.privacy.gradients.rules import computed_by_hooks
from sfumato.privacy.gradients.terms import Units
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.noise import gaussian
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.privacy.sampling import physical_parts, poisson_units
from sfumato.randomness import Random, SecretRandom
from sfumato.records import Batch

Clipping = Literal["flat", "per_layer", "automatic"]
STATE_FORMAT = 1


class _Engine:
    """What the private and the ordinary engine share: drawing batches, and following the optimizer's steps."""

    model: nn.Module

    def __init__(
        self, model: nn.Module, plan: PrivacyPlan | None, ledger: Ledger | None, random: Random | None
    ) -> None:
        self.model = model
        self.plan = plan
        self.ledger = ledger
        self.random: Random = random if random is not None else SecretRandom()
        self.stopped: Literal["budget", "steps"] | None = None
        self.steps_started = 0  # draws, each of them charged, over all attempts that the state knows of
        self._expected_batch_size: float | None = plan.expected_batch_size if plan is not None else None
        self._sampling_rate: float | None = plan.sampling_rate if plan is not None else None
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        self._part: Part | None = None
        self._draws_batches = False

    @property
    def for_release(self) -> bool:
        """False if chance comes from a test source: nothing made with it may be released."""
        return self.random.for_release

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Makes ``optimizer.step()`` private. In place; returns the same object.

        Raises: UsageError if the optimizer does not train exactly the model's trainable parameters, by name.
        """
        if self._optimizer is not None:
            raise UsageError(
                f"optimizer = {type(optimizer).__name__} · the engine has {type(self._optimizer).__name__} already",
                next="Use one optimizer (with parameter groups), or call engine.detach() first.",
            )
        self._check_optimizer(optimizer)
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return optimizer

    def detach(self) -> None:
        """Takes the engine off the optimizer and the model: both are ordinary again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizer = None
        self._part = None

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
        if self._optimizer is None:
            raise UsageError(
                "engine.batches · the engine is not attached, so a step would train nothing",
                next="Call engine.attach(optimizer) before the loop.",
            )
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

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        named = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing = [name for key, name in named.items() if key not in held]
        if missing:
            raise UsageError(
                f"optimizer · does not train {_listed(missing)}, which the model has as trainable",
                next="Give the optimizer all trainable parameters, or freeze these with requires_grad_(False).",
            )
        if len(held) > len(named):
            raise UsageError(
                f"optimizer · also trains {len(held) - len(named)} parameters that are not the model's, unprotected",
                next="Give the engine the module that holds them all.",
            )

    def _require_stepped(self) -> None:
        """Hook: raises if the batch just yielded went backward, but not through optimizer.step()."""

    def _begin(self) -> None:
        """Hook: a new draw begins."""

    def _expect(self, part: Part) -> None:
        """Hook: a part is about to be yielded."""

    def _reserve(self) -> int | None:
        raise NotImplementedError

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError


class DifferentialPrivacyEngine(_Engine):
    """Differentially private training of one model with one optimizer.

    Guarantee: what ``optimizer.step()`` does to the parameters, over all steps together, is (epsilon, delta)-private
    for adding or removing one unit, with ``get_epsilon(delta)``; provided that the batches are Poisson-sampled
    (``engine.batches`` does that; in a hand-written loop it is the loop's promise) and that the loss is one loss per
    unit, each from that unit's rows alone. Buffers that a forward pass changes are not protected and therefore refused.

    Args:
      max_grad_norm: C, the bound on a unit's gradient, over all parameters together.
      noise_multiplier: sigma; the noise has standard deviation sigma C. 0 is no noise: epsilon is infinite.
      expected_batch_size, sampling_rate: B and q; for hand-written loops. ``batches`` finds them itself.
      loss_reduction: how the loop makes one number of its losses: their "mean" or their "sum".
      clipping: "flat", one clip; "per_layer", each of L layers to C / sqrt(L), so that together they keep C;
        "automatic", AUTO-S, every gradient normalised to about C.
      ledger: writes every event durably before the data is touched.
      random: where sampling and noise come from; SecretRandom, unless it is a test.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        clipping: Clipping = "flat",
        ledger: Ledger | None = None,
        random: Random | None = None,
        plan: DpSgd | None = None,
    ) -> None:
        checks.positive(max_grad_norm=max_grad_norm)
        checks.non_negative(noise_multiplier=noise_multiplier)
        checks.one_of(("mean", "sum"), loss_reduction=loss_reduction)
        checks.one_of(("flat", "per_layer", "automatic"), clipping=clipping)
        super().__init__(model, plan, ledger, random)
        if expected_batch_size is not None:
            checks.positive(expected_batch_size=expected_batch_size)
            self._expected_batch_size = float(expected_batch_size)
        if sampling_rate is not None:
            checks.probability(sampling_rate=sampling_rate)
            checks.positive(sampling_rate=sampling_rate)
            self._sampling_rate = float(sampling_rate)
        self.max_grad_norm = float(max_grad_norm)
        self.noise_multiplier = float(noise_multiplier)
        self.loss_reduction = loss_reduction
        self.clipping: Clipping = clipping
        self.non_finite = 0  # units whose gradient was not finite, so far; internal, never released
        self._events: list[Event] = []
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._given: dict[nn.Parameter, tuple[Tensor, int]] = {}  # the .grad that we wrote, and its version
        self._checked_all_recorded = False
        self._buffers: dict[str, tuple[int, int]] = {}  # when the batch was drawn
        self._tape = Tape(model)
        if not self._tape.layers:
            self._tape.detach()
            raise UsageError("model · has no trainable parameter", next="Unfreeze what should be trained.")
        self._refuse_tied_layers()

    @classmethod
    def from_plan(
        cls, model: nn.Module, plan: DpSgd, *, ledger: Ledger | None = None, random: Random | None = None
    ) -> "DifferentialPrivacyEngine":
        """The engine that does what the plan says."""
        return cls(
            model,
            max_grad_norm=plan.max_grad_norm,
            noise_multiplier=plan.noise_multiplier,
            ledger=ledger,
            random=random,
            plan=plan,
        )

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
        """What was spent, and up to where the ledger had come. Never the noise, never which units were drawn."""
        return {
            "format": STATE_FORMAT,
            "steps_started": self.steps_started,
            "events": [event.to_dict() for event in self._events],
            "ledger_sequence": self.ledger.sequence if self.ledger is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the count of a stopped run. Raises LedgerError if the state is newer than the ledger."""
        keys = {"format", "steps_started", "events", "ledger_sequence"}
        if set(state) != keys or state["format"] != STATE_FORMAT:
            raise UsageError(
                f"state = {sorted(state)} · must have {sorted(keys)} in format {STATE_FORMAT}",
                next="Give what engine.state_dict() returned.",
            )
        if self.ledger is not None and state["ledger_sequence"] is not None:
            self.ledger.require_at_least(int(state["ledger_sequence"]))
        self._events = [Event.from_dict(event) for event in state["events"]]
        self.steps_started = int(state["steps_started"])

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

    def _begin(self) -> None:
        self._sums = {}
        self._buffers = _buffer_versions(self.model)

    def _expect(self, part: Part) -> None:
        self._tape.clear()
        self._tape.give_rows(part.units.num_rows if part.units is not None else None)

    def _require_stepped(self) -> None:
        if self._tape.has_records:
            self._tape.clear()
            raise UsageError(
                "optimizer.step() · was not called after backward(), so the step would be lost",
                next="Step the optimizer that was attached, once for every batch or part.",
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in args[1:]) or kwargs.get("closure") is not None:  # args[0] is the optimizer
            raise UsageError(
                f"{type(optimizer).__name__}.step(closure) · would compute gradients that are not protected",
                next="Call backward() before, and step() without a closure.",
            )
        self._check_optimizer(optimizer)
        if self._tape.rows != 0:  # the gradients of no rows are zero
            self._check_gradients()
        part = self._part if self._draws_batches else self._hand_written_part()
        if part is None or part.taken:
            raise PrivacyRefused(
                "optimizer.step() · without a batch of its own: every step is charged, and every batch is for one step",
                next="Step once for every batch that engine.batches gives.",
                code="step_without_batch",
            )
        part.taken = True
        with torch.no_grad():
            self._add(part)
            for parameter in self._tape.parameters:
                parameter.grad = None
            if part.last:
                self._release()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = self._part
        if part is not None and part.last and part.sequence is not None and self.ledger is not None:
            self.ledger.commit(part.sequence)
            part.sequence = None
        if not self._draws_batches:
            self._part = None

    def _hand_written_part(self) -> Part:
        """The rows of a loop over the user's own loader: a step is charged when its data is about to be used."""
        if self._expected_batch_size is None or self._sampling_rate is None:
            raise UsageError(
                f"expected_batch_size = {self._expected_batch_size}, sampling_rate = {self._sampling_rate} · "
                "must be known before a step",
                next="Use engine.batches(dataset, expected_batch_size=, steps=), or give the engine "
                "expected_batch_size= and sampling_rate= (batch size / number of units).",
            )
        if not self._tape.has_records and self._tape.rows != 0:
            raise UsageError(
                "optimizer.step() · no backward() came before it", next="Call loss.backward() before optimizer.step()."
            )
        self._sums = {}
        sequence = self._reserve()
        self._part = Part(None, False, True, sequence)
        return self._part

    def _add(self, part: Part) -> None:
        """Adds a part's clipped gradients to the sum of its batch."""
        layers, terms, rows = self._tape.take()
        self._check_buffers()
        units = part.units if part.units is not None else Units(None, rows)
        if not layers:
            if units.num_rows:
                raise UsageError(
                    "optimizer.step() · no backward() came before it, though the batch has rows",
                    next="Call losses.mean().backward() before optimizer.step().",
                )
            return
        if rows:
            self._check_all_recorded({p for group in terms for term in group for p in term.parameters})
        device = layers[0].parameters[0].device
        scale = self._scale(units, part.over_rows).to(device)
        units = units.to(device)
        clips, group_of = self._clips(layers)
        clipped = clipped_sums(terms, units, scale, clips, group_of)
        self.non_finite += clipped.non_finite
        for parameter, value in clipped.sums.items():
            self._sums[parameter] = self._sums[parameter] + value if parameter in self._sums else value

    def _scale(self, units: Units, over_rows: bool) -> Tensor:
        """(B,): undoes the loop's mean, so that a unit's gradient does not depend on how many others there are."""
        ones = torch.ones(units.num_units, dtype=torch.float64)
        per_unit = units.counts.double() if over_rows else ones  # the unit's gradient is the mean over its rows
        size = units.num_rows if over_rows else units.num_units
        return (size if self.loss_reduction == "mean" else 1.0) * ones / per_unit

    def _clips(self, layers: list[Layer]) -> tuple[list[Clip], list[int]]:
        match self.clipping:
            case "flat":
                return [clip_to(self.max_grad_norm)], [0] * len(layers)
            case "automatic":
                return [normalise_to(self.max_grad_norm)], [0] * len(layers)
            case "per_layer":
                bound = self.max_grad_norm / math.sqrt(len(self._tape.layers))
                return [clip_to(bound)] * len(layers), list(range(len(layers)))

    def _release(self) -> None:
        """.grad = (sum + noise) / expected batch size, in float64 until the last rounding. Then the sum is dropped."""
        assert self._expected_batch_size is not None
        std = self.noise_multiplier * self.max_grad_norm
        self._given = {}
        for parameter in self._tape.parameters:
            noisy = gaussian(parameter.numel(), std, self.random).view(parameter.shape).to(parameter.device)
            if parameter in self._sums:
                noisy += self._sums[parameter]
            parameter.grad = noisy.div_(self._expected_batch_size).to(parameter.dtype)
            self._given[parameter] = (parameter.grad, parameter.grad._version)
        self._sums = {}

    # -- what must never pass in silence --

    def _check_gradients(self) -> None:
        """No trainable parameter may be unknown to us, or have a gradient that did not come through the records."""
        protected = self._tape.parameters
        unknown = [name for name, p in self.model.named_parameters() if p.requires_grad and p not in protected]
        if unknown:
            self._tape.clear()
            raise UnsupportedLayer(
                f"{_listed(unknown)} · became trainable after the engine was made, and would train unprotected",
                next="Freeze it, or call engine.detach() and make a new engine.",
            )
        leaked = [name for p, name in protected.items() if p.grad is not None and not self._is_ours(p)]
        if leaked:
            self._tape.clear()
            for p in protected:
                p.grad = None
            raise UnsupportedLayer(
                f"{_listed(leaked)} · got a gradient that was not clipped: it is used outside its module's forward()",
                next="Call the module instead of reading its weight (or call zero_grad() if you changed .grad).",
            )

    def _is_ours(self, parameter: nn.Parameter) -> bool:
        gradient, version = self._given.get(parameter, (None, -1))
        return parameter.grad is gradient and gradient is not None and gradient._version == version

    def _check_all_recorded(self, recorded: set[nn.Parameter]) -> None:
        """At the first step with rows: a parameter that no layer used would only ever receive noise."""
        if not self._checked_all_recorded:
            names = self._tape.parameters
            missing = [names[p] for p in names if p.requires_grad and p not in recorded]
            if missing:
                raise UsageError(
                    f"{_listed(missing)} · took no part in the loss, and would receive noise alone",
                    next="Use it in the loss, or freeze it with requires_grad_(False).",
                )
            self._checked_all_recorded = True

    def _check_buffers(self) -> None:
        if not self._draws_batches:
            return
        after = _buffer_versions(self.model)
        changed = [name for name, state in self._buffers.items() if after.get(name) != state]
        if changed:
            raise UnsupportedLayer(
                f"{_listed(changed)} · a buffer that the forward pass changed with private data, without noise",
                next="Use a layer without running averages.",
            )

    def _refuse_tied_layers(self) -> None:
        if self.clipping != "per_layer":
            return
        users: dict[nn.Parameter, list[str]] = {}
        for layer in self._tape.layers:
            for parameter in layer.parameters:
                users.setdefault(parameter, []).append(layer.name)
        tied = [" and ".join(names) for names in users.values() if len(names) > 1]
        if tied:
            self._tape.detach()
            raise UnsupportedLayer(
                f"{_listed(tied)} · share a parameter, which has no layer of its own to be clipped in",
                next="Use clipping='flat'.",
            )


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
        part = self._part
        if part is None or part.units is None or self._expected_batch_size is None:
            return  # a hand-written loop: ordinary training as it is
        size = (part.units.num_rows if part.over_rows else part.units.num_units) / self._expected_batch_size
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None and part.units.num_rows:
                    value = parameter.grad * size
                    self._sums[parameter] = self._sums[parameter] + value if parameter in self._sums else value
                parameter.grad = self._sums.get(parameter) if part.last else None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._part is not None and self._part.last:
            self._sums = {}


def make_engine(
    model: nn.Module, plan: PrivacyPlan, ledger: Ledger | None = None, random: Random | None = None
) -> DifferentialPrivacyEngine | NotPrivateEngine:
    """The engine that a plan asks for; one loop serves both."""
    match plan:
        case DpSgd():
            return DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=random)
        case NotPrivate():
            return NotPrivateEngine.from_plan(model, plan, random=random)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _buffer_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of all buffers but those that a weight is computed with (power iteration): these never see data."""
    of_weights: set[int] = set()
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            of_weights |= {id(buffer) for buffer in module.parametrizations.buffers()}  # type: ignore[union-attr, operator]
        for name in computed_by_hooks(module):
            of_weights |= {id(x) for key, x in module._buffers.items() if key.startswith(f"{name}_")}
    return {
        name: (id(buffer), buffer._version) for name, buffer in model.named_buffers() if id(buffer) not in of_weights
    }
