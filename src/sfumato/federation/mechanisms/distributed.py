"""Shares of discrete noise, of which a secure aggregation shows the sum only: the accuracy of noise at the server, without its trust.

Claim. Unit: one site, all of its data; against the server and everybody, as long as the secure aggregation shows nothing but the sum of
at least n - dropouts sites, and at most ``colluders`` of these tell their noise. In a round every site

1. scales its update to L2 norm at most S, pads it to D = 2^k numbers, multiplies by random public signs and rotates (Walsh-Hadamard
   / sqrt D), which keeps the norm and spreads it evenly, and multiplies by a public ``scale``: Delta = S scale steps;
2. rounds each number to a whole one at random, up with the probability of its rest, and draws the whole rounding again until its norm is
   at most B, B^2 = min{Delta^2 + D/4 + sqrt(2 ln(1/beta)) (Delta + sqrt(D)/2), (Delta + sqrt(D))^2}. So the norm is B at most, always:
   the bound is checked on whole numbers, and does not rest on chance or on floating point;
3. adds N_Z(0, s^2) to every number, s^2 = ((z B)^2 + 4) / (n - t), t = dropouts + colluders;
4. sends the result modulo 2^bits.

The server sees the sum modulo 2^bits. Two data sets of one site move the sum by 2 B at most (replace_one; B for zero_out), and
the shares of the n - t others and itself that are there and secret have variance (z B)^2 + 4 together: a Gaussian mechanism of
noise multiplier z, but for the slack that ``privacy.site_updates`` derives from the tau of the paper. Modulo, scale, rotation
and the public denominator are post-processing; a number that wraps around costs accuracy, not privacy, and happens to any of a
round's with probability ``wrap`` at most.

The largest scale is taken that leaves the sum within 2^bits: a finer grid makes B / Delta, what rounding adds to the noise, smaller.
Not amplified: all sites are asked in every round. Weights are equal; the denominator is the number of holders of a parameter, public.

Charged: one event a round, to every site's ledger, before its data are read. Up to ``dropouts`` silent sites leave the noise sufficient;
with more, the sum must not be opened: the round is discarded, and stays charged. Limit: a hostile site can send any vector, which
nobody sees; it ruins a round's step, not the privacy of others. The bound on its own update is kept by each site for itself.

Source: Kairouz, Liu & Steinke 2021, arXiv:2102.06387, algorithms 1 and 2, Theorem 1, Proposition 22; modular sums of secure aggregation
Bonawitz et al. 2017. Differs: the shares count for n - t sites, not n; the slack (``site_updates``); the scale is found from a
bound on wrapping that needs no estimate of the updates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as settings
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Combine, Promise, Received, updates
from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.federation.update_plans import Grid
from sfumato.privacy.site_updates import SiteUpdates
from sfumato.randomness import TestRandom

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random

TRIALS = 200  # of a rounding; each fails with probability beta at most

_VECTOR = "sum"


@dataclass(frozen=True)
class Distributed:
    settings: settings.Distributed
    name: ClassVar[str] = "distributed"
    of_sum: ClassVar[bool] = True
    robust: ClassVar[bool] = False

    def plan(self, public: Public) -> SiteUpdates:
        return self._numbers(public)[0]

    def grid(self, public: Public) -> Grid:
        return self._numbers(public)[1]

    def _numbers(self, public: Public) -> tuple[SiteUpdates, Grid]:
        updates.check_shapes(public)
        return update_plans.distributed(self.settings, len(public.sites), public.rounds, public.dimension)

    def promise(self, public: Public) -> Promise:
        if public.largest_rate < 1 or min(public.rates.values()) < 1 or len(set(public.weights.values())) > 1:
            raise UsageError(
                f"rates = {dict(public.rates)}, weights = {dict(public.weights)} · under distributed noise every site takes part in every "
                "round, and weighs the same: the shares of all of them are the noise",
                next="Set federation.selection: {kind: everyone} and federation.weights: equal.",
            )
        plan = self.plan(public)
        return Promise(
            unit="site",
            trains="free",
            trust=f"distributed: the server sees the noisy sum only, by secure aggregation; up to {self.settings.colluders} sites may "
            "tell it their noise",
            at_site=plan,
            composition=f"{public.rounds} sums of discrete Gaussians, one a round, each a Gaussian mechanism but for a factor of "
            f"exp({plan.slack or 0:.2g}); not amplified",
            dropouts=f"Up to {self.settings.dropouts} silent sites leave enough noise; with more the sum is not opened, the round is "
            "discarded, and stays charged.",
        )

    def begin(self, public: Public) -> Part:
        return Part(values={"rotation": 1})

    def ask(self, memory: Part) -> dict[str, Json]:
        return {"rotation": _rotation(memory.values), "bits": self.settings.bits}

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        """{"sum": (D,) int64 in [0, 2^bits)}: to be added modulo 2^bits."""
        if told.get("bits") != self.settings.bits:
            raise UsageError(
                f"bits = {told.get('bits')} · must be {self.settings.bits}, as this site's settings say",
                next="Refuse it.",
            )
        grid = self.grid(public)
        vector = updates.clipped(updates.flat(update, public.shapes), self.settings.max_update_norm)
        rotated = rotate(padded(vector, grid.dimension), _rotation(told)) * grid.scale
        whole = rounded(rotated, grid.bound, chance)
        return Part(tensors={_VECTOR: (whole + share(grid, chance)).remainder(2**self.settings.bits)})

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        if received.sum is None or set(received.sum) != {_VECTOR}:
            raise UsageError(
                "sum · is not given: a single site's share of noise protects nobody, so no single update may be seen",
                next="Collect by secure aggregation.",
                code="not_aggregated",
            )
        if len(received.sites) < len(public.sites) - self.settings.dropouts:
            raise UsageError(
                f"replies = {len(received.sites)} of {len(public.sites)} · at least {len(public.sites) - self.settings.dropouts} "
                f"are needed: "
                "with fewer the sum has less noise than was promised",
                next="Discard the round; it stays charged.",
                code="too_few_sites",
            )
        grid = self.grid(public)
        signed = centred(received.sum[_VECTOR], self.settings.bits)
        turn = _rotation(memory.values)
        vector = rotate_back(signed.double() / grid.scale, turn)[: public.dimension]
        step = {
            name: tensor / len(public.holders[name]) for name, tensor in updates.shaped(vector, public.shapes).items()
        }
        return updates.of_type(step, {}), replace(memory, values={**memory.values, "rotation": turn + 1})

    def in_words(self, public: Public) -> str:
        plan, grid = self._numbers(public)
        lost = grid.bound / (self.settings.max_update_norm * grid.scale)
        return (
            f"Every site scales its update to length {plan.max_update_norm:g} at most, writes it in whole numbers of "
            f"1/{grid.scale:.4g} and adds "
            f"discrete noise of standard deviation {grid.share_std:.4g} steps; the server sees the sum modulo "
            f"2^{self.settings.bits} only. Rounding "
            f"makes the bound {lost:.4g} times as large. Over {plan.rounds} rounds all data of a site are ({plan.epsilon():.4g}, "
            f"{plan.delta:g})-private ({plan.adjacency}) against the server and everybody, with {self.settings.dropouts} sites silent and "
            f"{self.settings.colluders} others colluding."
        )


# ---- what a site does to its vector, and what the server undoes ----


def padded(vector: "Tensor", dimension: int) -> "Tensor":
    import torch

    return torch.nn.functional.pad(vector, (0, dimension - len(vector)))


def rotate(vector: "Tensor", turn: int) -> "Tensor":
    """H diag(signs) x / sqrt D: keeps the norm. Args: vector: (D,) float64, D a power of two; turn: which signs, public."""
    return _hadamard(vector * _signs(len(vector), turn))


def rotate_back(vector: "Tensor", turn: int) -> "Tensor":
    return _hadamard(vector) * _signs(len(vector), turn)


@lru_cache(maxsize=2)
def _signs(dimension: int, turn: int) -> "Tensor":
    """(D,) of +-1. Public, the same at every site: a repeatable stream is right here, and there is nothing to hide."""
    import numpy as np
    import torch

    bits = np.unpackbits(np.frombuffer(TestRandom(f"rotation {turn}").bytes(-(-dimension // 8)), dtype=np.uint8))
    return torch.from_numpy(1.0 - 2.0 * bits[:dimension].astype(np.float64))


def _hadamard(vector: "Tensor") -> "Tensor":
    """The Walsh-Hadamard transform over sqrt D, in D log D additions; its own inverse."""
    import torch

    x, half = vector.clone(), 1
    while half < len(vector):
        pairs = x.view(-1, 2, half)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1).view(-1)
        half *= 2
    return x / math.sqrt(len(vector))


def rounded(vector: "Tensor", bound: float, chance: "Random") -> "Tensor":
    """(D,) int64: each number rounded up with the probability of its rest, else down, all of them again until the norm is at most
    ``bound``. Where no trial was short enough, towards zero, which never lengthens.

    Guarantee: the L2 norm of what is returned is at most ``bound``, for every vector.
    """
    import torch

    down = vector.floor()
    rest, most = vector - down, math.floor(bound * bound)
    for _ in range(TRIALS):
        coins = torch.from_numpy(chance.uniform(len(vector)))
        whole = (down + (coins < rest)).to(torch.int64)
        if _square(whole) <= most:
            return whole
    whole = vector.trunc().to(torch.int64)
    return whole if _square(whole) <= most else torch.zeros_like(whole)


def _square(whole: "Tensor") -> int:
    """The squared norm, exactly, in halves of 31 bits, of up to 2^31 numbers."""
    if len(whole) and int(whole.abs().max()) >= 2**31:
        return 2**200  # longer than any bound
    squares = whole * whole  # each below 2^62
    low, high = squares.bitwise_and(2**31 - 1), squares >> 31
    return int(low.sum()) + (int(high.sum()) << 31)


def share(grid: Grid, chance: "Random") -> "Tensor":
    """(D,) int64: one site's noise."""
    import torch

    from sfumato.privacy.discrete import discrete_gaussian

    if grid.noise_multiplier == 0:
        return torch.zeros(grid.dimension, dtype=torch.int64)
    return torch.from_numpy(discrete_gaussian(grid.dimension, grid.share_std, chance))


def centred(total: "Tensor", bits: int) -> "Tensor":
    """Of a sum modulo 2^bits, the number next to zero: in [-2^(bits-1), 2^(bits-1))."""
    import torch

    modulo = total.to(torch.int64).remainder(2**bits)
    return torch.where(modulo >= 2 ** (bits - 1), modulo - 2**bits, modulo)


def _rotation(values: Mapping[str, Json]) -> int:
    turn = values.get("rotation")
    if not isinstance(turn, int) or isinstance(turn, bool) or turn < 1:
        raise UsageError(
            f"rotation = {turn!r} · must be a whole number from 1", next="Ask again: the server must tell it."
        )
    return turn


def modular_sum(parts: "Mapping[str, State]", bits: int) -> "dict[str, Tensor]":
    """What a secure aggregation yields of the sites' parts: for tests and for simulations that say so."""
    import torch

    vectors = [part[_VECTOR] for _, part in sorted(parts.items())]
    return {_VECTOR: torch.stack(vectors).sum(0).remainder(2**bits)}
