"""The server's arithmetic: weighted means of what the sites sent. It sees no data, and needs no trust beyond that."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]


def fedavg(states: "Mapping[str, State]", weights: Mapping[str, float]) -> "dict[str, Tensor]":
    """The mean of the states, each site weighted by a *public* number: ``sum_k w_k s_k / sum_k w_k``.

    A weight from a private record count would leak it; ours are the populations that the plans declare public.
    Summed in float64, in the order of the names, so that the order of arrival changes no bit.

    Args: states: by site, all with the same names, shapes and types, finite. weights: by site, > 0.
    Source: McMahan et al. 2017, Algorithm 1, arXiv:1602.05629.
    """
    import torch

    if not states or set(states) != set(weights):
        raise UsageError(
            f"states of {sorted(states)}, weights of {sorted(weights)} · must be the same sites, at least one",
            next="Aggregate only what arrived.",
        )
    for site, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(
                f"weights[{site!r}] = {weight} · must be a finite number > 0", next="Use the public population."
            )
    sites = sorted(states)
    first = states[sites[0]]
    for site in sites:
        check_update(site, states[site], like=first)
    total = math.fsum(weights[site] for site in sites)
    result = {}
    for name, tensor in first.items():
        mean = torch.zeros(tensor.shape, dtype=torch.float64)
        for site in sites:
            mean += states[site][name].double() * (weights[site] / total)
        result[name] = mean.to(tensor.dtype)
    return result


def check_update(site: str, state: "State", *, like: "State") -> None:
    """Raises UsageError unless ``state`` has the names, shapes and types of ``like`` and is finite."""
    different = sorted(set(state) ^ set(like)) or [
        name for name in like if state[name].shape != like[name].shape or state[name].dtype != like[name].dtype
    ]
    if different:
        raise UsageError(
            f"update of {site}: {', '.join(different[:3])} · must have the same names, shapes and types at every site",
            next="Build the same model at every site.",
            code="update_shape",
        )
    broken = [name for name, tensor in state.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if broken:
        raise UsageError(
            f"update of {site}: {', '.join(broken[:3])} · must be finite floating-point numbers",
            next="Leave the update out of this round; lower the site's learning rate.",
            code="update_not_finite",
        )


def add(state: "State", delta: "State") -> "dict[str, Tensor]":
    """The global state after a round."""
    return {name: tensor + delta[name] for name, tensor in state.items()}
