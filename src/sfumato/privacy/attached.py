"""Which optimizer trains what, and which backward pass is about whom: what an engine is told about the user's loop."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sfumato.errors import UsageError
from sfumato.privacy.gradients.groups import WHOLE, listed
from sfumato.privacy.passes import Passes
from sfumato.privacy.processes import Processes
from sfumato.privacy.sources import PhysicalPart


class Attached:
    """The optimizers of one model. An engine says what happens before and after their steps."""

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self.model = model
        self.processes = processes
        self._optimizers: dict[str, torch.optim.Optimizer] = {}  # by the part that each trains; one may train all
        self._passes = Passes(None, self._trainable)
        self._hooks: list[Any] = []
        self._part: PhysicalPart | None = None  # the rows that are on their way through the loop
        self._draws_batches = False

    def attach(self, optimizer: torch.optim.Optimizer, *, part: str = WHOLE) -> torch.optim.Optimizer:
        """Makes ``optimizer.step()`` private. In place; returns the same object.

        Several processes attach together, and replicated parameters become those of process 0.

        Args: part: which of the model's parts it trains; then every part has an optimizer of its own.
        Raises: UsageError if the optimizer does not train exactly the model's (the part's) trainable parameters, by name.
        """
        with self.processes.agreeing():
            others = [name for name in self._optimizers if WHOLE in (name, part) or name == part]
            if others:
                held = self._optimizers[others[0]]
                raise UsageError(
                    f"optimizer = {type(optimizer).__name__} · the engine has {type(held).__name__} already",
                    next="Use one optimizer (with parameter groups), one for each part, or call engine.detach() first.",
                )
            self._check_optimizer(optimizer, part)
        self._join(part)
        self._optimizers[part] = optimizer
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return optimizer

    def detach(self) -> None:
        """Takes the engine off the optimizer and the model: both are ordinary again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizers = {}
        self._part = None

    def add_part(self) -> None:
        """In place of ``optimizer.step()``, for a part of a batch of ``engine.batches`` that is not its last: adds up, and leaves
        the optimizer alone. Some count their steps, whether there are gradients or not, and how many parts a batch has is private.
        """
        if not self._draws_batches or self._part is None or self._part.last or len(self._optimizers) != 1:
            raise UsageError(
                "engine.add_part() · is for parts of a batch of engine.batches with more to come, and one optimizer",
                next="Call optimizer.step() for the last part, or the only one.",
            )
        (optimizer,) = self._optimizers.values()
        self._before_step(optimizer, (optimizer,), {})
        self._after_step(optimizer, (optimizer,), {})

    def same_units(self) -> AbstractContextManager[None]:
        """Inside, several backward passes over the batch's rows add up, unit by unit, before the clipping.

            with engine.same_units():
                first_losses.mean().backward()
                second_losses.mean().backward()
            optimizer.step()

        In a hand-written loop it is the loop's promise that row i is of the same unit in every pass.
        """
        return self._passes.of_same_units()

    def public(self) -> AbstractContextManager[None]:
        """Inside, the user promises: forward and backward passes see no private data (a generator's output that was
        drawn from public noise, for example). Their gradients are neither clipped nor noised; the next step adds them
        as they are, divided by nothing. If the promise is false, so is the guarantee: nobody can check it.
        """
        return self._passes.of_public_data()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the model runs as if frozen: gradients go through it (to a generator before it), none stay in it."""
        return self._passes.of_frozen_model()

    def training(self, part: str) -> AbstractContextManager[None]:
        """Inside, only this part is trained, and the others run as if frozen. For parts with optimizers of their own:

            for batch in engine.batches(table, ...):
                with engine.training("discriminator"):
                    discriminator_losses(batch).mean().backward()
                    discriminator_optimizer.step()
                with engine.training("generator"):
                    generator_losses(batch).mean().backward()
                    generator_optimizer.step()

        Each part may be stepped once for a batch. The batch is charged once, for all parts, stepped or not.
        """
        own = {id(p) for p in self._parameters_of(part)}
        return self._passes.of_part(part, [p for p in self._trainable() if id(p) not in own])

    def accumulate(self, *, more: bool = True) -> AbstractContextManager[None]:
        """For a hand-written loop whose batch comes in micro-batches: inside, ``optimizer.step()`` adds the micro-batch's
        clipped gradients and moves nothing; the first step outside (or with ``more=False``) is that of the last one.

            for i, micro_batch in enumerate(micro_batches):
                with engine.accumulate(more=i + 1 < len(micro_batches)):
                    losses(micro_batch).mean().backward()
                    optimizer.step()

        The sizes may differ. No unit may be in two micro-batches. The whole is one batch, charged once.
        """
        if self._draws_batches:
            raise UsageError(
                "engine.accumulate() · engine.batches cuts its batches itself",
                next="Use engine.batches(..., max_physical_batch_size=), and step after every part.",
            )
        return self._passes.of_one_batch(more)

    def _join(self, part: str) -> None:
        """Hook: all processes meet before the optimizer of a part is attached."""

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _parameters_of(self, part: str) -> Iterable[nn.Parameter]:
        """Of the part's optimizer: without privacy, that alone says what the part is."""
        optimizer = self._optimizers.get(part)
        if optimizer is None:
            raise UsageError(f"part = {part!r} · has no optimizer", next="Call engine.attach(optimizer, part=...).")
        return [p for group in optimizer.param_groups for p in group["params"]]

    def _names_of(self, optimizer: torch.optim.Optimizer, part: str) -> dict[int, str]:
        """What the optimizer must train: everything, or (without privacy) what it says itself of a part."""
        named = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {key: name for key, name in named.items() if key in own} if part else named

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, part: str) -> None:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer = {kind} · is not a torch.optim.Optimizer, so its step cannot be made private",
                next="Attach the optimizer of torch that it holds, or torch.distributed.optim.ZeroRedundancyOptimizer.",
            )
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise UsageError(
                f"{kind}(overlap_with_ddp=True) · steps inside the backward pass, before gradients are clipped",
                next="Leave overlap_with_ddp out.",
            )
        named = self._names_of(optimizer, part)
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing = [name for key, name in named.items() if key not in held]
        if missing:
            raise UsageError(
                f"optimizer · does not train {listed(missing)}, which the model has as trainable",
                next="Give the optimizer all trainable parameters, or freeze these with requires_grad_(False).",
            )
        if len(held) > len(named):
            raise UsageError(
                f"optimizer · also trains {len(held) - len(named)} parameters that are not the "
                f"{'part' if part else 'model'}'s, unprotected",
                next="Give the engine the module that holds them all.",
            )

    def _check_attached(self, max_physical: int | None) -> None:
        """Every trainable parameter has its optimizer, and several optimizers see whole batches."""
        if not self._optimizers:
            raise UsageError(
                "engine.batches · the engine is not attached, so a step would train nothing",
                next="Call engine.attach(optimizer) before the loop.",
            )
        if WHOLE in self._optimizers:
            self._check_optimizer(self._optimizers[WHOLE], WHOLE)  # parameters may have been added or moved since
        held = {id(p) for o in self._optimizers.values() for group in o.param_groups for p in group["params"]}
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise UsageError(
                f"engine.batches · no optimizer trains {listed(missing)}",
                next="Call engine.attach(optimizer, part=...) for every part.",
            )
        if max_physical is not None and len(self._optimizers) > 1:
            raise UsageError(
                f"max_physical_batch_size = {max_physical} · must be left out with {len(self._optimizers)} optimizers: "
                "which units come after the first one's step would depend on who else was drawn",
                next="Use smaller expected batches, or one optimizer for all parts.",
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError
