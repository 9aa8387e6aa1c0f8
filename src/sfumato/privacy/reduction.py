"""The sum of clipped gradients over parts and processes, and what is released of it: the sum plus one Gaussian.

Claim, for W processes: ``released`` gives (sum over all units that any of them drew, of clipped gradients, + N(0, std^2)
in every coordinate) / divisor, where the noise of a coordinate is drawn once, by one process, from its own secret source (correlated
noise: by the same process in every step, which alone keeps what it drew before).
So what one unit can change, and how much noise covers it, is what it is with one process. The sum over processes is taken
in float32 (float64 for float64 parameters); noise is made and added in float64, on the grid of ``noise``, after that sum.

A *replicated* parameter is reduced in buckets: reduce-scatter, so that each process has the sum of 1/W of the
coordinates; noise on that shard; all-gather of the released shards, so that all replicas get the same bits.

A *sharded* parameter (``fully_shard``) is reduce-scattered after every layer of every part, to the very shard that this
process holds; noise goes on that shard, which nobody else has, and ``.grad`` is a DTensor of the parameter's placement.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.privacy.gradients.bookkeeping import Layer
from sfumato.privacy.processes import Processes, is_sharded
from sfumato.privacy.step_noise import StepNoise

BUCKET = 2**22  # coordinates of replicated parameters that are reduced at once: 16 MB of float32


class Reduction:
    """The sum of one batch, over its physical parts and all processes, for the parameters of one optimizer.

    Args:
      layers: the protected layers, in the order in which all processes reduce them.
    """

    def __init__(self, layers: Sequence[Layer], processes: Processes) -> None:
        self._processes = processes
        self._parameters = list(dict.fromkeys(p for layer in layers for p in layer.parameters))
        self._places = {id(layer): i for i, layer in enumerate(layers)}
        last_use = {p: i for i, layer in enumerate(layers) for p in layer.parameters}
        self._sharded: list[list[nn.Parameter]] = [[] for _ in layers]  # by the last layer that uses them
        for parameter in self._parameters:
            if is_sharded(parameter):
                self._sharded[last_use[parameter]].append(parameter)
        self._sums: dict[nn.Parameter, Tensor] = {}  # of this process; of a sharded parameter, of all: its own shard
        self._pending: dict[nn.Parameter, Tensor] = {}  # of this process, of a sharded parameter: whole
        self._reduced_layers = 0  # of this part

    def clear(self) -> None:
        self._sums, self._pending, self._reduced_layers = {}, {}, 0

    def add(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Adds this process's clipped gradients of a parameter, of the parameter's whole shape."""
        sums = self._pending if is_sharded(parameter) else self._sums
        sums[parameter] = sums[parameter] + value if parameter in sums else value

    def layer_done(self, layer: Layer) -> None:
        """Layers up to this one have been added: what is sharded of them is reduced, and no longer held whole.

        A meeting of all processes for every layer that has sharded parameters; ``part_done`` catches up on the rest, so
        that a process without rows, or with a layer that it did not use, meets as often as the others.
        """
        self._reduce_to(self._places[id(layer)])

    def part_done(self) -> None:
        self._reduce_to(len(self._sharded) - 1)
        self._reduced_layers = 0

    def _reduce_to(self, place: int) -> None:
        while self._reduced_layers <= place:
            parameters = self._sharded[self._reduced_layers]
            self._reduced_layers += 1
            if parameters:
                self._reduce(parameters)

    def released(
        self, stds: dict[nn.Parameter, float], divisor: float, noise: StepNoise
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with (sum + noise) / divisor, in its type and placement. The sums are dropped.

        Args: stds: the noise's standard deviation, for every parameter.
        """
        sharded = [p for p in self._parameters if is_sharded(p)]
        replicated = [p for p in self._parameters if not is_sharded(p)]
        for parameter in sharded:
            local, value = self._local(parameter), self._sums.pop(parameter, None)
            local = _noisy(parameter, local, value, stds[parameter], divisor, noise)
            yield parameter, _as_sharded(local, parameter)
        if not self._processes.together:
            for parameter in replicated:
                value = self._sums.pop(parameter, None)
                yield parameter, _noisy(parameter, parameter, value, stds[parameter], divisor, noise)
        else:
            yield from self._released_together(replicated, stds, divisor, noise)
        self.clear()

    # -- inside --

    def _released_together(
        self, parameters: list[nn.Parameter], stds: dict[nn.Parameter, float], divisor: float, noise: StepNoise
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        out = {p: torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters}
        for number, bucket in enumerate(_buckets(parameters, stds)):
            first, std = bucket[0][0], stds[bucket[0][0]]
            size = sum(stop - start for _, start, stop in bucket)
            width = -(-size // self._processes.size)  # of one process's shard; the last ones may be padding
            flat = torch.zeros(width * self._processes.size, dtype=_wide(first.dtype), device=first.device)
            for piece, (parameter, start, stop) in zip(_cut(flat, bucket), bucket, strict=True):
                if parameter in self._sums:
                    piece.copy_(self._sums[parameter].reshape(-1)[start:stop])
            shard = flat.new_empty(width)
            self._processes.reduce_scatter(shard, flat)
            shard = _noisy(number, shard.to(first.dtype), shard, std, divisor, noise)
            whole = shard.new_empty(len(flat))
            self._processes.all_gather(whole, shard)
            for piece, (parameter, start, stop) in zip(_cut(whole, bucket), bucket, strict=True):
                out[parameter].view(-1)[start:stop] = piece
        yield from out.items()

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """Whole sums of sharded parameters of one layer -> the sum over all processes of this one's shards."""
        size = self._processes.size
        for kind, device in dict.fromkeys((_wide(p.dtype), p.device) for p in parameters):
            alike = [p for p in parameters if (_wide(p.dtype), p.device) == (kind, device)]
            widths = [_padded(p, size) for p in alike]
            rows = torch.zeros(size, sum(widths), dtype=kind, device=self._compute_device(alike))
            start = 0
            for parameter, width in zip(alike, widths, strict=True):
                value = self._pending.pop(parameter, None)
                if value is not None:
                    for row, piece in zip(rows, value.chunk(size, _dimension(parameter)), strict=False):
                        row[start : start + piece.numel()] = piece.reshape(-1)
                start += width
            shard = rows.new_empty(rows.shape[1])
            self._processes.reduce_scatter(shard, rows.view(-1))
            start = 0
            for parameter, width in zip(alike, widths, strict=True):
                local = self._local(parameter)
                mine = shard[start : start + local.numel()].view(local.shape).to(local.device)
                self._sums[parameter] = self._sums[parameter] + mine if parameter in self._sums else mine.clone()
                start += width

    def _compute_device(self, parameters: list[nn.Parameter]) -> torch.device:
        """Where the layer was computed: not where its shard rests, if that is the CPU's memory."""
        for parameter in parameters:
            if parameter in self._pending:
                return self._pending[parameter].device
        return parameters[0].device if parameters[0].device.type != "cpu" else self._processes.device

    @staticmethod
    def _local(parameter: Any) -> Tensor:
        return parameter.to_local()


def _noisy(key: Hashable, like: Tensor, value: Tensor | None, std: float, divisor: float, noise: StepNoise) -> Tensor:
    """(value + noise) / divisor, in float64 until it is rounded to the type of ``like``; its shape and device too."""
    plus = None if value is None else value.reshape(-1).cpu()
    noisy = noise.added(key, like.numel(), std, plus).div_(divisor)
    return noisy.to(like.dtype).view(like.shape).to(like.device)


def _as_sharded(local: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )  # fmt: skip


def _dimension(parameter: Any) -> int:
    return parameter.placements[0].dim


def _padded(parameter: nn.Parameter, size: int) -> int:
    """Coordinates of the largest shard: ``torch.chunk`` gives the first processes ceil(n / W) rows each."""
    length = parameter.shape[_dimension(parameter)]
    return 0 if length == 0 else -(-length // size) * (parameter.numel() // length)


def _wide(kind: torch.dtype) -> torch.dtype:
    return kind if kind in (torch.float32, torch.float64) else torch.float32


Piece = tuple[nn.Parameter, int, int]  # a parameter's coordinates from .. to


def _buckets(parameters: Iterable[nn.Parameter], stds: dict[nn.Parameter, float]) -> Iterator[list[Piece]]:
    """All coordinates, in order, in buckets of at most ``BUCKET``; of one type, device and noise each."""
    bucket: list[Piece] = []
    room, kind = BUCKET, None
    for parameter in parameters:
        if bucket and kind != (parameter.dtype, parameter.device, stds[parameter]):
            yield bucket
            bucket, room = [], BUCKET
        kind = (parameter.dtype, parameter.device, stds[parameter])
        start = 0
        while start < parameter.numel():
            stop = min(parameter.numel(), start + room)
            bucket.append((parameter, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def _cut(flat: Tensor, bucket: list[Piece]) -> Iterator[Tensor]:
    start = 0
    for _, first, last in bucket:
        yield flat[start : start + last - first]
        start += last - first
