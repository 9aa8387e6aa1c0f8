"""The server's side of secure aggregation: a value, what it asks of whom, and what it makes of the replies.

    server = begin(terms, identities)
    while server.total is None:
        server = receive(server, exchange(asks(server)))    # the engine: {site: (values, packed vector or None)}

Pure. A site whose reply is missing or broken is left out, and said (``Server.left_out``); with fewer than t left the round
ends with PrivacyRefused (``too_few_sites``). Nothing here protects anybody: what a server could do instead is the
sites' business (``site.py``); these checks keep one broken site from spoiling the sum unseen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.secure import keys, masks, protocol
from sfumato.federation.secure.protocol import Advertised, Ask, Exchange, Shared, Signed, Terms, Unmasked
from sfumato.federation.secure.recovering import Opened, opened

Reply = tuple[Mapping[str, Any], np.ndarray | None]
Message = TypeVar("Message")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Attributes:
    identities: Ed25519 public keys by site, as the sites have them.
    exchange: the one that comes next; "done" with the total.
    advertised: U1. shared: U2. survivors: U3. signatures: of U4.
    masked: Σ y_u over U3, in words. total: Σ x_u over U3, (length,) uint64 modulo 2^bits.
    left_out: by site, at which exchange and why.
    liars: by site of U3 or U4, what it did to shares, of which enough were right (`opening`): its vector is in the total.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {**protocol.PLAIN, "arbitrary_types_allowed": True}  # the arrays
    terms: Terms
    identities: Mapping[str, bytes]
    exchange: Exchange | Literal["done"] = "advertise"
    advertised: Mapping[str, Advertised] = field(default_factory=dict)
    shared: Mapping[str, Shared] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    masked: np.ndarray | None = None
    total: np.ndarray | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    liars: Mapping[str, str] = field(default_factory=dict)


def begin(terms: Terms, identities: Mapping[str, bytes]) -> Server:
    missing = sorted(set(terms.sites) - set(identities))
    if missing:
        raise UsageError(f"identities · must have the key of {', '.join(missing[:3])}", next="Register the site.")
    return Server(terms=terms, identities=dict(identities))


def asks(server: Server) -> dict[str, dict[str, Any]]:
    """What to ask of each site in the next exchange, as plain values."""
    digest = server.terms.digest()
    match server.exchange:
        case "advertise":
            asked = Ask(exchange="advertise", digest=digest, terms=server.terms)
            return _same(asked, server.terms.sites)
        case "share":
            asked = Ask(exchange="share", digest=digest, advertised=dict(server.advertised))
            return _same(asked, sorted(server.advertised))
        case "mask":
            found = {}
            for site in sorted(server.shared):
                sealed = {sender: theirs.sealed[site] for sender, theirs in server.shared.items() if sender != site}
                found[site] = protocol.to_values(Ask(exchange="mask", digest=digest, sealed=sealed))
            return found
        case "check":
            asked = Ask(exchange="check", digest=digest, survivors=server.survivors)
            return _same(asked, server.survivors)
        case "unmask":
            asked = Ask(exchange="unmask", digest=digest, signatures=dict(server.signatures))
            return _same(asked, sorted(server.signatures))
        case _:
            return {}


def receive(server: Server, replies: Mapping[str, Reply]) -> Server:
    """The server after an exchange. replies: of the sites that answered, in any order; of those not asked none.

    Raises: PrivacyRefused: fewer than t good replies (``too_few_sites``), or no t shares that fit what was promised
      (``wrong_share``). The sum was not made then, and this attempt is at its end.
    """
    match server.exchange:
        case "advertise":
            return _advertised(server, replies)
        case "share":
            return _shared(server, replies)
        case "mask":
            return _masked(server, replies)
        case "check":
            return _checked(server, replies)
        case "unmask":
            return _unmasked(server, replies)
        case _:
            raise UsageError("round · has its total", next="Begin another round.")


def _advertised(server: Server, replies: Mapping[str, Reply]) -> Server:
    digest = server.terms.digest()
    found, left_out = _parsed(server, Advertised, server.terms.sites, replies)
    for site in list(found):
        if not found[site].is_signed(digest, site, server.identities[site]):
            left_out[site] = "advertise: not signed by its identity"
            del found[site]
    return _enough(replace(server, exchange="share", advertised=found, left_out=left_out), found)


def _shared(server: Server, replies: Mapping[str, Reply]) -> Server:
    found, left_out = _parsed(server, Shared, sorted(server.advertised), replies)
    for site in list(found):
        if set(found[site].sealed) != set(server.advertised) - {site}:
            left_out[site] = "share: not one sealed share for each other site"
            del found[site]
    return _enough(replace(server, exchange="mask", shared=found, left_out=left_out), found)


def _masked(server: Server, replies: Mapping[str, Reply]) -> Server:
    terms = server.terms
    total = np.zeros(terms.length, dtype=masks.word(terms.bits))
    survivors, left_out = [], dict(server.left_out)
    for site in sorted(server.shared):
        packed = replies[site][1] if site in replies else None
        words = None if packed is None else masks.unpack(packed, length=terms.length, bits=terms.bits)
        if words is None:
            why = "no reply" if packed is None else f"not {terms.length} numbers of {terms.bits} bits"
            left_out[site] = f"mask: {why}"
            continue
        np.add(total, words, out=total)
        survivors.append(site)
    server = replace(server, exchange="check", survivors=tuple(survivors), masked=total, left_out=left_out)
    return _enough(server, survivors)


def _checked(server: Server, replies: Mapping[str, Reply]) -> Server:
    found, left_out = _parsed(server, Signed, server.survivors, replies)
    message = protocol.survivors_message(
        server.terms.digest(), server.advertised, list(server.shared), server.survivors
    )
    for site in list(found):
        if not keys.accepts(server.identities[site], found[site].signature, message):
            left_out[site] = "check: its signature is not of these survivors"
            del found[site]
    signatures = {site: signed.signature for site, signed in found.items()}
    return _enough(replace(server, exchange="unmask", signatures=signatures, left_out=left_out), found)


def _unmasked(server: Server, replies: Mapping[str, Reply]) -> Server:
    assert server.masked is not None
    words = server.masked.copy()
    terms, digest = server.terms, server.terms.digest()
    left, silent = set(server.survivors), sorted(set(server.shared) - set(server.survivors))
    found, left_out = _parsed(server, Unmasked, sorted(server.signatures), replies)
    for site in list(found):
        if set(found[site].seeds) != left or set(found[site].keys) != set(silent):
            left_out[site] = "unmask: not one share for each site"
            del found[site]
    server = replace(server, left_out=left_out)
    _enough(server, found)

    seeds = _opened(
        terms,
        {name: {site: reply.seeds[name] for site, reply in found.items()} for name in server.survivors},
        lambda name, secret: protocol.commitment(secret, terms=digest, site=name) == server.shared[name].commitment,
    )
    private = _opened(
        terms,
        {name: {site: reply.keys[name] for site, reply in found.items()} for name in silent},
        lambda name, key: keys.public_of(key) == server.advertised[name].masking,
    )
    both = Opened(
        secrets={}, wrong=(*seeds.wrong, *private.wrong), closed=tuple(sorted({*seeds.closed, *private.closed}))
    )
    told = {site: f"unmask: {said}" for site, said in both.told().items()}
    if both.closed:
        raise _wrong_share(both.closed, told, spare=len(found) - terms.threshold)
    server = replace(server, liars=told)

    for name, secret in seeds.secrets.items():
        masks.subtract(words, protocol.self_mask_seed(secret, terms=digest, site=name))
    for name, key in private.secrets.items():
        for other in server.survivors:
            seed = protocol.pair_seed(key, server.advertised[other].masking, terms=digest, one=name, other=other)
            (masks.subtract if other < name else masks.add)(words, seed)  # the survivor had added it if it came first
    return replace(server, exchange="done", total=masks.to_vector(words, terms.bits))


def _same(asked: Ask, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    values = protocol.to_values(asked)
    return dict.fromkeys(sites, values)


def _parsed(
    server: Server, kind: type[Message], asked: Sequence[str], replies: Mapping[str, Reply]
) -> tuple[dict[str, Message], dict[str, str]]:
    """The replies that have the form of their message, by site in order; and who is left out so far."""
    found, left_out = {}, dict(server.left_out)
    for site in sorted(asked):
        if site not in replies:
            left_out[site] = f"{server.exchange}: no reply"
            continue
        try:
            found[site] = protocol.from_values(kind, dict(replies[site][0]))
        except PrivacyRefused:
            left_out[site] = f"{server.exchange}: a message of another form"
    return found, left_out


def _enough(server: Server, replied: Any) -> Server:
    terms = server.terms
    if len(replied) < terms.threshold:
        why = "; ".join(f"{site}: {reason}" for site, reason in sorted(server.left_out.items())[:5])
        raise PrivacyRefused(
            f"round {terms.round}, attempt {terms.attempt}: {len(replied)} of {len(terms.sites)} sites are left ({why}) · at "
            f"least t = {terms.threshold} must be",
            next="Nothing was unmasked. Begin another attempt with the same terms, or another round with the sites that answer.",
            code="too_few_sites",
        )
    return server


def _opened(terms: Terms, dealt: Mapping[str, Mapping[str, bytes]], fits: Callable[[str, bytes], bool]) -> Opened:
    points = {name: terms.point(name) for name in terms.sites}
    return opened(dealt, points, terms.threshold, fits)


def _wrong_share(closed: Sequence[str], told: Mapping[str, str], *, spare: int) -> PrivacyRefused:
    names = ", ".join(closed[:5])
    why = "no set of enough sites agrees" if spare else "none was to spare, so who lied cannot be told"
    who = "; ".join(f"{site}: {said}" for site, said in list(told.items())[:5])
    return PrivacyRefused(
        f"shares of {names} · do not give what was promised: {why}{f' ({who})' if who else ''}",
        next="The sum was not made. Begin another round; with shares to spare (dropouts: 1 or more) a site that lies is found.",
        code="wrong_share",
    )
