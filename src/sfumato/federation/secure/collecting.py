"""Secure aggregation as a federation's way of collecting: five exchanges a round, and the server learns the sum.

The claim is in ``protocol.py``. What this file adds: terms are made by each side from the settings that it has itself, and from
the ask's run and round, so that a server cannot say other terms than the recipe's; a round has one attempt, because a site's
answers only go forward; private keys lie in what the site keeps (``site_memory.Memory``), which is written before a reply is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.mechanisms import Received
from sfumato.federation.messages import Ask, Part, Reply
from sfumato.federation.secure import masks, protocol, server
from sfumato.federation.secure import site as at_site
from sfumato.federation.secure.protocol import Terms, Trust
from sfumato.federation.secure.server import Server

if TYPE_CHECKING:
    from sfumato.randomness import Random

VECTOR = "sum"  # the one tensor of a mechanism whose sum is shown: (length,) int64 in [0, 2^bits)
_EXCHANGES = {"advertise": "advertise", "share": "share", "train": "mask", "check": "check", "unmask": "unmask"}


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """Attributes:
    sites: of the federation. trust: at a site its own list of identities, from its policy; at the server as they registered.
    threshold: t; so many must answer every exchange. bits, length: of the vector.
    colluders: that the mechanism allows for; the threshold must stand up to them.
    sign: by the site's identity: message -> 64 bytes; None at the server.
    """

    kinds: ClassVar[tuple[str, ...]] = tuple(_EXCHANGES)
    shows_updates: ClassVar[bool] = False
    sites: tuple[str, ...]
    trust: Trust
    threshold: int
    bits: int
    length: int
    colluders: int = 0
    sign: at_site.Sign | None = None

    def __post_init__(self) -> None:
        if self.terms("", 0).colluders < self.colluders:
            raise UsageError(
                f"threshold = {self.threshold} of {len(self.sites)} sites, colluders = {self.colluders} · 2t must be more than both "
                "together",
                next="Allow for fewer silent or colluding sites, or take more sites.",
            )

    def terms(self, run: str, round: int) -> Terms:
        return Terms(
            run=run,
            round=round,
            attempt=0,
            sites=self.sites,
            threshold=self.threshold,
            bits=self.bits,
            length=self.length,
        )

    # The server's side.

    def ask(self, kind: str, memory: Part, sites: tuple[str, ...]) -> Mapping[str, Part]:
        """Nothing but the kind in ``advertise``: the sites know the terms."""
        if kind == "advertise":
            return {name: Part() for name in sites}
        asks = server.asks(_server(memory))
        return {name: Part(values=asks[name]) for name in sites if name in asks}

    def receive(self, kind: str, memory: Part, replies: Mapping[str, Reply]) -> Part:
        """Raises UsageError, "too_few_sites" or "wrong_share": the round has no sum."""
        if kind == "advertise":
            if not replies:
                raise UsageError("replies = 0 · nobody advertised a key", next="Ask again.", code="too_few_sites")
            first = next(iter(replies.values()))
            state = server.begin(self.terms(first.run, first.round), self.trust.identities)
        else:
            state = _server(memory)
        given = {name: (dict(reply.values), _packed(reply)) for name, reply in replies.items()}
        try:
            return _kept(server.receive(state, given))
        except PrivacyRefused as no:
            raise UsageError(no.message, next=no.next, code=no.code) from None

    def total(self, memory: Part, asked: tuple[str, ...]) -> Received:
        """The sum over the sites whose masked vector came in time. Those that fell silent later, or gave wrong shares, are in it."""
        state = _server(memory)
        assert state.exchange == "done"
        broken = {site: ("secure_message", why) for site, why in state.left_out.items()}
        broken |= {site: ("wrong_share", why) for site, why in state.liars.items()}
        return Received(asked=asked, sites=state.survivors, sum={VECTOR: memory.tensors["total"]}, broken=broken)

    # A site's side.

    def answer(self, site: str, ask: Ask, kept: Part, sent: Callable[[], Part], chance: "Random") -> tuple[Part, Part]:
        """Raises PrivacyRefused for whatever is not to be answered; nothing is sent then."""
        if self.sign is None:
            raise UsageError("identity · this site has none", next="Give it a signing key.")
        memory = protocol.from_values(at_site.Memory, kept.values["secure"]) if "secure" in kept.values else None
        terms = self.terms(ask.run, ask.round)
        if ask.kind == "advertise":
            memory, reply = at_site.advertise(memory, terms, site=site, trust=self.trust, sign=self.sign)
            return Part(values=protocol.to_values(reply)), _memory(memory)
        if memory is None or memory.terms != terms or ask.values.get("exchange") != _EXCHANGES[ask.kind]:
            raise PrivacyRefused(
                f"ask = {ask.kind} of round {ask.round} · does not follow what this site has answered",
                next="Nothing was sent. Begin the next round.",
                code="secure_replay",
            )
        memory, values, packed = at_site.answer(
            memory, ask.values, site=site, trust=self.trust, sign=self.sign, vector=lambda _: _vector(sent())
        )
        tensors = {} if packed is None else {"masked": _tensor(packed)}
        return Part(tensors=tensors, values=values), _memory(memory)


def _vector(part: Part) -> np.ndarray:
    """(length,) uint64 of what the mechanism made."""
    if set(part.tensors) != {VECTOR} or part.values:
        raise UsageError(
            f"update = {sorted(part.tensors)}, {sorted(part.values)} · must be the one vector {VECTOR!r}, and nothing beside it",
            next="Use a mechanism whose sum is all that is needed.",
            code="secure_vector",
        )
    numbers = part.tensors[VECTOR].numpy()
    if numbers.dtype != np.int64 or (numbers < 0).any():
        raise UsageError(
            f"{VECTOR} = {numbers.dtype} · must be int64, none below 0", next="Reduce it.", code="secure_vector"
        )
    return numbers.astype(np.uint64)


def _packed(reply: Reply) -> np.ndarray | None:
    """As the site sent it; None for anything but one tensor of bytes (numpy has no bfloat16, and would raise)."""
    import torch

    masked = reply.tensors.get("masked")
    return masked.numpy() if masked is not None and len(reply.tensors) == 1 and masked.dtype == torch.uint8 else None


def _tensor(numbers: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(numbers))


def _memory(memory: at_site.Memory) -> Part:
    return Part(values={"secure": protocol.to_values(memory)})


def _kept(state: Server) -> Part:
    """The server's memory as plain values: words as bytes, the total as int64 (its bits are 48 at most there)."""
    tensors = {}
    if state.total is not None:
        if state.terms.bits > 63:
            raise UsageError(f"bits = {state.terms.bits} · must be 63 at most here", next="Use fewer bits.")
        tensors["total"] = _tensor(state.total.astype(np.int64))
    elif state.masked is not None:
        tensors["masked"] = _tensor(state.masked.view(np.uint8))
    return Part(tensors=tensors, values={"secure": protocol.to_values(replace(state, masked=None, total=None))})


def _server(memory: Part) -> Server:
    state = protocol.from_values(Server, memory.values["secure"])
    if "masked" in memory.tensors:
        words = memory.tensors["masked"].numpy().view(masks.word(state.terms.bits))
        state = replace(state, masked=words)
    return state
