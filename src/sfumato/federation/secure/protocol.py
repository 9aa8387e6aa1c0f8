"""Secure aggregation with double masking: what is claimed, the terms of a round, and its messages.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 10.1145/3133956.3133982,
figure 4 with the underlined steps (active adversaries) and section 6.

n sites have vectors x_u over the integers modulo 2^b. Site u sends y_u = x_u + PRG(b_u) + Σ_{v > u} m_uv − Σ_{v < u} m_uv: a
mask of its own and one with every other site. The pairwise masks cancel in the sum; those of sites that fell silent, and
the own masks of those that did not, are rebuilt from Shamir shares of any t sites. Five exchanges, server asks and sites reply:

    advertise   two X25519 public keys, signed by the site's identity             → a set U1 of sites
    share       shares of b_u and of the masking key, sealed to every other site  → U2 ⊆ U1
    mask        y_u                                                               → U3 ⊆ U2, whose sum is made
    check       a signature over U3 (and U1, its keys, and U2)                    → U4 ⊆ U3
    unmask      for each peer ONE share: of b_v (v in U3) or of the key (v in U2 but not in U3)

**Claim.** The server (and whoever reads its disk and every message) learns Σ_{u in U3} x_u modulo 2^b, who was silent when,
and nothing else of the vectors of honest sites, where
  - a server that follows the protocol but is curious, together with up to t − 1 sites that do the same; or
  - a server that does whatever it likes, together with up to 2t − n − 1 sites that do whatever they like
    (``Terms.colluders``). Then the sum that it learns has the vectors of at least t less those sites, of its choice, and the
    vectors of one honest site in one round are in ONE such sum at most.
Both rest on X25519 with HKDF, AES and Ed25519, on SHA-256 as a random oracle (as the paper's proof for active adversaries
does), on the list of identities being right, and on a site's memory being kept: written before a reply is sent, never
restored from a copy. What a coalition knows of its own sites' vectors it can subtract from the sum, as from any sum.

**Why 2t > n + c.** An honest site sends one share of a peer v, after t signatures of ONE set U3 that fixes which. To have
b_v and the masking key of v, two sets U3, or two sums of a round, the coalition needs twice t shares or signatures: 2(t − c)
from honest sites, each of which helps once. There are n − c of them, too few. The server alone (c = 0) asks for t > n/2, the
least that is accepted; the paper's t = ⌊2n/3⌋ + 1 stands up to n/3 colluders. The default here is t = ⌈2n/3⌉, so that a whole
third may be silent; it stands up to fewer than n/3.

**Silence.** At most n − t sites may be silent, all exchanges together; the sum is then exact over U3, which is fixed by who
sent y_u in time. With fewer than t replies at any exchange the round ends with ``PrivacyRefused`` and nothing is unmasked.
Another attempt of a round has fresh keys and the same terms; a site that has answered an unmask request helps in no other.

**What it is not.** The sum itself is not private: noise is added to x_u before (``mechanisms/distributed.py``), for as many
sites as surely remain honest. A site can send any vector it likes. Wrong shares are found (``recovering.py``) and left out where t
right ones are there; else the round is refused: with t = n any one site can spoil it. Whether sums wrap is the caller's to
prevent. The names of the sites and their silence are public.

Differs: the signature covers U1 with its keys and U2 too, so that sites that were told different things sign different
messages; keys are bound to the terms by HKDF; ``Shared.commitment`` lets the server see that a rebuilt b_v is right; shares are
opened before y_u is sent, so a changed ciphertext makes its receiver silent one exchange earlier.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, get_args

from sfumato import checks
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.secure import keys, masks

Exchange = Literal["advertise", "share", "mask", "check", "unmask"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
MAX_LENGTH = 2**31
PLAIN: dict[str, Any] = {  # of pydantic: bytes as base64, nothing converted, nothing more than what is declared
    "extra": "forbid",
    "strict": True,
    "ser_json_bytes": "base64",
    "val_json_bytes": "base64",
}


def default_threshold(sites: int) -> int:
    """⌈2n/3⌉: up to a third may be silent, and fewer than a third collude with a server that does what it likes."""
    return -(-2 * sites // 3)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all agree on before a round. Its digest is in every derived key, seal and signature.

    Attributes:
      run, round, attempt: a round is tried again under another attempt, with fresh keys.
      sites: names of all who were asked, n >= 2, sorted; the point of a site's shares is its place, from 1.
      threshold: t, n/2 < t <= n.
      bits: of the modulus, 2 .. 64. length: of the vectors.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    run: str
    round: int
    attempt: int
    sites: tuple[str, ...]
    threshold: int
    bits: int
    length: int

    def __post_init__(self) -> None:
        checks.non_negative(round=self.round, attempt=self.attempt)
        masks.word(self.bits)
        if len(self.sites) < 2 or list(self.sites) != sorted(set(self.sites)) or not all(self.sites):
            raise UsageError(
                f"sites = {len(self.sites)} names · must be two or more, sorted, each once and not empty",
                next="One site alone has no sum to hide in.",
            )
        if not len(self.sites) < 2 * self.threshold <= 2 * len(self.sites):
            raise UsageError(
                f"threshold = {self.threshold} · must be more than half of the {len(self.sites)} sites, and not more than all",
                next=f"Take {default_threshold(len(self.sites))}: a third may be silent.",
            )
        if not 1 <= self.length <= MAX_LENGTH:
            raise UsageError(f"length = {self.length} · must be between 1 and 2^31", next="Send the update in parts.")

    @property
    def may_be_silent(self) -> int:
        """Sites, all exchanges together."""
        return len(self.sites) - self.threshold

    @property
    def colluders(self) -> int:
        """Most sites that may work with a server that does whatever it likes: 2t > n + c."""
        return 2 * self.threshold - len(self.sites) - 1

    @property
    def curious_colluders(self) -> int:
        """Most sites that may share what they saw with a server that follows the protocol."""
        return self.threshold - 1

    def point(self, site: str) -> int:
        return self.sites.index(site) + 1

    def digest(self) -> bytes:
        numbers = (self.round, self.attempt, self.threshold, self.bits, self.length)
        parts = [self.run.encode(), *(str(number).encode() for number in numbers)]
        return keys.digest("terms", *parts, *(site.encode() for site in self.sites))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a site's policy says about the others, before it takes part.

    Attributes:
      identities: Ed25519 public keys (32 raw bytes) by site. **This list is what keeps the server out of the middle**: a server
        that may choose the identities can play every other site, and then it knows the vector. Get it from the other sites,
        not from the server. Where that cannot be done, `machines.Member` remembers the keys that it saw first.
      colluders: how many other sites might work with a hostile server; terms that do not stand up to it are refused.
    """

    identities: Mapping[str, bytes]
    colluders: int = 0

    def check(self, terms: Terms, site: str) -> None:
        """Raises PrivacyRefused unless the terms keep what the policy asks; nothing but the terms is looked at."""
        unknown = sorted(set(terms.sites) - set(self.identities))
        if unknown:
            raise PrivacyRefused(
                f"sites = {', '.join(unknown[:3])} · must be in this site's list of identities",
                next="Put their public keys into the policy, or take no part.",
                code="secure_unknown_site",
            )
        if site not in terms.sites:
            raise PrivacyRefused(
                f"sites · must hold {site}, which was asked", next="Nothing was sent.", code="secure_terms"
            )
        names = {self.identities[name] for name in terms.sites}
        if len(names) < len(terms.sites):
            raise PrivacyRefused(
                "identities · two sites have one key", next="Ask them for their own keys.", code="secure_unknown_site"
            )
        if self.colluders > terms.colluders or terms.threshold - self.colluders < 2:
            raise PrivacyRefused(
                f"threshold = {terms.threshold} of {len(terms.sites)} sites · must stand up to {self.colluders} colluding sites "
                "and leave the vectors of two honest ones in the sum",
                next="Ask for a higher threshold (2t > n + colluders) or for more sites.",
                code="secure_terms",
            )


