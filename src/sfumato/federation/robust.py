"""Ways to combine updates that a few hostile sites cannot drag away. They need each update, and bound nobody's influence by a number:
so they follow local noise only, as post-processing, and are refused where noise goes on the sum (``mechanism_settings.check_together``).

Weights are not used: a site that lied about its weight would be a crowd. A parameter is combined over the sites that hold it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sfumato.errors import UsageError
from sfumato.federation.mechanism_settings import Aggregation, Krum, Mean, Median, TrimmedMean
from sfumato.federation.messages import State

if TYPE_CHECKING:
    from torch import Tensor


def combined(aggregation: Aggregation, updates: Mapping[str, State]) -> "dict[str, Tensor]":
    """One update of many, by name; a name that too few sites sent for the promise is left out, so that it stays as it is.

    Raises UsageError: with code "too_few_sites" where that is so of every name; for a mean."""
    match aggregation:
        case TrimmedMean(trimmed=trimmed):
            return trimmed_mean(updates, trimmed)
        case Median():
            return median(updates)
        case Krum(hostile=hostile, selected=selected):
            return krum(updates, hostile, selected)
        case Mean():
            raise UsageError("aggregation = mean · is weighted", next="Use averaging.")


def trimmed_mean(updates: Mapping[str, State], trimmed: int) -> "dict[str, Tensor]":
    """By coordinate the mean without the ``trimmed`` smallest and the ``trimmed`` largest values. Withstands ``trimmed`` hostile sites.

    Source: Yin et al. 2018, arXiv:1803.01498, Definition 2.
    """
    out, every = {}, _stacked(updates)
    _enough(max(map(len, every.values()), default=0), 2 * trimmed + 1, f"trimmed = {trimmed}")
    for name, stacked in every.items():
        if len(stacked) < 2 * trimmed + 1:
            continue
        kept = stacked.sort(dim=0).values[trimmed : len(stacked) - trimmed]
        out[name] = kept.mean(0)
    return _typed(out, updates)


def check(aggregation: Aggregation, holders: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError for a parameter that so few sites hold that it would never be combined."""
    if isinstance(aggregation, TrimmedMean):
        for name, sites in holders.items():
            if len(sites) <= 2 * aggregation.trimmed:
                raise UsageError(
                    f"trimmed = {aggregation.trimmed} · {name} is held by {len(sites)} sites, and of so few nobody is left",
                    next="Trim fewer, keep this parameter at home (federation.home), or take a median.",
                )


def median(updates: Mapping[str, State]) -> "dict[str, Tensor]":
    """By coordinate; the mean of the middle two of an even number. Withstands fewer than half. Source: arXiv:1803.01498, Definition 1."""
    out = {}
    for name, stacked in _stacked(updates).items():
        _enough(len(stacked), 1, name)
        values, n = stacked.sort(dim=0).values, len(stacked)
        out[name] = (values[(n - 1) // 2] + values[n // 2]) / 2
    return _typed(out, updates)


def krum(updates: Mapping[str, State], hostile: int, selected: int = 1) -> "dict[str, Tensor]":
    """The mean of the ``selected`` updates whose summed squared distance to their n - hostile - 2 nearest others is least.

    Needs n >= 2 hostile + 3, and the same parameters at every site; 1 is Krum, more is multi-Krum. Equal scores go by name.
    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """
    import torch

    sites = sorted(updates)
    _enough(len(sites), max(2 * hostile + 3, hostile + selected), f"hostile = {hostile}, selected = {selected}")
    names = sorted(updates[sites[0]])
    if any(sorted(updates[site]) != names for site in sites):
        raise UsageError(
            "aggregation = krum · needs whole updates: sites hold different parts, and distances would not compare",
            next="Take median or trimmed_mean.",
        )
    rows = torch.stack([torch.cat([updates[site][name].double().flatten() for name in names]) for site in sites])
    squares = torch.stack([(rows - row).square().sum(1) for row in rows])
    nearest = len(sites) - hostile - 2
    scores = squares.sort(dim=1).values[:, 1 : 1 + nearest].sum(1)  # the first is the distance to itself
    chosen = sorted(range(len(sites)), key=lambda i: (float(scores[i]), sites[i]))[:selected]
    return _typed(
        {name: torch.stack([updates[sites[i]][name].double() for i in chosen]).mean(0) for name in names}, updates
    )


def _stacked(updates: Mapping[str, State]) -> "dict[str, Tensor]":
    """By name (holders, ...) float64, the sites in the order of their names."""
    import torch

    names = sorted({name for update in updates.values() for name in update})
    return {
        name: torch.stack([updates[site][name].double() for site in sorted(updates) if name in updates[site]])
        for name in names
    }


def _typed(out: "dict[str, Tensor]", updates: Mapping[str, State]) -> "dict[str, Tensor]":
    like = {name: tensor for update in updates.values() for name, tensor in update.items()}
    return {name: tensor.to(like[name].dtype) for name, tensor in out.items()}


def _enough(given: int, needed: int, what: str) -> None:
    if given < needed:
        raise UsageError(
            f"replies = {given} · at least {needed} are needed for {what}",
            next="Ask more sites, or withstand fewer hostile ones.",
            code="too_few_sites",
        )
