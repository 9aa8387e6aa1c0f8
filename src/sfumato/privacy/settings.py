"""What the user asks of privacy; ``plan.make_plan`` turns it, with the data's public size, into a ``PrivacyPlan`` or refuses."""

import math
from dataclasses import dataclass
from typing import Literal

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy.events import Adjacency

DEFAULT_MAX_GRAD_NORM = 1.0
Clipping = Literal["flat", "per_layer", "automatic", "adaptive"]
NoiseSource = Literal["gaussian", "discrete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSettings:
    """A part of the model that is clipped by itself.

    Attributes:
      name: of the part, in messages and reports.
      modules: names of modules (or parameters); a parameter belongs to the part that names it most precisely, "" is all
        that no other part names.
      max_grad_norm: C_m, the bound on a unit's gradient over this part.
      share: of 1/sigma^2, what part of the guarantee it uses: its own noise multiplier is sigma / sqrt(share). The shares
        of all parts are 1 together. None, for all parts: C_m^2 / sum C^2, which is the same noise on every part.
    """

    name: str
    modules: tuple[str, ...]
    max_grad_norm: float
    share: float | None = None

    def __post_init__(self) -> None:
        checks.positive(max_grad_norm=self.max_grad_norm)
        if not self.name.strip() or not self.modules:
            raise UsageError(
                f"part = {self.name!r}, modules = {list(self.modules)} · a part has a name and at least one module",
                next="For example {name: text, modules: [text_encoder], max_grad_norm: 0.5}.",
            )
        if self.share is not None:
            checks.positive(share=self.share)
            checks.probability(share=self.share)


def joint_max_grad_norm(parts: tuple[PartSettings, ...]) -> float:
    """sqrt(sum C_m^2): the bound on a unit's gradient over all parts together."""
    return math.sqrt(sum(part.max_grad_norm**2 for part in parts))


def check_parts(parts: tuple[PartSettings, ...]) -> None:
    """Raises UsageError for names that occur twice, or shares that are not 1 together."""
    names = [part.name for part in parts]
    modules = [module for part in parts for module in part.modules]
    twice = sorted({name for name in names if names.count(name) > 1} | {m for m in modules if modules.count(m) > 1})
    if twice:
        raise UsageError(f"parts · {', '.join(map(repr, twice))} occurs twice", next="Name every part and module once.")
    shares = [part.share for part in parts if part.share is not None]
    if shares and (len(shares) < len(parts) or not math.isclose(sum(shares), 1.0, rel_tol=1e-9)):
        raise UsageError(
            f"share = {', '.join(f'{part.name}: {part.share}' for part in parts)} · must be 1 together, or missing in all",
            next="Give every part a share of the guarantee, 0.5 and 0.5 for example.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipEstimateSettings:
    """Attributes: share: of epsilon, spent on C before the first step; quantile: of the norms, that C becomes."""

    share: float = 0.02
    quantile: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("quantile", self.quantile)):
            if not 0 < value < 1:
                raise UsageError(f"{name} = {value} · must be between 0 and 1, both excluded", next="Take the default.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartSettings:
    """A release before the first step, whose records DP-SGD begins with (``warm_planning``; what is released: model.warm_start).

    Attributes: share: of the guarantee (of 1/sigma^2) that the release has; DP-SGD has the rest.
    """

    share: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"share = {self.share} · must be between 0 and 1, both excluded", next="Take 0.03.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentModalitySettings:
    """One modality of released latents; their lengths are about 1 (``models.public_codes``).

    Attributes:
      name: image or text.
      max_norm: C_m, to which every latent is clipped; in the shared form, how long it is expected to be.
      weight: w_m, how much its error counts when the noise is split; in the shared form, what it is multiplied by.
      noise_std: its noise; for all modalities, in place of epsilon. Not in the shared form.
    """

    name: Literal["image", "text"]
    max_norm: float = 1.0
    weight: float = 1.0
    noise_std: float | None = None

    def __post_init__(self) -> None:
        checks.positive(max_norm=self.max_norm, weight=self.weight)
        if self.noise_std is not None:
            checks.positive(noise_std=self.noise_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSettings:
    """Attributes:
    form: independent: a clip and a noise for every modality; shared: one latent of all, w_m z_m side by side, one clip to
      sqrt(sum (w_m C_m)^2), one noise.
    modalities: image and text, both: a model is trained on pairs.
    centre: share of the guarantee (of 1/sigma^2) spent first on a noisy mean of the latents, which every latent is then
      counted from: what all records have in common needs no length of its own. 0 spends nothing.
    """

    form: Literal["independent", "shared"] = "independent"
    modalities: tuple[LatentModalitySettings, ...] = (
        LatentModalitySettings(name="image"),
        LatentModalitySettings(name="text"),
    )
    centre: float = 0.0

    def __post_init__(self) -> None:
        names = [modality.name for modality in self.modalities]
        if sorted(names) != ["image", "text"]:
            raise UsageError(
                f"modalities = {names} · must be image and text, once each", next="List both under privacy.latents."
            )
        checks.probability(centre=self.centre)
        given = [modality.noise_std is not None for modality in self.modalities]
        if any(given) and (not all(given) or self.form == "shared" or self.centre):
            raise UsageError(
                "noise_std · must be given for all modalities or for none; not in the shared form, nor with a centre",
                next="Leave it out: the noise is then split by the formula.",
            )
        if self.centre >= 1:
            raise UsageError("centre = 1 · leaves nothing for the latents", next="Spend a few percent, 0.03.")

    @property
    def own_noise(self) -> bool:
        """The user has said the noise of every modality."""
        return all(modality.noise_std is not None for modality in self.modalities)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanEmbeddingSettings:
    """Attributes:
    max_norm: C, to which a unit's feature is clipped; features have length 1 at most (``models.from_mean``).
    first: share of the guarantee (of 1/sigma^2) spent on a sum before, which tells the second one what to sum over
      (``models.from_class_moments``, with directions); 0: one sum.
    """

    max_norm: float = 1.0
    first: float = 0.0

    def __post_init__(self) -> None:
        checks.positive(max_norm=self.max_norm)
        checks.probability(first=self.first)
        if self.first >= 1:
            raise UsageError("first = 1 · leaves nothing for the second sum", next="Spend a part, 0.15.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookSettings:
    """Attributes:
    centre: share of epsilon that is spent first on a noisy mean of the pictures' latents, which codes are counted from.
    max_norm: of a picture's latent in that mean.
    """

    centre: float = 0.05
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(max_norm=self.max_norm, centre=self.centre)
        checks.probability(centre=self.centre)
        if self.centre >= 1:
            raise UsageError("centre = 1 · leaves nothing for the codes", next="Spend a few percent, 0.05.")


OF_RELEASES = ("latents", "mean_embedding", "codebook")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySettings:
    """Attributes:
    mechanism: dp_sgd; latents: every unit's own noised latents are released once, and trained on; mean_embedding: one noisy
      mean is released, and a generator fitted to it; codebook: every unit's
      own code, by randomised response; none (a non-private run, marked so everywhere).
    latents, mean_embedding, codebook: what only that mechanism has.
    unit: what is protected: one record, or all the records of one person.
    records_per_unit: k, public: at most this many records of a unit make its gradient (their mean).
    population: N, the public number of units; None takes the number in the data and *declares it public*.
    epsilon: the target; or give noise_multiplier instead. Exactly one of the two.
    delta: "auto" is 1/(N ln N).
    max_grad_norm: C. With parts it is what they make together, sqrt(sum C_m^2), and is left out. auto: a quantile of the norms
      at the first weights, estimated privately and paid from the same epsilon (privacy/clip_estimate.py).
    clip_estimate: for auto: which share of epsilon, and which quantile.
    warm_start: a release before the first step, from the same epsilon, that the first weights are made of; None starts at random.
    clipping: flat: one clip; per_layer: each of L layers to C / sqrt(L); automatic: AUTO-S; adaptive: C follows the median
      of the norms from max_grad_norm on, and the counting is paid from the same epsilon (privacy/adaptive.py).
    parts: the model's parts with a bound each, instead of one; what is trained must be in one of them.
    adjacency: add_or_remove, zero_out or replace_one (privacy/events.py); the last needs about twice the noise. None is
      add_or_remove, and zero_out for latents and codes, whose rows everybody can count.
    bands: b > 1 correlates the noise of b consecutive steps (banded matrix factorisation) and samples b groups in turn.
    largest_batch: of a larger sample a random subset of so many units is taken; not under add_or_remove.
    noise: gaussian; or discrete, sampled exactly on the integers, a little slower.
    account: the ledger shared by all runs on one data set; None is .sfumato/account.db beside the data.
    account_epsilon: of all runs on that account together, whatever is planned after earlier results were seen, at this
      run's delta (privacy/filters.py). It is kept in the account, binds every later run, and cannot be raised there.
    """

    mechanism: Literal["dp_sgd", "latents", "mean_embedding", "codebook", "none"] = "dp_sgd"
    unit: Literal["record", "person"] = "record"
    records_per_unit: int = 1
    population: int | None = None
    adjacency: Adjacency | None = None
    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    delta: float | Literal["auto"] = "auto"
    max_grad_norm: float | Literal["auto"] = DEFAULT_MAX_GRAD_NORM
    clip_estimate: ClipEstimateSettings | None = None
    warm_start: WarmStartSettings | None = None
    clipping: Clipping = "flat"
    parts: tuple[PartSettings, ...] = ()
    bands: int = 1
    largest_batch: int | None = None
    noise: NoiseSource = "gaussian"
    latents: LatentSettings | None = None
    mean_embedding: MeanEmbeddingSettings | None = None
    codebook: CodebookSettings | None = None
    accountant: Literal["pld"] = "pld"
    on_exhausted: Literal["stop"] = "stop"
    account: str | None = None
    account_epsilon: float | None = None

    def __post_init__(self) -> None:
        checks.positive(records_per_unit=self.records_per_unit)
        if self.max_grad_norm == "auto":
            self._check_auto()
        else:
            checks.positive(max_grad_norm=self.max_grad_norm)
            if self.clip_estimate is not None:
                raise UsageError(
                    f"clip_estimate · would estimate C, but max_grad_norm = {self.max_grad_norm} says it",
                    next="Set privacy.max_grad_norm: auto, or leave out privacy.clip_estimate.",
                )
        if self.warm_start is not None and (self.mechanism != "dp_sgd" or self.epsilon is None):
            raise UsageError(
                f"warm_start · takes a share of epsilon = {self.epsilon} before the steps of mechanism = {self.mechanism}",
                next="Set privacy.epsilon and mechanism: dp_sgd, or leave out privacy.warm_start.",
            )
        if self.epsilon is not None:
            checks.positive(epsilon=self.epsilon, next="Ask for an epsilon such as 8, or set privacy.mechanism: none.")
        if self.noise_multiplier is not None:
            checks.positive(noise_multiplier=self.noise_multiplier)
        self._check_mechanism()
        given = sum(value is not None for value in (self.epsilon, self.noise_multiplier))
        given += self.latents is not None and self.latents.own_noise
        if self.mechanism != "none" and given != 1:
            raise UsageError(
                f"epsilon = {self.epsilon}, noise_multiplier = {self.noise_multiplier} · exactly one must be given",
                next="Set the other one to null (both, where privacy.latents gives every modality its noise_std).",
            )
        if self.delta != "auto":
            checks.probability(delta=self.delta)
            checks.positive(delta=self.delta)
        if self.parts:
            check_parts(self.parts)
            if self.clipping == "adaptive":
                raise UsageError(
                    "clipping = adaptive · follows one bound, but parts have several",
                    next="Set privacy.clipping: flat.",
                )
            joint = joint_max_grad_norm(self.parts)
            if self.max_grad_norm not in (DEFAULT_MAX_GRAD_NORM, joint):
                raise UsageError(
                    f"max_grad_norm = {self.max_grad_norm} · every part has its own; together they make {joint:.6g}",
                    next="Leave out privacy.max_grad_norm.",
                )
            object.__setattr__(self, "max_grad_norm", joint)
        if self.account_epsilon is not None:
            checks.positive(account_epsilon=self.account_epsilon)
            if self.mechanism == "none":
                raise UsageError(
                    f"account_epsilon = {self.account_epsilon} · a run without privacy keeps no limit",
                    next="Set privacy.account_epsilon: null, or give the run a mechanism.",
                )
        checks.positive(bands=self.bands)
        if self.largest_batch is not None:
            checks.positive(largest_batch=self.largest_batch)
        if self.unit == "record" and self.records_per_unit != 1:
            raise UsageError(
                f"records_per_unit = {self.records_per_unit} · must be 1 when unit is record",
                next="Set privacy.unit: person, or records_per_unit: 1.",
            )

    def _check_auto(self) -> None:
        if self.mechanism != "dp_sgd" or self.epsilon is None or self.parts:
            raise UsageError(
                f"max_grad_norm = auto · takes a share of epsilon = {self.epsilon} for one bound of mechanism = {self.mechanism}, "
                f"with {len(self.parts)} parts",
                next="Set privacy.epsilon and mechanism: dp_sgd, and leave out the parts; or give max_grad_norm.",
            )
        if self.clip_estimate is None:
            object.__setattr__(self, "clip_estimate", ClipEstimateSettings())

    def _check_mechanism(self) -> None:
        """Fills in what depends on the mechanism, and refuses what it does not have."""
        for name, kind in _KINDS.items():
            if self.mechanism == name and getattr(self, name) is None:
                object.__setattr__(self, name, kind())
            elif self.mechanism != name and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} · says nothing about mechanism {self.mechanism}", next=f"Set privacy.mechanism: {name}."
                )
        if self.adjacency is None:
            object.__setattr__(self, "adjacency", "zero_out" if self.mechanism in _LOCAL else "add_or_remove")
        if self.mechanism in _LOCAL and self.adjacency == "add_or_remove":
            raise UsageError(
                f"adjacency = add_or_remove · is not defined for {self.mechanism}: whoever sees the rows counts the units",
                next="Set privacy.adjacency: zero_out, or replace_one.",
            )
        if self.mechanism in OF_RELEASES:
            of_steps = {
                "clipping": "flat", "parts": (), "bands": 1, "largest_batch": None, "noise": "gaussian",
                "max_grad_norm": DEFAULT_MAX_GRAD_NORM,
            }  # fmt: skip
            for name, nothing in of_steps.items():
                if getattr(self, name) != nothing:
                    raise UsageError(
                        f"{name} = {getattr(self, name)} · says nothing about mechanism {self.mechanism}, which has no gradients",
                        next=f"Leave out privacy.{name}.",
                    )
        centre = self.latents.centre if self.latents else self.codebook.centre if self.codebook else 0.0
        centre = self.mean_embedding.first if self.mean_embedding else centre
        if centre and self.epsilon is None:
            raise UsageError(
                f"{'first' if self.mean_embedding else 'centre'} = {centre} · is a share of epsilon, which is not given",
                next="Set privacy.epsilon.",
            )


_KINDS = {"latents": LatentSettings, "mean_embedding": MeanEmbeddingSettings, "codebook": CodebookSettings}
_LOCAL = ("latents", "codebook")  # every unit has rows of its own