@dataclass(frozen=True, kw_only=True)
class Advertised:
    """A site's reply to ``advertise``. encryption, masking: X25519 public keys. signature: by the site's identity."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    encryption: bytes
    masking: bytes
    signature: bytes

    def message(self, terms: bytes, site: str) -> bytes:
        return keys.to_sign("advertise", terms, site.encode(), self.encryption, self.masking)

    def is_signed(self, terms: bytes, site: str, identity: bytes) -> bool:
        return keys.accepts(identity, self.signature, self.message(terms, site))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A site's reply to ``share``. sealed: by receiver. commitment: to b_u, so that a wrong share is noticed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    sealed: dict[str, bytes]
    commitment: bytes


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A site's reply to ``check``: its signature over ``survivors_message``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """A site's reply to ``unmask``. seeds: its shares of b_v for v in U3; keys: of the masking keys for v in U2 \\ U3."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    seeds: dict[str, bytes]
    keys: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the server asks of a site: one of EXCHANGES, and what goes with it; the rest is empty.

    Attributes:
      terms: in ``advertise``. digest: of the terms, in all others. advertised: of U1, in ``share``. sealed: for this site, by
      sender, in ``mask``. survivors: U3, in ``check``. signatures: of U4, in ``unmask``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = PLAIN
    exchange: Exchange
    digest: bytes
    terms: Terms | None = None
    advertised: dict[str, Advertised] | None = None
    sealed: dict[str, bytes] | None = None
    survivors: tuple[str, ...] | None = None
    signatures: dict[str, bytes] | None = None


