"""What makes an update private, one file each, behind one interface; `build` is the one match.

    record_level      DP-SGD in the local steps; the site's own plan and ledger. Nothing is added to the update.
    update_level      clipped, and noised at the site
    fed_lora          the same, A and B of every low-rank adapter by themselves
    central           clipped at the site and again at the server, which noises the sum; fixed or adaptive clip
    local_and_global  both
    ldp_fl            every weight one of two values, at random; split and shuffled by the server, where asked
    distributed       shares of discrete noise, of which a secure aggregation shows the sum only

The claim of each is in its file: what is clipped, noised and charged, by whom, for which unit, against whom; what happens to
it over the rounds, and where sites are silent. Noise and denominators are functions of `Public` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from sfumato.federation.messages import Json, Part, State
from sfumato.federation.public import Public
from sfumato.federation.settings import FederationSettings
from sfumato.privacy.site_updates import SiteUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a mechanism guarantees, in plans that a ledger can follow, and in words.

    Attributes:
      unit: whose contribution is hidden: record or person (the site's training plan says which), or site.
      trust: who adds the noise, and who therefore needs no trust.
      at_site: charged to the ledger of every site, one event a round, before its data are read. None: nothing, or (``trains``)
        its own training plan.
      trains: "private": the local steps follow the site's own DP-SGD plan and are charged step by step; "free": they are
        ordinary steps, and the mechanism alone protects.
      at_server: charged to the server's ledger, one event a round, before a site is asked. Unit site.
      composition: over the rounds, in words.
      dropouts: what silent sites change, in words.
    """

    unit: Literal["training", "site"]
    trust: str
    trains: Literal["private", "free"]
    at_site: SiteUpdates | None = None
    at_server: SiteUpdates | None = None
    composition: str
    dropouts: str


@dataclass(frozen=True, kw_only=True)
class Received:
    """What arrived in a round, after every check of names, shapes, types and finiteness, and decompressed.

    Attributes:
      asked: the sites that were drawn for this round; public to the server, not to be used for a denominator.
      sites: of them, whose contribution is here.
      updates: by site; empty where only the sum is known (secure aggregation).
      values: by site, what it said beside its tensors; under secure aggregation empty too.
      sum: of what `at_site` gave, over ``sites``, as the secure aggregation yields it; None where updates are known.
      broken: by site, (code, what it did wrong in the secure aggregation); its contribution may be in the sum all the same.
    """

    asked: tuple[str, ...]
    sites: tuple[str, ...]
    updates: Mapping[str, State] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    sum: State | None = None
    broken: Mapping[str, tuple[str, str]] = field(default_factory=dict)


Combine = Callable[
    [Mapping[str, State]], "dict[str, Tensor]"
]  # updates by site -> one: a weighted mean, or a robust one


class Mechanism(Protocol):
    """Frozen and pure: everything that changes from round to round is the memory, which the server keeps.

    Attributes:
      name: as in the settings.
      of_sum: `at_server` needs no more than the sum of what the sites sent, so that it may be aggregated securely.
      robust: `at_server` may combine by a median or the like: only where each update is already private.
    """

    name: ClassVar[str]
    of_sum: ClassVar[bool]
    robust: ClassVar[bool]

    def promise(self, public: Public) -> Promise:
        """Raises UsageError for settings that have no guarantee."""
        ...

    def begin(self, public: Public) -> Part:
        """The server's memory before the first round (an adaptive clip's bound, for example)."""
        ...

    def ask(self, memory: Part) -> dict[str, Json]:
        """What the sites are told in this round, in the ask's values under ``mechanism``."""
        ...

    def at_site(self, update: State, public: Public, told: Mapping[str, Json], chance: "Random") -> Part:
        """What the site sends of its update (new minus global, by name). Bounds are kept here, by the site itself."""
        ...

    def at_server(
        self, received: Received, public: Public, memory: Part, combine: Combine, chance: "Random"
    ) -> "tuple[dict[str, Tensor], Part]":
        """(the step of the global state by name, the memory of the next round). Bounds that its noise relies on are enforced
        again here, whatever a hostile site sent. Names that no site sent are left out."""
        ...

    def in_words(self, public: Public) -> str:
        """For the plan and the report: unit, bound, noise, denominator."""
        ...


def build(settings: FederationSettings) -> Mechanism:
    """The mechanism that the settings name: the one match."""
    from sfumato.federation import mechanism_settings as of
    from sfumato.federation.mechanisms.central import Central
    from sfumato.federation.mechanisms.distributed import Distributed
    from sfumato.federation.mechanisms.fed_lora import FedLora
    from sfumato.federation.mechanisms.ldp_fl import LdpFl
    from sfumato.federation.mechanisms.local_and_global import LocalAndGlobal
    from sfumato.federation.mechanisms.record_level import RecordLevel
    from sfumato.federation.mechanisms.update_level import UpdateLevel

    match settings.mechanism:
        case of.RecordLevel():
            return RecordLevel()
        case of.UpdateLevel() as chosen:
            return UpdateLevel(chosen)
        case of.FedLora() as chosen:
            return FedLora(chosen)
        case of.Central() as chosen:
            return Central(chosen)
        case of.LocalAndGlobal() as chosen:
            return LocalAndGlobal(chosen)
        case of.LdpFl() as chosen:
            return LdpFl(chosen)
        case of.Distributed() as chosen:
            return Distributed(chosen)
