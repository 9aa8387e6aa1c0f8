"""Secrets from shares of which some may be wrong: the right ones open them, and the wrong ones are found.

A secret is known by its fingerprint (a commitment, a public key), so whether t shares are right is known once they are joined. So
sets of t holders are tried until one fits; then all shares of that secret lie on one polynomial, and who is beside it gave a wrong
one. With m replies up to m − t wrong ones can be borne.

Claim. The secrets are right, whoever lies. Which *pair* of dealer and holder disagrees is right too, if one site lies alone; which
of the two it was is told by how many disagree with each, and where that does not tell, both are named. Sites that lie together
can make a polynomial of their own through the right secret, and have honest ones named: a name is a reason to ask, not a proof.
The server sees no more for it than what it was sent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from sfumato.federation.secure import keys, shares

TRIES = 2_000  # sets of t holders that are tried for one secret; of 100 with t = 67, five liars escape them once in 500


@dataclass(frozen=True)
class Opened:
    """Attributes:
    secrets: by dealer, of those that could be opened.
    wrong: (dealer, holder) of every share that does not belong to its secret.
    closed: dealers whose secret no t shares gave.
    """

    secrets: Mapping[str, bytes]
    wrong: tuple[tuple[str, str], ...]
    closed: tuple[str, ...]

    def told(self) -> dict[str, str]:
        """By site, what it did, or may have done, to the shares."""
        by_holder, by_dealer = _grouped(self.wrong, 1), _grouped(self.wrong, 0)
        found: dict[str, list[str]] = {}
        for dealer, holder in self.wrong:
            of_holder, of_dealer = len(by_holder[holder]), len(by_dealer[dealer])
            if holder == dealer or of_holder > of_dealer:
                words = {holder: f"gave wrong shares of {_listed(by_holder[holder])}"}
            elif of_holder < of_dealer:
                words = {dealer: f"dealt wrong shares to {_listed(by_dealer[dealer])}"}
            else:
                words = {
                    holder: f"gave a wrong share of {dealer}, or was dealt it",
                    dealer: f"dealt a wrong share to {holder}, or {holder} changed it",
                }
            for site, said in words.items():
                found.setdefault(site, []).append(said)
        return {site: "; ".join(dict.fromkeys(said)) for site, said in sorted(found.items())}


def opened(
    dealt: Mapping[str, Mapping[str, bytes]],
    points: Mapping[str, int],
    threshold: int,
    fits: Callable[[str, bytes], bool],
) -> Opened:
    """Args:
    dealt: by dealer, its shares by holder; the same holders for all, at least ``threshold``.
    points: by holder, where its shares lie.
    fits: whether these 32 bytes are the secret of this dealer.
    """
    holders = sorted(next(iter(dealt.values()), {}))
    weights: dict[tuple[tuple[str, ...], int], list[int]] = {}

    def at(helpers: tuple[str, ...], point: int) -> list[int]:
        if (helpers, point) not in weights:
            weights[helpers, point] = shares.at([points[name] for name in helpers], point)
        return weights[helpers, point]

    secrets, wrong, closed = {}, [], []
    for dealer in sorted(dealt):
        mine = dealt[dealer]
        liars = [holder for _, holder in wrong]
        for helpers in _sets(sorted(holders, key=lambda name: (liars.count(name), name)), threshold):
            secret = shares.join({points[name]: mine[name] for name in helpers}, at(helpers, 0))
            if secret is not None and fits(dealer, secret):
                break
        else:
            closed.append(dealer)
            continue
        secrets[dealer] = secret
        for name in sorted(set(holders) - set(helpers)):
            if shares.value({points[n]: mine[n] for n in helpers}, at(helpers, points[name])) != mine[name]:
                wrong.append((dealer, name))
    return Opened(secrets=secrets, wrong=tuple(wrong), closed=tuple(closed))


def _sets(order: Sequence[str], threshold: int) -> Iterator[tuple[str, ...]]:
    """Sets of ``threshold`` holders: the first of ``order``, then all others, or so many that look random."""
    yield tuple(sorted(order[:threshold]))
    if comb(len(order), threshold) <= TRIES:
        yield from (tuple(sorted(chosen)) for chosen in combinations(order, threshold))
        return
    for number in range(TRIES):
        mixed = sorted(order, key=lambda name: keys.digest("holders", str(number).encode(), name.encode()))
        yield tuple(sorted(mixed[:threshold]))


def _grouped(pairs: Sequence[tuple[str, str]], by: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        found.setdefault(pair[by], []).append(pair[1 - by])
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
