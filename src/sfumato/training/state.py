"""Checkpoints and exact resume. [shell]

A checkpoint holds the weights, their moving average, the optimizer's state, what was spent, and the ledger's sequence
number. It does not hold noise, nor which units were drawn: both are drawn anew after a resume.
A checkpoint is written beside its place and renamed into it, so it is there whole or not at all.
"""

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import OutsideError, UsageError

KEPT = 2  # checkpoints on disk; older ones are removed


class Average:
    """Exponential moving average of what is sampled and saved: the trained tensors, or those that the model names
    (``averaged``). Post-processing, costs no privacy.

    The decay grows as (1 + step) / (10 + step) up to ``decay``, so that early averages do not remember the first weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in _averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        now = [p.detach() for p in _averaged(model).values()]
        torch._foreach_lerp_(list(self.tensors.values()), now, weight)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's tensors with the averaged ones; a second call undoes it."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                held = self.tensors[name].clone()
                self.tensors[name].copy_(parameter)
                parameter.copy_(held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands. ``step`` counts steps taken by the weights; the ledger may have charged more."""

    step: int = 0
    seconds: float = 0.0  # of training, over all attempts
    units_seen: int = 0  # internal


def save(
    folder: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer, engine: Any, progress: Progress
) -> Path:
    """Writes ``folder/step-NNNNNN`` and points ``folder/last`` at it. Raises OutsideError where the disk says no."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{progress.step:06d}"
    if _target(folder / "last") == final.name and final.is_dir():
        return final  # restored from there, and no step since: to replace it would leave a moment without any
    scratch = folder / f".writing-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        scratch.mkdir()
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, scratch / "model.safetensors")
        save_file({k: v.contiguous() for k, v in average.tensors.items()}, scratch / "average.safetensors")
        tensors, numbers = _flatten(optimizer)
        save_file(tensors, scratch / "optimizer.safetensors")
        state = {
            "format": 1,
            "step": progress.step,
            "seconds": progress.seconds,
            "units_seen": progress.units_seen,
            "engine": engine.state_dict(),
            "optimizer": numbers,
        }
        (scratch / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in scratch.iterdir():
            _sync(path)
        _sync(scratch)
        if final.exists():
            shutil.rmtree(final)  # of an attempt that died before ``last`` pointed there
        scratch.rename(final)
        point_at(folder / "last", final.name)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # a full disk is an OSError to some, and not to safetensors
        shutil.rmtree(scratch, ignore_errors=True)
        raise OutsideError(
            f"checkpoint = {final} · could not be written ({error})",
            next="Free some disk space and run again with --resume; what was spent stays in the ledger.",
        ) from None
    for old in sorted(path for path in folder.glob("step-*") if path != final)[: -(KEPT - 1) or None]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def restore(
    folder: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer, engine: Any
) -> Progress:
    """Continues from ``folder/last``; a folder without one starts at step 0.

    Raises: LedgerError if the checkpoint is newer than the ledger; UsageError if it is not of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    last = folder / "last"
    if not last.exists() and not last.is_symlink():
        return Progress()
    try:
        state = json.loads((last / "state.json").read_text(encoding="utf-8"))
        engine.load_state_dict(state["engine"])
        model.load_state_dict(load_file(last / "model.safetensors"))
        held = load_file(last / "average.safetensors")
        average.tensors = {name: held[name].clone() for name in average.tensors}  # in the model's order, not the file's
        _unflatten(optimizer, load_file(last / "optimizer.safetensors"), state["optimizer"])
        return Progress(step=int(state["step"]), seconds=float(state["seconds"]), units_seen=int(state["units_seen"]))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"checkpoint = {last} · cannot be continued ({type(error).__name__}: {str(error)[:200]})",
            next="Start a new run, or restore the run's folder from a copy that is whole.",
        ) from None


def point_at(link: Path, target: str) -> None:
    """Makes ``link`` a symbolic link to ``target``, replacing an older one in one step."""
    fresh = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _tidy(folder: Path) -> None:
    """What a process left that died within a save. The ledger's lock keeps other writers away."""
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(".last-*"):
        leftover.unlink(missing_ok=True)


def _target(link: Path) -> str | None:
    return os.readlink(link) if link.is_symlink() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _averaged(model: nn.Module) -> dict[str, nn.Parameter]:
    named = getattr(model, "averaged", None)
    return named() if named is not None else {name: p for name, p in model.named_parameters() if p.requires_grad}


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and as JSON numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
