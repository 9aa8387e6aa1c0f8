"""Which sites are asked in a round, and what the choice does to the accounts.

everyone         q = 1. Nothing to say.
uniform          every site by its own coin, q. Under a mechanism whose unit is the site and whose noise the server adds
                 (central), that is Poisson sampling: each round is charged as such, against who sees the released models and
                 not which sites were asked. The server and the network see it; against them nothing is amplified. A site's
                 own account (record_level, update_level) is charged in the rounds in which it is asked, and only there; no
                 amplification is claimed for it, since the site and the server know when it was asked.
by_size          every site by its own coin, q_k = min(1, c N_k) with sum q_k = ``expected_sites``. As uniform; a server's
                 account is charged at max q_k, which bounds every site's. N_k is public, so nothing else leaks.
by_charged_loss  the sites with the highest loss, as they told it (Cho et al. 2020, arXiv:2010.01243, without its candidates). A
                 loss is of the data: a site asks it of a Poisson sample, clips it, noises it and charges it to its own ledger
                 as one step more (``training.rounds.charged_loss``); what is chosen from it is post-processing at record
                 level. It is no sampling and amplifies nothing. Refused where the unit is the site: the choice would depend
                 on what a site's data are, and a site's noise hides its records, not itself.
                 A hostile site can say any loss, and so be asked in every round.

A mean over chosen sites is weighted by w_k / q_k (Horvitz & Thompson 1952), so that it aims at the same mean whoever is drawn.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfumato.errors import UsageError
from sfumato.federation.messages import Part
from sfumato.federation.rates import AnySelection
from sfumato.federation.settings import ByChargedLoss, Everyone

if TYPE_CHECKING:
    from sfumato.randomness import Random


def draw(selection: AnySelection, site_rates: Mapping[str, float], memory: Part, chance: "Random") -> tuple[str, ...]:
    """The sites of a round, sorted; perhaps none. Args: memory: the losses that were told, by site."""
    sites = sorted(site_rates)
    match selection:
        case Everyone():
            return tuple(sites)
        case ByChargedLoss(asked=asked):
            told = {site: value for site, value in memory.values.items() if isinstance(value, float)}
            order = sorted(sites, key=lambda site: (site in told, -told.get(site, 0.0), site))
            return tuple(sorted(order[:asked]))
        case _:
            coins = chance.uniform(len(sites))
            return tuple(site for site, coin in zip(sites, coins, strict=True) if coin < site_rates[site])


def check(selection: AnySelection, *, sites: int) -> None:
    """Raises UsageError for a choice that cannot be made. (One that has no guarantee, the settings refuse.)"""
    if not isinstance(selection, ByChargedLoss):
        return
    if selection.asked > sites:
        raise UsageError(f"selection.asked = {selection.asked} · there are {sites} sites", next="Ask fewer.")
