"""Which parameters are clipped together, to which bound, and how much noise they get.

The claim. The trainable parameters are partitioned into groups. Of one Poisson sample of units, every unit's gradient is
scaled, group by group, to L2 norm at most C_g; the sums over units get N(0, s_g^2) on every coordinate of group g. Divided
by s_g, group by group, that is one Gaussian mechanism of noise 1, which one unit moves by at most
sqrt(sum_g (C_g / s_g)^2). So one step is ONE Poisson-sampled Gaussian, of noise multiplier

    sigma = (sum_g (C_g / s_g)^2)^(-1/2),      unit: as the sampler's; adjacency: add or remove one.

A *part* of the model has a bound C_m and a noise multiplier sigma_m, hence s_m = sigma_m C_m. It is one group, or (per layer)
L groups of bound C_m / sqrt(L) and the same noise. Either way it adds sigma_m^-2 to sigma^-2. Without parts the whole model
is one. Parts without noise multipliers of their own share one s = sigma sqrt(sum C_m^2).

Sources: McMahan et al. 2018, arXiv:1710.06963 (per-layer clipping); McMahan et al. 2018, arXiv:1812.06210 (a joint
Gaussian for vectors of several bounds).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sfumato import checks
from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.accounting import joint_noise_multiplier
from sfumato.privacy.gradients.bookkeeping import Layer
from sfumato.privacy.gradients.clipping import Clip, clip_to, normalise_to
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.step_noise import StepNoise

WHOLE = ""  # the name of the only part of a model without parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a model that is protected on its own terms.

    Attributes:
      modules: names of modules (or parameters). A parameter belongs to the part that names it most precisely: ``"text"``
        has ``text.weight`` and ``text.layer.bias``, but not ``texture.weight``; ``""`` has what no other part names.
      max_grad_norm: C_m, the bound on a unit's gradient over this part.
      noise_multiplier: sigma_m; None: the engine's noise, the same on all parts.
    """

    modules: Sequence[str]
    max_grad_norm: float
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        checks.positive(max_grad_norm=self.max_grad_norm)
        if self.noise_multiplier is not None:
            checks.non_negative(noise_multiplier=self.noise_multiplier)
        if isinstance(self.modules, str) or not self.modules:
            raise UsageError(
                f"modules = {self.modules!r} · must be one or more names of modules",
                next="Give modules=('text_encoder',), for example.",
            )


def parts_of(plan: DpSgd) -> dict[str, Part] | None:
    """The plan's parts, each with the noise that its share leaves; None if the plan has none."""
    noise = plan.part_noise_multipliers()
    parts = {
        part.name: Part(modules=part.modules, max_grad_norm=part.max_grad_norm, noise_multiplier=noise[part.name])
        for part in plan.parts
    }
    return parts or None


@dataclass(eq=False, slots=True)
class Protected:
    """A part as it is in one model. ``max_grad_norm`` moves where clipping is adaptive, and ``noise_std`` with it;
    ``noise_multiplier`` does not."""

    name: str
    parameters: dict[nn.Parameter, str]
    groups: list[list[Layer]]  # layers that are clipped together
    max_grad_norm: float
    noise_multiplier: float

    @property
    def bound(self) -> float:
        """C_g, of each of its groups."""
        return self.max_grad_norm / math.sqrt(len(self.groups))

    @property
    def std(self) -> float:
        """s_m, on every coordinate of the sum."""
        return self.noise_multiplier * self.max_grad_norm

    def noise_std(self, noise: StepNoise) -> float:
        """s_m and what pays for the rounding of the sum."""
        return noise.widened(self.std, self.max_grad_norm, sum(parameter.numel() for parameter in self.parameters))


