"""How what the sites send reaches the server: each update by itself in one exchange, or their sum in several.

A way of collecting is pure on both sides. The server's memory of a round and the site's memory of it are `Part` values: they
are kept between exchanges, by the server in its checkpoint, by the site in its folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from sfumato.errors import UsageError
from sfumato.federation.mechanism_settings import Distributed
from sfumato.federation.mechanisms import Received, distributed
from sfumato.federation.messages import Ask, Part, Reply
from sfumato.federation.public import Public
from sfumato.federation.secure.collecting import SecureSum
from sfumato.federation.secure.protocol import Trust
from sfumato.federation.secure.site import Sign
from sfumato.federation.settings import FederationSettings

if TYPE_CHECKING:
    from sfumato.randomness import Random


class Collecting(Protocol):
    """Attributes:
    kinds: of a round's exchanges, in order; "train" is the one in which the data are used.
    shows_updates: whether the server sees each site's update.
    """

    kinds: ClassVar[tuple[str, ...]]
    shows_updates: ClassVar[bool]

    def ask(self, kind: str, memory: Part, sites: tuple[str, ...]) -> Mapping[str, Part]:
        """What each of ``sites`` is told in this exchange besides the model. A site that is missing here is not asked."""
        ...

    def receive(self, kind: str, memory: Part, replies: Mapping[str, Reply]) -> Part:
        """The server's memory after the exchange; ``replies``: of the sites that answered, refusals left out. The next
        exchange asks these sites. Raises UsageError, "too_few_sites" or "wrong_share", where the round cannot go on."""
        ...

    def total(self, memory: Part, asked: tuple[str, ...]) -> Received:
        """After the last exchange. Raises UsageError with code "too_few_sites"."""
        ...

    def answer(self, site: str, ask: Ask, kept: Part, sent: Callable[[], Part], chance: "Random") -> tuple[Part, Part]:
        """The site's side: (what is sent, what the site keeps for the round's next exchange).

        Args: sent: gives what the mechanism made of the update; called in the exchange "train", at most once.
        """
        ...


class Plain:
    """One exchange; the server sees each update."""

    kinds: ClassVar[tuple[str, ...]] = ("train",)
    shows_updates: ClassVar[bool] = True

    def ask(self, kind: str, memory: Part, sites: tuple[str, ...]) -> Mapping[str, Part]:
        return {site: Part() for site in sites}

    def receive(self, kind: str, memory: Part, replies: Mapping[str, Reply]) -> Part:
        tensors = {f"{site}\n{name}": t for site, reply in replies.items() for name, t in reply.tensors.items()}
        return Part(tensors=tensors, values={site: dict(reply.values) for site, reply in replies.items()})

    def total(self, memory: Part, asked: tuple[str, ...]) -> Received:
        updates: dict[str, dict] = {site: {} for site in memory.values}
        for key, tensor in memory.tensors.items():
            site, _, name = key.partition("\n")
            updates[site][name] = tensor
        values = {site: dict(said) for site, said in memory.values.items() if isinstance(said, dict)}
        return Received(asked=asked, sites=tuple(sorted(updates)), updates=updates, values=values)

    def answer(self, site: str, ask: Ask, kept: Part, sent: Callable[[], Part], chance: "Random") -> tuple[Part, Part]:
        return sent(), replace(kept)


def build(
    settings: FederationSettings, public: Public, *, trust: Trust | None = None, sign: Sign | None = None
) -> Collecting:
    """The way of collecting that the settings name; the one match.

    Args: trust, sign: at a site, under secure aggregation: whom it believes, and its own identity.
    """
    match settings.mechanism:
        case Distributed() as asked:
            if trust is None and not public.identities:
                raise UsageError(
                    "identities = none · the sum of distributed noise is collected by secure aggregation, for which each site has a key",
                    next="Give every Site an identity; its public half belongs to the public constants.",
                )
            return SecureSum(
                sites=public.sites,
                trust=trust or trusted(public),
                threshold=len(public.sites) - asked.dropouts,  # with fewer, a sum has too little noise
                bits=asked.bits,
                length=distributed.Distributed(asked).grid(public).dimension,
                colluders=asked.colluders,
                sign=sign,
            )
        case _:
            return Plain()


def trusted(public: Public, identities: Mapping[str, str] | None = None, colluders: int = 0) -> Trust:
    """Whom a site believes: its own list of identities, or else the federation's."""
    found = public.identities if identities is None else identities
    return Trust(identities={name: bytes.fromhex(key) for name, key in found.items()}, colluders=colluders)
