"""Several processes that train one model together (``torch.distributed``): who we are, and what all must agree on.

**What is sampled.** Unit number i belongs to process i mod W alone. Every process draws its own units, each with the same
probability q, from its own secret source: together an exact Poisson sample. Who was drawn is told to nobody.
**What is sent** between processes (docs/processes.md has the whole list): sums of clipped gradients and adaptive counts
*before* the noise, how many physical parts a draw takes, settings, messages of errors. All processes are inside the
boundary, and so is the wire between them.
**What is charged**: one event for a step of all of them, in one ledger, which process 0 alone holds.
**What is released** of a step is described in ``reduction``.

``attach``, ``batches``, every draw and every ``optimizer.step()`` are *meetings*: all processes must come to each of
them, in the same order. An error that the engine finds in one process is raised in all of them at the next meeting; a
process that has ended makes the others' meeting raise OutsideError.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfumato import errors
from sfumato.errors import OutsideError, SfumatoError, UsageError

T = TypeVar("T")


class Processes:
    """The W = ``size`` processes of one training; this one is number ``rank``.

    Args: group: a process group of ``torch.distributed``; None for a process on its own, whose meetings cost nothing.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def current(cls) -> "Processes":
        """All processes that ``torch.distributed`` knows of; this one alone where it was not initialised."""
        there = dist.is_available() and dist.is_initialized()
        return cls(dist.group.WORLD if there else None)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone writes."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        return self.size > 1

    @property
    def device(self) -> torch.device:
        """Where tensors for a meeting must be: NCCL takes none from the CPU."""
        if self.group is not None and "gloo" not in str(dist.get_backend_config(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    # -- which units are ours --

    def own_units(self, num_units: int) -> np.ndarray:
        """(n,) int64: rank, rank + W, rank + 2 W, ...; every unit is in exactly one process's share."""
        return np.arange(self.rank, num_units, self.size, dtype=np.int64)

    def equal_parts(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """The same units in as many parts as the process with the most has, so that all meet equally often.

        A process with fewer units gets smaller parts, empty ones at the end if need be.
        """
        most = self.largest(len(parts))
        return parts if most == len(parts) else np.array_split(np.concatenate(parts), most)

    # -- meetings --

    def largest(self, value: int) -> int:
        return int(self._reduced([value], dist.ReduceOp.MAX)[0]) if self.together else value

    def total(self, values: Sequence[float]) -> list[float]:
        return self._reduced(list(values), dist.ReduceOp.SUM) if self.together else list(values)

    def anyone(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return self.largest(int(flag)) > 0

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A meeting at the end of the block: what was raised in one process is raised in all."""
        if not self.together:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        if self.anyone(mine is not None):
            found = self._gathered(None if mine is None else _described(mine))
            if mine is not None:
                raise mine
            rank, described = next((i, d) for i, d in enumerate(found) if d is not None)
            raise _rebuilt(described, f"process {rank} of {self.size}: ")

    def decide(self, choose: Callable[[], T]) -> T:
        """Process 0 calls ``choose``; all get its result, or raise its error."""
        if not self.together:
            return choose()
        mine: Exception | None = None
        answer: list[Any] = [None]
        if self.first:
            try:
                answer = [("done", choose())]
            except Exception as error:
                mine, answer = error, [("failed", _described(error))]
        with _meeting(self.size):
            dist.broadcast_object_list(answer, src=self._source, group=self.group, device=self.device)
        if mine is not None:
            raise mine
        kind, value = answer[0]
        if kind == "failed":
            raise _rebuilt(value, "process 0: ")
        return value

    def require_same(self, what: str, **values: Any) -> None:
        """Raises UsageError, in all processes, if one of the values is not the same in all of them."""
        if not self.together:
            return
        found = self._gathered({name: repr(value) for name, value in values.items()})
        for name in values:
            given = [values[name] for values in found]
            if len(set(given)) > 1:
                shown = ", ".join(f"{value[:60]} in process {rank}" for rank, value in enumerate(given[:4]))
                raise UsageError(
                    f"{what}: {name} = {shown} · must be the same in all {self.size} processes",
                    next="Give every process the same model, settings and whole data set; the engine shares the units out.",
                )

    def require_different(self, secret: bytes) -> None:
        """Raises UsageError if two processes draw the same bytes: the same noise twice, in different places."""
        if not self.together:
            return
        found = self._gathered(hashlib.sha256(secret).hexdigest())
        if len(set(found)) < self.size:
            raise UsageError(
                "random · gives the same bytes in two processes, so their noise would be the same",
                next="Leave random out; in a test, give TestRandom(another seed in each process).",
            )

    # -- replicas --

    def make_equal(self, model: nn.Module) -> None:
        """Copies process 0's parameters and buffers to the others, but for those that are sharded.

        As ``DistributedDataParallel`` does. Raises UsageError if the models are not of one shape.
        """
        if not self.together:
            return
        tensors = [(name, t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
        self.require_same(
            "model", tensors=_short([(n, tuple(t.shape), str(t.dtype), is_sharded(t)) for n, t in tensors])
        )
        with _meeting(self.size):
            for _, tensor in tensors:
                if not is_sharded(tensor):
                    whole = tensor.contiguous()
                    dist.broadcast(whole, src=self._source, group=self.group)
                    if whole is not tensor:
                        tensor.copy_(whole)

    def require_equal(self, named: dict[str, Tensor]) -> None:
        """Raises UsageError, naming them, if replicated parameters differ in a bit between two processes.

        The sum of a tensor's bits, read as integers: cheap, and different unless by a rare chance.
        """
        replicated = {name: t.detach() for name, t in named.items() if not is_sharded(t)}
        if not self.together or not replicated:
            return
        sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in replicated.values()]).to(self.device)
        both = torch.stack([sums, -sums])
        with _meeting(self.size):
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        if bool((both[0] != -both[1]).any()):
            wrong = [name for name, bad in zip(replicated, (both[0] != -both[1]).tolist(), strict=True) if bad]
            raise UsageError(
                f"{', '.join(wrong[:10])} · no longer the same in all {self.size} processes",
                next="Change parameters through the optimizer alone, and load a checkpoint in every process.",
            )

    # -- inside --

    @property
    def _source(self) -> int:
        return dist.get_global_rank(self.group, 0)

    def _reduced(self, values: list[Any], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _meeting(self.size):
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def _gathered(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        with _meeting(self.size):
            dist.all_gather_object(out, value, group=self.group)
        return out

    def reduce_scatter(self, out: Tensor, flat: Tensor) -> None:
        """flat (W n,) -> out (n,): the sum over processes, of which process r gets entries r n to (r + 1) n."""
        if not self.together:
            out.copy_(flat)
            return
        with _meeting(self.size):
            _named("reduce_scatter_single", "reduce_scatter_tensor")(out, flat, group=self.group)

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """shard (n,) -> out (W n,), bit by bit the same in all processes."""
        with _meeting(self.size):
            _named("all_gather_single", "all_gather_into_tensor")(
                out.view(torch.uint8), shard.view(torch.uint8), group=self.group
            )

    def all_reduce(self, tensor: Tensor) -> None:
        with _meeting(self.size):
            dist.all_reduce(tensor, group=self.group)


@contextmanager
def _meeting(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: "Connection closed by peer"; NCCL: DistBackendError
        raise OutsideError(
            f"processes = {size} · one of them has ended, or does not answer ({str(error).splitlines()[0][:200]})",
            next="See what it said last. What was spent is in the ledger: run again, with --resume or from a checkpoint.",
            code="process_ended",
        ) from error


def _named(new: str, old: str) -> Any:
    """torch 2.13 renamed some collectives, and warns of the older names."""
    return getattr(dist, new, None) or getattr(dist, old)


def _described(error: Exception) -> dict[str, str]:
    if isinstance(error, SfumatoError):
        return {"kind": type(error).__name__, **error.as_dict()}
    return {"kind": "SfumatoError", "code": "internal", "message": f"{type(error).__name__}: {error}", "next": ""}


def _rebuilt(described: dict[str, str], prefix: str) -> SfumatoError:
    kind = getattr(errors, described["kind"], SfumatoError)
    return kind(prefix + described["message"], next=described["next"], code=described["code"])


def _short(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


# ---- sharded parameters, and wrappers that we cannot see through ----


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of it only (a ``DTensor``)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def let_go(model: nn.Module) -> None:
    """What ``fully_shard`` still holds whole after a forward pass is sharded again: the optimizer has the shards."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, sharded parameters of this very module are whole ones of the same numbers. A meeting, if it has any."""
    sharded = {name: p for name, p in module._parameters.items() if p is not None and is_sharded(p)}
    for name, parameter in sharded.items():
        whole = parameter.detach().full_tensor()  # type: ignore[attr-defined]
        module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for name, parameter in sharded.items():
            module._parameters[name] = parameter


def sharding_problem(model: nn.Module, processes: Processes) -> list[str]:
    """What of the model's sharding is not that of ``fully_shard`` over these processes, parameter by parameter."""
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return []
    ours = tuple(name for name, module in model.named_modules() if is_fully_sharded(module))
    ranks = [0] if processes.group is None else dist.get_process_group_ranks(processes.group)
    problems = []
    for name, parameter in sharded.items():
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        if mesh.ndim > 1:
            dimensions = mesh.mesh_dim_names or tuple(f"dimension {i}" for i in range(mesh.ndim))
            problems.append(
                f"{name}: a mesh of {mesh.ndim} dimensions ({', '.join(dimensions)}; HSDP or tensor parallel)"
            )
        elif not any(not prefix or name.startswith(prefix + ".") for prefix in ours) or not placements[0].is_shard():
            problems.append(f"{name}: {placements[0]} without fully_shard (tensor parallel)")
        elif mesh.mesh.flatten().tolist() != ranks:
            problems.append(f"{name}: sharded over processes {mesh.mesh.tolist()}, trained by {ranks}")
    return problems


_WRAPPERS = (  # by name: none of these is imported
    ("deepspeed.", "DeepSpeedEngine", "DeepSpeed's engine reduces gradients before they are clipped, and steps by itself"),
    ("deepspeed.", "PipelineModule", "DeepSpeed's pipeline shows no process a whole per-unit gradient"),
    ("torch.distributed.fsdp.", "FullyShardedDataParallel", "FSDP version 1 reduces gradients before they are clipped"),
    ("torch.distributed.pipelining.", "Pipe", "pipeline parallelism shows no process a whole per-unit gradient"),
    ("torch.distributed.pipelining.", "_PipelineStageBase", "pipeline parallelism shows no process a whole per-unit gradient"),
    ("torch.distributed.pipelining.", "_PipelineSchedule", "pipeline parallelism shows no process a whole per-unit gradient"),
)  # fmt: skip


def wrapper_problem(value: Any) -> str | None:
    """Why this model (or a part of it) belongs to a way of parallel training that is not supported; None if it does not."""
    for base in type(value).__mro__:
        for package, name, reason in _WRAPPERS:
            if base.__name__ == name and f"{base.__module__}.".startswith(package):
                return f"{reason}: use torch's fully_shard, or give every process the plain module"
    return None
