"""What a site does when it is asked: its own limits first, then its ledger, then its data, and a gate before anything leaves.

    answer(site, work, ask) -> Reply

What leaves the site is what its mechanism makes of the difference of the trained parameters, and public numbers that its
policy lets it say. A refusal is an ordinary reply. Whatever goes wrong is written to the site's own log; the server is told
that it did, not what.

A deployed site answers each message in a new process, so what it keeps between two of them lies in its folder (`Memory`,
beside its ledger): which ask it has answered last, what a secure aggregation needs next, parts of the model that stay at
home. An ask is noted as answered, durably, before anything is done for it: one that is sent again is refused.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sfumato.errors import PrivacyRefused
from sfumato.federation import collecting, mechanisms, opening
from sfumato.federation.compression import compressed
from sfumato.federation.local_training import open_round, train_round
from sfumato.federation.messages import Ask, Json, Part, Reply, State
from sfumato.federation.policy import PolicyRefused, check_asked
from sfumato.federation.rounds import OF_COLLECTING
from sfumato.federation.settings import ByChargedLoss
from sfumato.federation.site_memory import Memory
from sfumato.federation.sites import Site, Work


def answer(site: Site, work: Work, ask: Ask, *, failed: Callable[[Exception], None] | None = None) -> Reply:
    """The site's reply; it never raises for what the server sent or what the site found.

    Guarantee: nothing is read of the data, and no model is built, before the policy and the ledger have agreed; the ledger
    was charged before the data were read; an ask is answered at most once, whatever crashes.

    Args: failed: is told what went wrong, after the site's log was; it may raise (an engine in one process does).
    """
    try:
        with Memory.of(site, ask) as memory:
            _check_address(site, work, ask, memory)
            check_asked(
                site.policy,
                recipe=work.recipe,
                mechanism=work.settings.mechanism.kind,
                population=site.plan.population,
                rounds=memory.rounds,
            )
            memory = memory.answering(ask)
            memory.write()
            return _answer(site, work, ask, memory)
    except PolicyRefused as no:
        return Reply.no(ask, site.name, no.code, no.message)
    except PrivacyRefused as no:
        _log(site, ask, f"{no.code}: {no}")
        return Reply.no(ask, site.name, no.code, "the site's ledger or its model says no; its own log says why")
    except Exception as error:
        _log(site, ask, "".join(traceback.format_exception(error)))
        if failed is not None:
            failed(error)
        return Reply.no(ask, site.name, "failed", "the site could not answer; its own log says why")


def _answer(site: Site, work: Work, ask: Ask, memory: "Memory") -> Reply:
    if ask.kind == opening.KIND:
        tensors = open_round(site, run=ask.run, random=work.random())
        return Reply.to(
            ask, site.name, Part(tensors=_gated(site, tensors), values={"said": {"steps": 0, "charged": 0}})
        )
    mechanism, way, random = mechanisms.build(work.settings), _way(site, work), work.random()
    told: Any = ask.values.get("told")
    said: dict[str, Json] = {}
    after = memory
    chosen = work.settings.selection
    says = "loss" in site.policy.may_say  # else it is neither asked of the data nor charged

    def sent() -> Part:
        """Trains, and gives what the mechanism makes of it."""
        nonlocal after
        update = train_round(
            site,
            {name: tensor for name, tensor in ask.tensors.items() if not name.startswith(OF_COLLECTING)},
            build=site.build or work.build,
            train_steps=work.train_steps,
            steps=work.settings.local_steps,
            run=ask.run,
            promise=mechanism.promise(work.public),
            home=memory.home,
            rounds=memory.rounds,
            number=ask.round,
            largest_loss=chosen.largest_loss if isinstance(chosen, ByChargedLoss) and says else None,
            random=random,
        )
        after = replace(after, home=update.home, rounds=memory.rounds + 1)
        said.update({name: value for name, value in update.said().items() if name in site.policy.may_say})
        part = mechanism.at_site(update.delta, work.public, told if isinstance(told, dict) else {}, random)
        return replace(part, tensors=compressed(work.settings.compression, _gated(site, part.tensors), random))

    tensors = {
        name.removeprefix(OF_COLLECTING): tensor
        for name, tensor in ask.tensors.items()
        if name.startswith(OF_COLLECTING)
    }
    values: Any = ask.values.get("collecting")
    own = replace(ask, tensors=tensors, values=values if isinstance(values, dict) else {})
    part, kept = way.answer(site.name, own, memory.collecting, sent, random)
    replace(after, collecting=kept).write()
    return Reply.to(ask, site.name, Part(tensors=part.tensors, values={**said, "said": dict(part.values)}))


def _gated(site: Site, tensors: State) -> State:
    """What is about to be sent, unless a gate refuses it."""
    for gate in site.gates:
        why = gate(tensors)
        if why is not None:
            raise PolicyRefused(why, next="Look at the update at the site.", code="gate")
    return tensors


def _way(site: Site, work: Work) -> collecting.Collecting:
    trust = collecting.trusted(work.public, site.policy.identities, site.policy.colluders)
    return collecting.build(work.settings, work.public, trust=trust, sign=site.identity.sign if site.identity else None)


def _check_address(site: Site, work: Work, ask: Ask, memory: "Memory") -> None:
    """Raises PolicyRefused for an ask that is not the next one of this run, of another recipe, or for other parameters."""
    kinds: tuple[str, ...] = collecting.build(work.settings, work.public).kinds
    if ask.round == 0:
        kinds = (
            (opening.KIND,) if site.name in {name for held in work.public.releasing.values() for name in held} else ()
        )
    if (ask.round, ask.exchange) <= memory.answered:
        raise PolicyRefused(
            f"round = {ask.round}, exchange = {ask.exchange} · was asked before; the last was {memory.answered}",
            next="Ask for the next round.",
            code="replayed",
        )
    if ask.exchange >= len(kinds) or ask.kind != kinds[ask.exchange]:
        raise PolicyRefused(
            f"round = {ask.round}, exchange = {ask.exchange}, kind = {ask.kind!r} · the round has the exchanges "
            f"{', '.join(kinds) or 'none'}",
            next="Use the same recipe at the server.",
            code="not_an_exchange",
        )
    if ask.exchange and memory.answered != (ask.round, ask.exchange - 1):
        raise PolicyRefused(
            f"exchange = {ask.exchange} · the one before it was not answered here", next="Begin a new round.",
            code="out_of_order",
        )  # fmt: skip
    if ask.round > work.settings.rounds:
        raise PolicyRefused(
            f"round = {ask.round} · the recipe has {work.settings.rounds}", next="Begin a new run.", code="rounds_over"
        )
    if ask.values.get("recipe") != work.recipe:
        raise PolicyRefused(
            "recipe · is another than the one at this site", next="Show the site the resolved recipe.",
            code="other_recipe",
        )  # fmt: skip
    own = {name: work.public.shapes.get(name) for name, sites in work.public.holders.items() if site.name in sites}
    sent = {name: tuple(t.shape) for name, t in ask.tensors.items() if not name.startswith(OF_COLLECTING)}
    if ask.kind == "train" and sent != own:
        different = sorted(set(sent) ^ set(own)) or sorted(name for name in own if sent[name] != own[name])
        raise PolicyRefused(
            f"tensors: {', '.join(different[:3])} · must be the parameters that this site exchanges, in their shapes",
            next="Use the same recipe at the server.",
            code="other_parameters",
        )


# -- what a site keeps between two messages --


def _log(site: Site, ask: Ask, what: str) -> None:
    """To the site's own log. Never sent."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with site.ledger.with_suffix(".log").open("a", encoding="utf-8") as file:
        file.write(f"{now} {ask.run} round {ask.round} exchange {ask.exchange}: {what}\n")


# -- a round's training --