def survivors_message(
    terms: bytes, advertised: Mapping[str, Advertised], sharing: Sequence[str], survivors: Sequence[str]
) -> bytes:
    """What is signed in ``check``: U1 with its keys, U2, U3; whoever was told otherwise signs another message."""
    first = [part for name in sorted(advertised) for part in _parts(name, advertised[name])]
    lists = [keys.digest("names", *(name.encode() for name in sorted(names))) for names in (sharing, survivors)]
    return keys.to_sign("survivors", terms, keys.digest("keys", *first), *lists)


def _parts(name: str, advertised: Advertised) -> tuple[bytes, bytes, bytes]:
    return name.encode(), advertised.encryption, advertised.masking


def pair_seed(private: bytes, public: bytes, *, terms: bytes, one: str, other: str) -> bytes:
    """The seed of the mask of two sites; the same from either side."""
    return keys.agree(private, public, purpose="mask", terms=terms, pair=(min(one, other), max(one, other)))


def self_mask_seed(secret: bytes, *, terms: bytes, site: str) -> bytes:
    """The seed of PRG(b_u). Not b_u itself: that is committed to under another purpose."""
    return keys.derive(secret, "self mask", terms, site.encode())


def commitment(secret: bytes, *, terms: bytes, site: str) -> bytes:
    return keys.digest("commitment", secret, terms, site.encode())


Plain = TypeVar("Plain")


@cache
def _adapter(kind: type[Any]) -> Any:
    """Of pydantic; made once, because making one costs milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_values(message: Any) -> dict[str, Any]:
    """Any value of this package as what JSON holds: what travels, and what a site keeps in its folder."""
    return json.loads(_adapter(type(message)).dump_json(message, exclude_none=True))


def from_values(kind: type[Plain], values: Any) -> Plain:
    """The inverse. Raises PrivacyRefused, without a word of the contents, for anything else."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(values))
    except (ValidationError, UsageError, TypeError, ValueError, RecursionError):
        raise PrivacyRefused(
            f"{kind.__name__} · does not have the form of this message",
            next="Both ends must run the same version.",
            code="secure_message",
        ) from None
