"""What a module's forward leaves behind besides its result, and whether two results agree."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import]

from sfumato.errors import UnsupportedLayer

_CONTAINERS = (list, dict, set)
_OF_TORCH = set(vars(nn.Module()))


class Observed:
    """The tensors that a module holds, and those it is called with, as they were."""

    def __init__(self, module: nn.Module, leaves: list[Any]) -> None:
        self._module = module
        self._parts = list(module.named_modules())
        self._given = [x for x in leaves if isinstance(x, Tensor)]
        self._versions = [_version(x) for x in self._given]
        self._buffers = [(part._buffers, key, x) for _, part in self._parts for key, x in part._buffers.items()]
        self._buffer_versions = [_version(x) for _, _, x in self._buffers]
        self._kept = [dict(_attributes(part)) for _, part in self._parts]
        self._contents = [
            {key: copy.copy(x) for key, x in kept.items() if isinstance(x, _CONTAINERS)} for kept in self._kept
        ]

    def require_untouched(self) -> None:
        """Raises if an argument or a buffer was changed, as another attempt would then see other values."""
        changed = [x is not holder[key] or _version(x) != v for (holder, key, x), v in self._with_versions()]
        if any(changed) or [_version(x) for x in self._given] != self._versions:
            raise UnsupportedLayer(
                f"{type(self._module).__name__} · changes an argument or a buffer in place, so that one row's result "
                "could depend on another's",
                next="Make a new tensor instead.",
            )

    def require_nothing_kept(self, *, alone: bool) -> None:
        """Raises if the module put a result on itself: there it is one row's, or of no use outside.

        Args: alone: only one row was run, so that whatever was kept is this row's.
        """
        for (name, part), kept, contents in zip(self._parts, self._kept, self._contents, strict=True):
            for key, value in [*_attributes(part), *part._buffers.items()]:
                before = kept.get(key, part._buffers.get(key) if alone else None)
                if isinstance(value, _CONTAINERS):
                    values = list(value.values() if isinstance(value, dict) else value)
                    new = len(values) != len(contents.get(key, ())) or value is not before
                    bad = new and any(isinstance(x, Tensor) and (alone or _of_rows(x)) for x in values)
                else:
                    bad = isinstance(value, Tensor) and value is not before and (alone or _of_rows(value))
                if bad:
                    self._restore()
                    where = f"{name}.{key}" if name else key
                    raise UnsupportedLayer(
                        f"{type(self._module).__name__} · keeps what it computed for the rows as an attribute, {where}",
                        next="Return it from forward() instead.",
                    )

    @contextlib.contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        """Everything is put back at the end, buffers with their values."""
        values = [None if x is None else x.clone() for _, _, x in self._buffers]
        try:
            yield
        finally:
            for ((_, _, x), version), value in zip(self._with_versions(), values, strict=True):
                if x is not None and value is not None and _version(x) != version:
                    with torch.no_grad():
                        x.copy_(value)
            self._restore()

    def _with_versions(self) -> Iterator[tuple[tuple[Any, str, Tensor | None], int]]:
        return zip(self._buffers, self._buffer_versions, strict=True)

    def _restore(self) -> None:
        for holder, key, x in self._buffers:
            holder[key] = x
        for (_, part), kept, contents in zip(self._parts, self._kept, self._contents, strict=True):
            for key, value in _attributes(part):
                if key not in kept:
                    del vars(part)[key]
                elif kept[key] is not value:
                    vars(part)[key] = kept[key]
            for key, content in contents.items():
                held = kept[key]
                if len(held) != len(content):
                    held.clear()
                    held.extend(content) if isinstance(held, list) else held.update(content)


def _attributes(part: nn.Module) -> list[tuple[str, Any]]:
    """What could hold a tensor, but for torch's own registers."""
    return [(k, x) for k, x in vars(part).items() if k not in _OF_TORCH and isinstance(x, (Tensor, *_CONTAINERS))]


def _of_rows(x: Tensor) -> bool:
    return x.requires_grad or is_functorch_wrapped_tensor(x)


def _version(x: Tensor | None) -> int:
    return -1 if x is None or x.is_inference() else x._version


def agree(a: Any, b: Any, *, values: bool = True) -> bool:
    """Whether two results are the same up to rounding; without ``values``, in their shapes."""
    found, shape = pytree.tree_flatten(a)
    other, other_shape = pytree.tree_flatten(b)
    if shape != other_shape:
        return False
    for x, y in zip(found, other, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return False
        if isinstance(x, Tensor) and (x.shape != y.shape or (values and not _close(x.detach(), y))):
            return False
    return True


def _close(x: Tensor, y: Tensor) -> bool:
    if not (x.is_floating_point() or x.is_complex()):
        return bool((x == y).all())
    tolerance = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}
    rounding = max(tolerance.get(kind, 5e-2) for kind in (x.dtype, y.dtype))
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    size = float(y.abs().nan_to_num(0, 0, 0).max()) if y.numel() else 0.0
    return bool(torch.allclose(x, y, rtol=rounding, atol=rounding * size, equal_nan=True))
