"""``PrivateTrainer``: a ``transformers.Trainer`` whose training is differentially private. [shell]

The loop, the callbacks, evaluation, logging and saving are those of ``transformers``. Replaced are who is drawn
(``get_train_dataloader``), what is computed from them (``training_step``) and what the optimizer's step does
(``privacy.engine``). ``arguments`` says which ``TrainingArguments`` are refused; ``trainer_checks`` what is looked at before.

Shapes: R rows, B units.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from sfumato.errors import BudgetExhausted, LedgerError, PrivacyRefused, UsageError
from sfumato.models.row_losses import row_losses
from sfumato.privacy import ledger as ledgers
from sfumato.privacy.accounting import Event
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.plan_json import plan_to_dict
from sfumato.privacy.planning import training_plan
from sfumato.privacy.processes import Processes
from sfumato.privacy.settings import PrivacySettings
from sfumato.privacy.spending import Spending
from sfumato.randomness import Random
from sfumato.records import Batch, UnitTable
from sfumato.reports import Guarantee, to_dict
from sfumato.training import trainer_checks as checks
from sfumato.training.arguments import refusals
from sfumato.training.dp_adam import DpAdamBC

STATE = "privacy_state.json"  # in a checkpoint: what was spent, and where the ledger stood
CLAIM = "privacy.json"  # beside a model that save_model() has written
COVERED = ("epoch", "step", "learning_rate", "epsilon", "delta")  # figures that say nothing of a unit


class PrivateTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` that trains under differential privacy: the same arguments, and one for the privacy.

        trainer = PrivateTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer,
            privacy=PrivacySettings(epsilon=8.0), unit="patient",
        )
        trainer.train()

    **Claim.** What ``train()`` does to the parameters, over all steps, attempts and checkpoints together, is
    (epsilon, delta)-differentially private for one unit, under ``plan.adjacency`` (adding or removing one unit, if nothing
    else is asked for). The unit is a row of ``train_dataset``, or all rows that have one value in its column ``unit``.
    *Sampled*: every unit joins every step by its own secret coin of probability q = B / N, at most ``records_per_unit`` of its
    rows; B = per_device_train_batch_size × gradient_accumulation_steps × processes, a public constant, and N units.
    *Clipped*: the gradient of each unit's own loss (the mean over its rows of ``compute_losses``), over all trained parameters
    together, to L2 norm ``max_grad_norm``. *Noised*: the sum, once a step, with N(0, (noise_multiplier max_grad_norm)²), then
    divided by B, whatever was drawn; an empty draw is a step of noise. *Charged*: every step, durably, in the ledger before its
    units are drawn (Abadi et al. 2016, arXiv:1607.00133; accounted by privacy-loss distributions).

    Not covered: the training loss, ``evaluate`` on data that are not public, and what a callback writes. The loss is told to
    the callbacks (TensorBoard's writes it into ``args.output_dir``) and is what ``train()`` returns; it is left out of
    checkpoints, models, ``save_state`` and ``save_metrics``. So give away the folder of ``save_model``, never ``output_dir``;
    ``push_to_hub``, which uploads that, is refused.

    Args (beside those of ``transformers.Trainer``):
      privacy: what is asked for (the noise is then found), or a plan.
      unit: the column of ``train_dataset`` that names the person; it is not given to the model. None: every row is a unit.
      expected_batch_size: B, where it is not the product above; then gradient_accumulation_steps is 1.
      ledger: its file; ``ledger.db`` in ``args.output_dir`` by default.
      account: the account that all runs on these data share; that of ``privacy`` by default.
      evaluation_is_public: the user's word that ``eval_dataset`` is of nobody whom the guarantee protects; only then may a
        model be chosen by it.
      random: a test source; what it trains is not for release.

    Raises: PrivacyRefused with every argument that a private training cannot follow, and with what to do.
    """

    def __init__(
        self,
        *arguments: Any,
        privacy: PrivacySettings | DpSgd,
        unit: str | None = None,
        expected_batch_size: float | None = None,
        ledger: Path | str | None = None,
        account: Path | str | None = None,
        evaluation_is_public: bool = False,
        random: Random | None = None,
        **named: Any,
    ) -> None:
        self._evaluation_is_public = evaluation_is_public
        for value in (*arguments, *named.values()):  # before the base class acts on them
            if isinstance(value, transformers.TrainingArguments):
                self._refuse(value)
        super().__init__(*arguments, **named)
        self._refuse(self.args)
        self.accelerator.prepare_model = _unwrapped_by(self.accelerator.prepare_model)
        self.privacy = privacy
        self.unit = unit
        self._asked_batch_size = expected_batch_size
        self._ledger_path = Path(ledger) if ledger is not None else Path(str(self.args.output_dir)) / "ledger.db"
        self._account = account
        self._random = random
        self._plan: DpSgd | None = None
        self._table: UnitTable | None = None
        self.engine: DifferentialPrivacyEngine | None = None
        self._book: Ledger | None = None
        self._parts: Iterator[Batch] | None = None
        self._events: list[Event] = []  # what was spent, as of the end of the last attempt
        self._others: list[dict[str, Any]] = []  # other runs on the account, as of the end of the last attempt
        self._spending: Spending | None = None
        self._saved_state: dict[str, Any] | None = None  # of the checkpoint that is resumed from
        self._wasted = 0
        self._rows: Any = None
        self._collate: Callable[[list[Any]], Any] | None = None
        self._kept_arguments: dict[str, Any] = {}
        if self.train_dataset is not None:
            _ = self.plan  # refusals now, not when the training is called

    # -- the plan --

    @property
    def plan(self) -> DpSgd:
        """What is sampled, clipped, noised and therefore charged, over the whole training."""
        if self._plan is None:
            self._plan = self._make_plan()
            self._spending = _spending_of(self._plan)
        return self._plan

    @property
    def units(self) -> UnitTable:
        """The rows of ``train_dataset`` by unit."""
        if self._table is None:
            self._table = checks.units_of(self.train_dataset, self.unit)
        return self._table

    def _make_plan(self) -> DpSgd:
        checks.check_unit(self.privacy, self.unit)
        batch = self._batch_size()
        if isinstance(self.privacy, DpSgd):
            plan = self.privacy
            steps = self._asked_steps(self._steps_in_epoch(batch))
            if steps != plan.steps:
                raise UsageError(
                    f"max_steps = {steps} · the plan has {plan.steps} steps",
                    next=f"Set TrainingArguments(max_steps={plan.steps}).",
                )
        else:
            steps = self._asked_steps(self._steps_in_epoch(batch))
            of_steps = replace(self.privacy, clip_estimate=None)
            made = training_plan(
                of_steps, steps=steps, expected_batch_size=batch, population=self.units.num_units,
                records=self.units.num_records,
            )  # fmt: skip
            if not isinstance(made, DpSgd):
                raise UsageError(
                    f"mechanism = {self.privacy.mechanism} · is no private training",
                    next="Use transformers.Trainer itself, or PrivacySettings(mechanism='dp_sgd').",
                )
            plan = made
        if plan.max_grad_norm == "estimated":
            raise UsageError(
                "max_grad_norm = estimated · is not known to a trainer", next="Give PrivacySettings(max_grad_norm=1.0)."
            )
        if self.args.max_grad_norm and not math.isclose(self.args.max_grad_norm, float(plan.max_grad_norm)):
            raise UsageError(
                f"TrainingArguments.max_grad_norm = {self.args.max_grad_norm} · is taken for the bound on each unit's gradient, "
                f"which the privacy says is {plan.max_grad_norm}",
                next=f"Set TrainingArguments(max_grad_norm={plan.max_grad_norm}). The noised sum is not clipped once more.",
            )
        return plan

    def _batch_size(self) -> float:
        """B, from the one place that says it."""
        args = self.args
        product = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        asked = self.privacy.expected_batch_size if isinstance(self.privacy, DpSgd) else self._asked_batch_size
        for other in (asked, self._asked_batch_size):
            if other is not None and other != product and args.gradient_accumulation_steps != 1:
                raise UsageError(
                    f"gradient_accumulation_steps = {args.gradient_accumulation_steps} · makes an expected batch of {product}, "
                    f"but {other:g} is asked for",
                    next="Leave gradient_accumulation_steps out: a batch comes in parts of per_device_train_batch_size.",
                )
        if asked is not None and self._asked_batch_size not in (None, asked):
            raise UsageError(
                f"expected_batch_size = {self._asked_batch_size} · the plan says {asked:g}",
                next="Leave it to the plan.",
            )
        return float(product if asked is None else asked)

    def _steps_in_epoch(self, batch: float) -> int:
        return max(1, round(self.units.num_units / batch))

    def _asked_steps(self, in_epoch: int) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return max(1, math.ceil(self.args.num_train_epochs * in_epoch))

    # -- training --

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, **more: Any) -> Any:
        """Trains until the plan is spent. ``resume_from_checkpoint`` continues a run: what its ledger holds stays spent."""
        self._refuse(self.args)
        checks.refuse_overridden(type(self), PrivateTrainer)
        if trial is not None:
            raise PrivacyRefused(
                "trial · every trial is a training, and all of them are charged",
                next="Choose settings on public data, or make one trainer for each with a common account.",
                code="hyperparameter_search",
            )
        if isinstance(self.train_dataset, IterableDataset) or self.train_dataset is None:
            raise UsageError(
                f"train_dataset = {type(self.train_dataset).__name__} · must have a length and an index, so that units can be drawn",
                next="Give a map-style dataset.",
            )
        checkpoint = checks.checkpoint_of(resume_from_checkpoint, str(self.args.output_dir))
        self._saved_state, taken = checks.state_of(checkpoint, STATE) if checkpoint else (None, 0)
        with self._charging(resuming=checkpoint is not None) as left:
            self._wasted = self.plan.steps - left - taken
            with self._arguments_of_the_loop(max_steps=taken + left):
                try:
                    return super().train(resume_from_checkpoint=checkpoint, **more)
                finally:
                    self._detach()

    @contextlib.contextmanager
    def _charging(self, resuming: bool) -> Iterator[int]:
        """The ledger is open in process 0. Gives the steps that are left, in all processes."""
        processes, plan = Processes.current(), self.plan
        with contextlib.ExitStack() as stack:

            def opened() -> int:
                account = self._account
                limit = None
                if isinstance(self.privacy, PrivacySettings):
                    account = checks.one_account(account, self.privacy.account)
                    limit = self.privacy.account_epsilon
                book = Ledger.open(
                    self._ledger_path,
                    run=str(self.args.run_name or Path(str(self.args.output_dir)).name),
                    plan=plan,
                    account=account,
                    account_limit=None if limit is None else (limit, plan.delta),
                    create=not resuming,
                )
                self._book = stack.enter_context(book)
                if not resuming and book.spent_steps:
                    raise LedgerError(
                        f"ledger = {self._ledger_path} · holds {book.spent_steps} steps of an earlier training",
                        next="Continue it with train(resume_from_checkpoint=True), or begin a run with another output_dir and, "
                        "if the data are the same, a common account=.",
                        code="ledger_begun",
                    )
                return plan.steps_left(book.remaining(plan.event(1)))

            try:
                left = processes.decide(opened)
                if left == 0:
                    raise BudgetExhausted(
                        f"steps = {plan.steps} · are all spent",
                        next="Take the last checkpoint as it is, or plan another run.",
                    )
                yield left
            finally:
                held, self._book = self._book, None
                if held is not None:  # what a block in hand has left is given back when it is closed
                    try:
                        self._others = held.other_runs()
                    finally:
                        held.close()
                    self._events = [Event.from_dict(event) for event in ledgers.show(self._ledger_path)["events"]]
                elif not processes.first and self.engine is not None:
                    self._events = self.engine.spent

    @contextlib.contextmanager
    def _arguments_of_the_loop(self, max_steps: int) -> Iterator[None]:
        """What the loop must see: one batch for each step, drawn anew after a resume, and no clipping but the engine's."""
        seen = {
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 0.0,
            "max_steps": max_steps,
            "ignore_data_skip": True,
        }
        self._kept_arguments = {name: getattr(self.args, name) for name in seen}
        self._set_arguments(seen)
        try:
            yield
        finally:
            self._set_arguments(self._kept_arguments)
            self._kept_arguments = {}

    def _set_arguments(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.args, name, value)

    def get_train_dataloader(self) -> Any:
        """Draws by Poisson sampling; an epoch is N / B steps, in which a unit takes part once on average."""
        self._rows, self._collate = self._rows_and_collator()
        return _Draws(self, self._steps_in_epoch(self.plan.expected_batch_size))

    def _rows_and_collator(self) -> tuple[Any, Callable[[list[Any]], Any]]:
        rows: Any = self.train_dataset
        collate: Any = self.data_collator
        checks.refuse_collator(collate)
        if hasattr(rows, "remove_columns"):  # of ``datasets``
            if self.unit is not None:
                rows = rows.remove_columns([self.unit])
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(
                checks.without_column(collate, self.unit), description="training"
            )
        return rows, collate

    def _next_draw(self) -> "_Drawn | None":
        """The next batch, charged before it is drawn; None where the plan is spent."""
        if self._parts is None:
            self._parts = self._attach()
        part = next(self._parts, None)
        if part is None:
            self.control.should_training_stop = True
            return None
        return _Drawn(part)

    def _attach(self) -> Iterator[Batch]:
        """The engine is made now: model and optimizer are where they will be trained, and as a checkpoint left them."""
        if self._saved_state is None:
            checks.check_rows_alone(self)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self.engine = DifferentialPrivacyEngine.from_plan(
            self.model, self.plan, ledger=self._book, random=self._random  # pyright: ignore
        )  # fmt: skip
        if self._saved_state is not None:
            self.engine.load_state_dict(self._saved_state["engine"])
        self.engine.attach(optimizer)
        if isinstance(optimizer, DpAdamBC):
            optimizer.noise_variance = self.engine.noise_variance
        return self.engine.batches(self.units, max_physical_batch_size=self.args.per_device_train_batch_size)

    def _detach(self) -> None:
        """However the training ends, the model is an ordinary one afterwards."""
        if self._parts is not None:
            self._parts.close()  # pyright: ignore[reportAttributeAccessIssue]
        self._parts = None
        if self.engine is not None:
            self.engine.detach()
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            if isinstance(optimizer, DpAdamBC):
                optimizer.noise_variance = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All parts of one drawn batch, forward and backward. The loop's ``optimizer.step()`` then steps for the last.

        Returns: the mean of the losses of the units drawn, internal; 0 for an empty draw.
        """
        assert self.engine is not None and self._parts is not None
        model.train()
        begin = getattr(self.optimizer, "train", None)
        if callable(begin):
            begin()
        part, total, count = inputs.first, 0.0, 0
        while True:
            if part.num_rows:
                losses = self._losses_of_units(model, part)
                losses.mean().backward()
                total, count = total + float(losses.detach().sum()), count + len(losses)
            if part.last:
                break
            self.engine.add_part()
            part = next(self._parts)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return torch.tensor(total / max(count, 1), device=self.args.device)

    def _losses_of_units(self, model: nn.Module, part: Batch) -> Tensor:
        assert self._collate is not None
        inputs = self._collate([self._rows[i] for i in part.tensors["row"].tolist()])
        losses = self._losses_of_rows(model, self._prepare_inputs(inputs), part.num_rows)
        return part.to(losses.device).per_unit(losses)

    def _losses_of_rows(self, model: nn.Module, inputs: Any, rows: int) -> Tensor:
        with self.compute_loss_context_manager():
            losses = self.compute_losses(model, inputs)
        whose = "compute_loss_func" if self.compute_loss_func is not None else "compute_losses"
        return checks.one_loss_per_row(losses, rows, whose)

    def compute_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        """(R,): one loss for each row of ``inputs``, from that row alone. Override it for a loss of your own.

        By default: each row's mean over its own labels (``models.row_losses``), smoothed by ``label_smoothing_factor``; or what
        ``compute_loss_func(outputs, labels, num_items_in_batch=None)`` returns, which must be (R,) then.
        """
        if self.compute_loss_func is not None:
            inputs = dict(inputs)
            labels = inputs.pop("labels", None)
            return self.compute_loss_func(model(**inputs), labels, num_items_in_batch=None)
        return row_losses(model, inputs, label_smoothing=self.args.label_smoothing_factor)[0]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """For evaluation: the mean of ``compute_losses``. A training does not come here."""
        seen: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            loss = self.compute_losses(model, inputs).mean()
        finally:
            hook.remove()
        return (loss, seen[-1] if seen else {}) if return_outputs else loss

    # -- what the base class would find out of a batch, and must not --

    def floating_point_ops(self, inputs: Any) -> int:
        """0: how long the drawn rows are would go into every checkpoint."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """None: before the step there is no gradient, and what the engine clips is private."""

    def get_total_train_batch_size(self, args: Any) -> int:
        return round(self.plan.expected_batch_size)

    # -- what is told and kept --

    def get_epsilon(self) -> float:
        """Spent so far, at ``plan.delta``: never below what the ledger holds."""
        assert self._spending is not None or self.plan
        assert self._spending is not None
        return self._spending.after(min(self.plan.steps, self._wasted + self.state.global_step))

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if self.engine is not None:
            logs = {**logs, "epsilon": self.get_epsilon(), "delta": self.plan.delta}
        super().log(logs, *arguments, **named)

    @property
    def _spent(self) -> list[Event]:
        """By the ledger while it is open, where a block of steps counts whole; else by what process 0 told the engine; after an
        attempt, as it ended."""
        if self._book is not None:
            return self._book.spent()
        return self.engine.spent if self.engine is not None and self._parts is not None else self._events

    def claim(self) -> Guarantee:
        """The guarantee of what was trained so far, as a value; from a callback, of all that is charged already.

        It names the other runs on the account, which only process 0 knows.
        """
        boundary = [
            "Inside: the training of every weight that is not frozen, over all steps and attempts that the ledger holds.",
            "Declared public: the weights that the training began with, the settings, and the choice of them.",
        ]
        if self._evaluation_is_public and self.eval_dataset is not None:
            boundary.append("Declared public: the evaluation data.")
        tested = self.engine is not None and not self.engine.for_release
        why = "chance came from a test source" if tested else ""
        return guarantee(
            self.plan,
            self._spent,
            boundary=boundary,
            not_for_release=why,
            composed_with=self._book.other_runs() if self._book is not None else self._others,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._own_arguments():
            super().save_model(output_dir, _internal_call=_internal_call)
        if not _internal_call:
            self._write_claim(output_dir)

    def _write_claim(self, output_dir: str | None) -> None:
        if self._spent and self.args.should_save:
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            (folder / CLAIM).write_text(json.dumps(to_dict(self.claim()), indent=1), encoding="utf-8")

    @contextlib.contextmanager
    def _own_arguments(self) -> Iterator[None]:
        """The user's arguments, while something is saved that holds them."""
        during = {name: getattr(self.args, name) for name in self._kept_arguments}
        self._set_arguments(self._kept_arguments)
        try:
            yield
        finally:
            self._set_arguments(during)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *more: Any, **named: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.engine is not None and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            state = {"format": 1, "plan": plan_to_dict(self.plan), "engine": self.engine.state_dict()}
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        with self._covered_history():
            super()._save_checkpoint(model, trial, *more, **named)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing. While the engine trains, torch's state is the secret chance of the last part (``privacy.chance``): it would
        tell what its losses drew, and how many rows they had. A resume draws anew."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: chance that was in a file is known."""

    def save_state(self) -> None:
        with self._covered_history():
            super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Writes the covered figures alone: the training loss, and how fast it went, tell of the units drawn."""
        super().save_metrics(split, self._covered(metrics), combined=combined)

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        with self._covered_history():
            super().create_model_card(*arguments, **named)

    @contextlib.contextmanager
    def _covered_history(self) -> Iterator[None]:
        """The log without figures that no noise covers, while it is written where a model is given away."""
        history = self.state.log_history
        self.state.log_history = [self._covered(entry) for entry in history]
        try:
            yield
        finally:
            self.state.log_history = history

    def _covered(self, figures: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in figures.items()
            if name in COVERED or (self._evaluation_is_public and name.startswith("eval_"))
        }

    # -- what is refused --

    def _refuse(self, args: Any) -> None:
        found = refusals(args, evaluation_is_public=self._evaluation_is_public)
        found += checks.seeded_collator(getattr(self, "data_collator", None))
        callbacks = getattr(getattr(self, "callback_handler", None), "callbacks", [])
        found += [] if self._evaluation_is_public else checks.choosing_callbacks(callbacks)
        if self._evaluation_is_public and getattr(self, "train_dataset", None) is not None:
            found += checks.same_data(self.train_dataset, self.eval_dataset)
        if found:
            raise PrivacyRefused(
                "; ".join(reason["message"] for reason in found),
                next=found[0]["next"],
                code=found[0]["code"] if len(found) == 1 else None,
                refusals=found,
            )

    def push_to_hub(self, *arguments: Any, **named: Any) -> Any:
        raise PrivacyRefused(
            "push_to_hub · uploads all of output_dir: logs with the training loss, which nothing covers, and the ledger",
            next="trainer.save_model('model'), into a folder of its own, and upload that folder: huggingface_hub.upload_folder("
            "repo_id=..., folder_path='model').",
            code="push_to_hub",
        )

    def hyperparameter_search(self, *arguments: Any, **named: Any) -> Any:
        raise PrivacyRefused(
            "hyperparameter_search · trains many times on the same units, and keeps the best by what it has seen of them",
            next="Choose settings on public data, or make one trainer for each with a common account.",
            code="hyperparameter_search",
        )


@functools.lru_cache(maxsize=8)
def _spending_of(plan: DpSgd) -> Spending:
    return Spending(plan)  # the accountant takes seconds


class _Drawn(dict[str, Any]):
    """The first part of a drawn batch; the others come when it is done. Empty as a dict: the loop asks batches for labels."""

    def __init__(self, first: Batch) -> None:
        super().__init__()
        self.first = first


class _Draws:
    """What the loop takes for its data loader."""

    def __init__(self, trainer: PrivateTrainer, length: int) -> None:
        self._trainer = trainer
        self._length = length
        self.dataset = trainer.train_dataset  # the loop asks for its length
        self.batch_size = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Drawn]:
        for _ in range(self._length):
            drawn = self._trainer._next_draw()
            if drawn is None:
                return
            yield drawn


def _unwrapped_by(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``Accelerator.prepare_model`` without DistributedDataParallel: the engine adds up over processes."""

    def prepared(model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        return prepare(model, device_placement=device_placement, evaluation_mode=True)

    return prepared
