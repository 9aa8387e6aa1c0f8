"""Before the first round: every site releases noisy sums of its records, once; the server adds them. Pure functions.

Claim. Site k gives of each part r_k = (sum over its units of x, plus N(0, N_k^2 s_k^2)) / N_k, |x| <= 1, by its own plan
(``Site.opening``), charged to its own ledger before its records are read: what of a person leaves it is that one event. N_k is
public. The server forms sum_k N_k r_k / sum_k N_k over the sites that answered, whose noise has the variance
sum_k N_k^2 s_k^2 / (sum_k N_k)^2: a weighted mean of what is already private. What is made of it, the weights that round 1
begins at, is post-processing.

A site holds the parts that it has; its share of the guarantee is then all for those. A site that is silent is left out, and
charged if it was asked. Where fewer than ``least_sites`` answer, nothing is released, and training begins at fresh weights.

The opening is round 0 of the state machine (``rounds``), one exchange of kind "release".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from sfumato.errors import UsageError
from sfumato.federation.averaging import check_update, fedavg
from sfumato.federation.messages import Ask, Json, Part, Reply
from sfumato.federation.public import Public

if TYPE_CHECKING:
    from torch import Tensor

KIND = "release"
PREFIX = "released."  # before a part's name where ``federation.holds`` names what a site has
_ENOUGH, _TIMES = 3, 2.0  # sites, to tell who disagrees; of the median length
_SURELY = 5.0  # standard deviations of the noise: an honest site that is all noise is believed
_BEYOND = 6.0  # standard deviations: an honest site is longer once in 10^9


@dataclass(frozen=True, kw_only=True)
class Released:
    """One part, as everybody may know it. Attributes: noise_std: of every number, over the site's population."""

    shape: tuple[int, ...]
    noise_std: float


def announced(public: Public, releases: Mapping[str, Mapping[str, Released]]) -> Public:
    """The constants of a run whose sites release these parts first. Args: releases: by site and part."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site, parts in releases.items():
        for name, part in parts.items():
            if shapes.setdefault(name, part.shape) != part.shape:
                raise UsageError(
                    f"{name} = {part.shape} at {site} · is {shapes[name]} at another site", next="Release the same."
                )
    return replace(
        public,
        released={name: shapes[name] for name in sorted(shapes)},
        releasing={name: tuple(sorted(s for s in releases if name in releases[s])) for name in sorted(shapes)},
        release_noise={site: {n: part.noise_std for n, part in parts.items()} for site, parts in releases.items()},
    )


def asks(run: str, recipe: str, public: Public) -> dict[str, Ask]:
    """Every site that holds a part, by name."""
    sites = sorted({site for held in public.releasing.values() for site in held})
    return {site: Ask(run=run, round=0, exchange=0, kind=KIND, values={"recipe": recipe}) for site in sites}


def check(site: str, reply: Reply, public: Public) -> None:
    """Raises UsageError unless the reply holds this site's parts, in their shapes, float64 and finite, and no longer than they
    can be: a mean of vectors of length at most 1 is, but for its noise, so a site that lies has no more than its own weight.
    """
    import torch

    held = {name: shape for name, shape in public.released.items() if site in public.releasing[name]}
    like = {name: torch.empty(shape, dtype=torch.float64) for name, shape in held.items()}
    check_update(site, reply.tensors, like=like)
    for name, shape in held.items():
        longest = 1.0 + public.release_noise[site][name] * (math.sqrt(math.prod(shape)) + _BEYOND)
        length = float(reply.tensors[name].double().norm())
        if length > longest:
            raise UsageError(
                f"site {site}: {name} has length {length:.3g} · must be at most {longest:.3g}, of vectors of length 1 and their noise",
                next="Leave the site out.",
                code="too_long",
            )


def disagreeing(public: Public, replies: Mapping[str, Reply]) -> dict[str, str]:
    """By site, why its release is not believed: asked where hostile sites are reckoned with (a robust ``federation.aggregation``).

    Sites hold different people, so their means may differ in every coordinate, and a median by coordinate would be of nobody. But
    means over people have much in common. Of a part that three sites or more gave, a site is out whose mean points away from
    most of the others' (a negative inner product), or is over twice as long as the median, the noise's own length taken off; by
    more than its noise can do. Lengths and angles of what is private already: post-processing. A minority that says what honest
    sites might say stays.
    """
    found = {}
    for name, holders in public.releasing.items():
        came = {site: replies[site].tensors[name].double().flatten() for site in holders if site in replies}
        if len(came) < _ENOUGH:
            continue
        numbers, noise = math.prod(public.released[name]), {site: public.release_noise[site][name] for site in came}
        squares = {site: float(one @ one) for site, one in came.items()}
        signal = {site: max(0.0, squares[site] - noise[site] ** 2 * numbers) for site in came}
        usual = median(signal.values())
        for site, own in came.items():
            against = 0
            for other in came:
                spread = math.sqrt(
                    noise[site] ** 2 * signal[other]
                    + noise[other] ** 2 * signal[site]
                    + (noise[site] * noise[other]) ** 2 * numbers
                )
                against += other != site and float(own @ came[other]) < -_SURELY * spread
            spread = noise[site] * math.sqrt(2 * noise[site] ** 2 * numbers + 4 * signal[site])
            if 2 * against > len(came) - 1:
                found[site] = f"{name} points away from that of {against} of the {len(came) - 1} other sites"
            elif signal[site] > _TIMES**2 * usual + _SURELY * spread:
                found[site] = (
                    f"{name} has length {math.sqrt(signal[site]):.3g} without its noise, the median of the sites {math.sqrt(usual):.3g}"
                )
    return found


def combined(public: Public, replies: Mapping[str, Reply]) -> Part:
    """The means, weighted by the public populations, and by part the sites that are in it; a part that nobody gave is missing.

    Args: replies: that ``check`` has passed.
    """
    came = {site: reply.tensors for site, reply in replies.items()}
    tensors: dict[str, Tensor] = fedavg(came, {site: public.populations[site] for site in came})
    who: dict[str, Json] = {name: [site for site in sorted(came) if name in came[site]] for name in tensors}
    return Part(tensors=tensors, values={"sites": who})


def noise_std(public: Public, released: Part) -> dict[str, float]:
    """By part, the standard deviation of the noise on every number of what ``combined`` gave."""
    found = {}
    sites: dict[str, list[str]] = released.values["sites"]  # type: ignore[assignment]
    for name, came in sites.items():
        total = sum(public.populations[site] for site in came)
        shares = (public.populations[site] / total * public.release_noise[site][name] for site in came)
        found[name] = math.hypot(*shares)
    return found