class Partition:
    """All parts of a model, and to which group each layer belongs.

    Args:
      layers: all recorded layers of ``model``.
      parts: by name; None: the model is one part, with ``max_grad_norm`` and ``noise_multiplier``.
      clipping: "flat", "automatic" and "adaptive" make one group of a part, "per_layer" one of every layer (layers that share a
        parameter are one).

    Raises: UsageError: values missing or contradicting; a parameter in no part. UnsupportedLayer: a layer in two parts.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        model: nn.Module,
        *,
        parts: Mapping[str, Part] | None,
        max_grad_norm: float | None,
        noise_multiplier: float | None,
        clipping: str,
    ) -> None:
        names = _names(model, {id(p) for layer in layers for p in layer.parameters})
        if parts is None:
            parts, noise = _one_part(max_grad_norm, noise_multiplier)
        else:
            noise = _noise_of(parts, max_grad_norm, noise_multiplier)
        owners = _owners(names, {name: part.modules for name, part in parts.items()})
        self.parts = [Protected(name, {}, [], float(part.max_grad_norm), noise[name]) for name, part in parts.items()]
        by_name = {part.name: part for part in self.parts}
        for parameter, name in owners.items():
            by_name[name].parameters[parameter] = names[parameter][0]
        _refuse_empty(name for name, part in by_name.items() if not part.parameters)
        for layer in layers:
            found = sorted({owners[p] for p in layer.parameters})
            if len(found) > 1:
                raise UnsupportedLayer(
                    f"{layer} · is clipped as a whole, but is in parts {', '.join(found)}",
                    next="Put the whole layer into one part.",
                )
        for part in self.parts:
            own = [layer for layer in layers if owners[layer.parameters[0]] == part.name]
            part.groups = _tied(own) if clipping == "per_layer" else [own]
        self._place = {
            id(layer): (part, number)
            for part in self.parts
            for number, group in enumerate(part.groups)
            for layer in group
        }
        self._kind = normalise_to if clipping == "automatic" else clip_to
        self.part_of = {p: part for part in self.parts for p in part.parameters}

    @property
    def max_grad_norm(self) -> float:
        """sqrt(sum C_m^2): how far one unit moves the sum, over everything."""
        if len(self.parts) == 1:
            return self.parts[0].max_grad_norm
        return math.sqrt(sum(part.max_grad_norm**2 for part in self.parts))

    @property
    def noise_multiplier(self) -> float:
        """sigma of the joint event: (sum sigma_m^-2)^(-1/2)."""
        return joint_noise_multiplier([part.noise_multiplier for part in self.parts])

    def named(self, name: str) -> Protected:
        for part in self.parts:
            if part.name == name:
                return part
        known = ", ".join(repr(part.name) for part in self.parts if part.name) or "none"
        raise UsageError(f"part = {name!r} · is not a part of this engine", next=f"Its parts: {known}.")

    def owner(self, layer: Layer) -> Protected:
        return self._place[id(layer)][0]

    def clips(self, layers: Iterable[Layer]) -> tuple[list[Clip], list[int]]:
        """The groups' clips, and which group each of these layers is of, as ``clipped_sums`` wants them."""
        clips: list[Clip] = []
        group_of: list[int] = []
        seen: dict[tuple[int, int], int] = {}
        for layer in layers:
            part, number = self._place[id(layer)]
            key = (id(part), number)
            if key not in seen:
                seen[key] = len(clips)
                clips.append(self._kind(part.bound))
            group_of.append(seen[key])
        return clips, group_of


def _one_part(max_grad_norm: float | None, noise_multiplier: float | None) -> tuple[dict[str, Part], dict[str, float]]:
    if max_grad_norm is None or noise_multiplier is None:
        raise UsageError(
            f"max_grad_norm = {max_grad_norm}, noise_multiplier = {noise_multiplier} · both must be given",
            next="Give max_grad_norm=1.0, noise_multiplier=1.1, for example; or parts=.",
        )
    checks.positive(max_grad_norm=max_grad_norm)
    checks.non_negative(noise_multiplier=noise_multiplier)
    return {WHOLE: Part(modules=("",), max_grad_norm=max_grad_norm)}, {WHOLE: float(noise_multiplier)}


def _noise_of(
    parts: Mapping[str, Part], max_grad_norm: float | None, noise_multiplier: float | None
) -> dict[str, float]:
    """sigma_m of every part, from their own or from the one that is given for all together."""
    if not parts or "" in parts:
        raise UsageError(f"parts = {sorted(parts)} · must be one or more, each with a name", next="Name each part.")
    if max_grad_norm is not None:
        raise UsageError(
            f"max_grad_norm = {max_grad_norm} · every part has a bound of its own", next="Leave out max_grad_norm."
        )
    own = {name: part.noise_multiplier for name, part in parts.items() if part.noise_multiplier is not None}
    if own and len(own) < len(parts):
        raise UsageError(
            f"noise_multiplier · is missing in part {', '.join(sorted(set(parts) - set(own)))}",
            next="Give every part its own, or give the engine one for all together.",
        )
    if noise_multiplier is not None:
        checks.non_negative(noise_multiplier=noise_multiplier)
    if own:
        joint = joint_noise_multiplier(list(own.values()))
        if noise_multiplier is not None and not math.isclose(joint, noise_multiplier, rel_tol=1e-9):
            raise UsageError(
                f"noise_multiplier = {noise_multiplier} · the parts' own make {joint:.6g} together",
                next="Leave out the engine's noise_multiplier.",
            )
        return {name: float(value) for name, value in own.items()}
    if noise_multiplier is None:
        raise UsageError(
            "noise_multiplier = None · must be given, to every part or to the engine for all together",
            next="Give noise_multiplier=1.1, for example.",
        )
    total = math.sqrt(sum(part.max_grad_norm**2 for part in parts.values()))
    return {name: noise_multiplier * total / part.max_grad_norm for name, part in parts.items()}


def _names(model: nn.Module, protected: set[int]) -> dict[nn.Parameter, list[str]]:
    """All names of every protected parameter; a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in protected:
            names.setdefault(parameter, []).append(name)
    return names


def check_parts(model: nn.Module, parts: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError or UnsupportedLayer unless the parts, by the names of their modules, hold every trainable
    parameter of the model once."""
    owners = _owners(_names(model, {id(p) for p in model.parameters() if p.requires_grad}), parts)
    _refuse_empty(set(parts) - set(owners.values()))


def _refuse_empty(parts: Iterable[str]) -> None:
    empty = sorted(parts)
    if empty:
        raise UsageError(
            f"part {', '.join(empty)} · has no trainable parameter in this model",
            next="Name modules as model.named_modules() does, or unfreeze what should be trained.",
        )


def _owners(names: Mapping[nn.Parameter, list[str]], parts: Mapping[str, Sequence[str]]) -> dict[nn.Parameter, str]:
    prefixes: dict[str, str] = {}
    for part_name, modules in parts.items():
        for module in modules:
            if prefixes.setdefault(module, part_name) != part_name:
                raise UsageError(
                    f"modules = {module!r} · is in parts {prefixes[module]} and {part_name}", next="Name it once."
                )
    used: set[str] = set()
    owners: dict[nn.Parameter, str] = {}
    left_out: list[str] = []
    torn: list[str] = []
    for parameter, aliases in names.items():
        matches = [_longest(name, prefixes) for name in aliases]
        used |= {match for match in matches if match is not None}
        found = {None if match is None else prefixes[match] for match in matches}
        if None in found:
            left_out.append(aliases[matches.index(None)])
        elif len(found) > 1:
            torn.append(f"{' = '.join(aliases)} (parts {', '.join(sorted(str(name) for name in found))})")
        else:
            owners[parameter] = next(prefixes[match] for match in matches if match is not None)
    if left_out:
        raise UsageError(
            f"{listed(left_out)} · is trainable, and in no part: it would train unprotected",
            next="Put it into a part, or freeze it with requires_grad_(False).",
        )
    if torn:
        raise UnsupportedLayer(
            f"{listed(torn)} · is one parameter in two parts, so neither bounds it alone",
            next="Put all modules that share it into one part.",
        )
    unused = [f"{module!r} of part {prefixes[module]}" for module in prefixes if module not in used and module]
    if unused:
        raise UsageError(
            f"modules = {listed(unused)} · names nothing trainable in the model",
            next="Use the names of model.named_modules().",
        )
    return owners


def _longest(name: str, prefixes: Iterable[str]) -> str | None:
    matches = [prefix for prefix in prefixes if not prefix or name == prefix or name.startswith(prefix + ".")]
    return max(matches, key=len, default=None)


def _tied(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers one by one, but those together that share a parameter, directly or through others."""
    groups: list[tuple[set[int], list[Layer]]] = []
    for layer in layers:
        keys, members = {id(p) for p in layer.parameters}, [layer]
        rest = []
        for group_keys, group in groups:
            if group_keys & keys:
                keys, members = keys | group_keys, group + members
            else:
                rest.append((group_keys, group))
        groups = [*rest, (keys, members)]
    return [members for _, members in groups]


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
