"""The server as a pure state machine: who is asked what, and what the replies make of the state. No clock, no disk, no network.

    server = begin(...)
    while not server.done:
        server, asked = asks(server, chance)               # {site: Ask}
        replies = exchange(asked)                          # an engine; who is silent is missing
        server = receive(server, replies, chance)

A round is one exchange, or as many as the way of collecting has. (run, round, exchange) only grows. A round that cannot be
finished is *discarded*: the state stays, the round counts, and what was charged for it stays charged; it is not repeated,
because the sites' plans have so many rounds and no more.

What a reply may not do: be of another site, run, round, exchange or kind; have other names, shapes or types than the site
was asked for; hold a number that is not finite. Such a reply is left out and said. Denominators and noise are made of
``Public``, so neither depends on who was left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import DataError, SfumatoError, UsageError
from sfumato.federation import averaging, collecting, mechanisms, opening, rates, robust, selection
from sfumato.federation.averaging import check_update
from sfumato.federation.compression import decompressed
from sfumato.federation.mechanism_settings import ROBUST_UNDER, LdpFl
from sfumato.federation.messages import Ask, Json, Part, Reply, State
from sfumato.federation.public import Public
from sfumato.federation.server_state import LeftOut, RoundResult, ServerState
from sfumato.federation.settings import FederationSettings

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.randomness import Random

INTERRUPTED = "interrupted: the server stopped in the middle of it"
LONGEST_MESSAGE = 500  # of a site's refusal, whoever wrote it
OF_COLLECTING = "collecting/"  # before the names of what the way of collecting sends beside the model


def make_public(
    settings: FederationSettings, populations: Mapping[str, int], held: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> Public:
    """The public constants of a run.

    Args: held: by site, the names and shapes of the parameters that it exchanges.
    Raises: UsageError where two sites give one name different shapes: the names are the contract between their models.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sorted(held):
        if "\n" in site:
            raise UsageError(f"site = {site!r} · has a line break in its name", next="Name it otherwise.")
        for name, shape in held[site].items():
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise UsageError(
                    f"{name} = {tuple(shape)} at {site} · is {shapes[name]} at another site",
                    next="Give parts of another size another name, or build them alike.",
                )
    names = sorted(shapes)
    return Public(
        populations=dict(populations),
        rounds=settings.rounds,
        holders={name: tuple(sorted(site for site in held if name in held[site])) for name in names},
        rates=rates.rates(settings.selection, populations),
        weights={site: float(n) if settings.weights == "population" else 1.0 for site, n in populations.items()},
        shapes={name: shapes[name] for name in names},
    )


def is_secret(promise: "mechanisms.Promise", public: Public) -> bool:
    """Whether the guarantee counts on nobody's knowing which sites were asked: the server adds the noise, and a coin draws them."""
    return promise.at_server is not None and any(rate < 1 for rate in public.rates.values())


def begin(settings: FederationSettings, public: Public, state: State, *, run: str, recipe: str = "") -> ServerState:
    """Before the first round. Args: state: where training begins; every name has a holder.

    Raises: UsageError for settings that have no guarantee, or a state that is not the sites'.
    """
    mechanism = mechanisms.build(settings)
    promise = mechanism.promise(public)  # or it refuses
    if settings.least_sites > 1 and is_secret(promise, public):
        raise UsageError(
            f"least_sites = {settings.least_sites} · would show in the model how many sites were drawn, which the guarantee keeps secret",
            next="Set federation.least_sites: 1 (an empty round is noise alone then), or federation.selection: {kind: everyone}.",
        )
    selection.check(settings.selection, sites=len(public.populations))
    robust.check(settings.aggregation, public.holders)
    if settings.least_sites > len(public.populations):
        raise UsageError(
            f"least_sites = {settings.least_sites} · of {len(public.populations)} sites: every round would be discarded",
            next="Ask for fewer replies.",
        )
    way = collecting.build(settings, public)
    if not way.shows_updates and not mechanism.of_sum:
        raise UsageError(
            f"mechanism = {mechanism.name} · needs each update, and secure aggregation shows their sum alone",
            next="Use distributed noise, or leave secure aggregation out.",
        )
    different = sorted(set(state) ^ set(public.holders)) or [name for name in state if name.startswith(OF_COLLECTING)]
    if different:
        raise UsageError(
            f"state: {', '.join(different[:3])} · must be exactly what the sites hold, and not begin with {OF_COLLECTING}",
            next="Give the trained parameters of the model.",
        )
    begun = {name: tensor.detach().clone() for name, tensor in state.items()}
    if public.released and settings.mechanism.kind != "record_level":
        raise UsageError(
            f"mechanism = {settings.mechanism.kind} · sites release something before the first round, each under its own plan",
            next="Set federation.mechanism: {kind: record_level}, or leave the warm start out.",
        )
    return ServerState(
        run=run,
        recipe=recipe,
        settings=settings,
        public=public,
        state=begun,
        mechanism=mechanism.begin(public),
        round=0 if public.released else 1,
    )


def asks(server: ServerState, chance: "Random") -> tuple[ServerState, dict[str, Ask]]:
    """(the server with these sites waited for, what each is asked). Opens the next round where none is open.

    Keep the returned state, then charge the server's account up to its ``charged``, before the asks are sent.
    """
    if server.done or server.waiting is not None:
        raise UsageError(
            f"round = {server.round} · {'is over' if server.done else 'waits for replies'}", next="Call receive first."
        )
    if server.round == 0:
        asked = opening.asks(server.run, server.recipe, server.public)
        begun = RoundResult(round=0, asked=tuple(sorted(asked)), bytes_down=sum(ask.bytes for ask in asked.values()))
        return replace(server, open=begun, waiting=begun.asked), asked
    way = collecting.build(server.settings, server.public)
    if server.open is None:
        drawn = selection.draw(server.settings.selection, server.public.rates, server.losses, chance)
        server = replace(
            server,
            open=RoundResult(round=server.round, asked=drawn),
            exchange=0,
            collecting=Part(),
            charged=server.charged + 1,
        )
        sites = drawn
    else:
        sites = _answered(server.collecting)
    assert server.open is not None
    kind = way.kinds[server.exchange]
    told = mechanisms.build(server.settings).ask(server.mechanism)
    asked = {}
    for site, part in way.ask(kind, server.collecting, sites).items():
        model = part_of(server.state, server.public, site) if kind == "train" else {}
        asked[site] = Ask(
            run=server.run,
            round=server.round,
            exchange=server.exchange,
            kind=kind,
            tensors={**model, **{f"{OF_COLLECTING}{name}": tensor for name, tensor in part.tensors.items()}},
            values={"recipe": server.recipe, "told": told, "collecting": dict(part.values)},
        )
    down = server.open.bytes_down + sum(ask.bytes for ask in asked.values())
    return replace(server, waiting=tuple(sorted(asked)), open=replace(server.open, bytes_down=down)), asked


def receive(
    server: ServerState, replies: Mapping[str, Reply], chance: "Random", *, seconds: float = 0.0
) -> ServerState:
    """The server after the exchange. Nothing that a reply holds raises: it is left out and said.

    Args: replies: by the site that the engine knows it is from. seconds: that the exchange took.
    """
    if server.open is None or server.waiting is None:
        raise UsageError("waiting = nobody · replies are received after asks", next="Call asks first.")
    way = collecting.build(server.settings, server.public)
    kind = way.kinds[server.exchange] if server.round else opening.KIND
    open_, usable = server.open, {}
    for site in sorted(set(server.waiting) | set(replies)):
        reply = replies.get(site)
        open_ = replace(open_, bytes_up=open_.bytes_up + (reply.bytes if reply is not None else 0))
        try:
            usable[site] = _usable(server, site, reply, kind, way.shows_updates)
        except _Unusable as no:
            open_ = replace(open_, left_out=(*open_.left_out, LeftOut(site=site, code=no.code, message=no.message)))
    open_ = replace(open_, seconds=open_.seconds + seconds)
    if kind == opening.KIND:
        return _opened(replace(server, open=open_, waiting=None), usable)
    if kind == "train":
        steps = sum(_whole(replies[site].values.get("steps")) for site in usable)
        charged = {
            site: _whole(replies[site].values["charged"]) for site in usable if "charged" in replies[site].values
        }
        open_ = replace(open_, steps=steps, charged=charged)
        server = replace(server, losses=_with_losses(server.losses, {s: replies[s].values for s in usable}))
    server = replace(server, open=open_, waiting=None)
    enough, promise = len(usable), mechanisms.build(server.settings).promise(server.public)
    if promise.at_server is not None:
        # The server's noise hides what a site sends, not what the server does because of it: a broken reply counts as one.
        came = {site for site, reply in replies.items() if reply.refused is None}
        enough += sum(out.code in _BROKEN for out in open_.left_out if out.site in came)
    # Where a secret coin draws the sites, a round of few or none is a step of little or of noise alone, as an empty batch is.
    if enough < server.settings.least_sites and not is_secret(promise, server.public):
        return discard(server, f"{enough} of {len(open_.asked)} sites, {server.settings.least_sites} are needed")
    try:
        memory = way.receive(kind, server.collecting, usable)
        if server.exchange + 1 < len(way.kinds):
            return replace(server, collecting=_with_answered(memory, usable), exchange=server.exchange + 1)
        received = way.total(memory, open_.asked)
        return _finished(server, received, chance)
    except UsageError as no:
        if no.code not in ("too_few_sites", "wrong_share", "update_not_finite"):
            raise
        return discard(server, no.message)


def discard(server: ServerState, why: str) -> ServerState:
    """Closes the open round without a step. It stays charged, and counts."""
    assert server.open is not None
    return _closed(server, replace(server.open, sites=(), discarded=why))


def interrupted(server: ServerState) -> ServerState:
    """After a restart: a round that was open is discarded. Its asks may have been answered, and sites refuse them a second
    time; what was charged for it stays charged."""
    return server if server.open is None else discard(server, INTERRUPTED)


def stop(server: ServerState, why: str) -> ServerState:
    """No further round is opened. To be decided on public figures or released ones, since it tells."""
    return replace(server, stopped=why)


def part_of(state: State, public: Public, site: str) -> "dict[str, Tensor]":
    """What a site holds of a state."""
    return {name: tensor for name, tensor in state.items() if site in public.holders[name]}


# -- inside --


def _opened(server: ServerState, usable: Mapping[str, Reply]) -> ServerState:
    assert server.open is not None
    if server.settings.aggregation.kind != "mean":
        no = opening.disagreeing(server.public, usable)
        out = tuple(LeftOut(site=site, code="disagrees", message=why) for site, why in sorted(no.items()))
        server = replace(server, open=replace(server.open, left_out=(*server.open.left_out, *out)))
        usable = {site: reply for site, reply in usable.items() if site not in no}
    assert server.open is not None
    if len(usable) < server.settings.least_sites:
        return discard(
            server, f"{len(usable)} of {len(server.open.asked)} sites, {server.settings.least_sites} are needed"
        )
    released = opening.combined(server.public, usable)
    return _closed(replace(server, released=released), replace(server.open, sites=tuple(sorted(usable))))


_BROKEN = ("update_shape", "update_not_finite")


class _Unusable(SfumatoError):
    """A reply that is left out; never seen outside of this module."""


def _usable(server: ServerState, site: str, reply: Reply | None, kind: str, shows_updates: bool) -> Reply:
    """The reply with what the way of collecting is to see of it. Raises _Unusable."""
    assert server.open is not None
    if site not in (server.waiting or ()):
        raise _Unusable("was not asked in this exchange", code="not_asked")
    if reply is None:
        raise _Unusable("did not answer in time", code="silent")
    if reply.site != site:
        raise _Unusable(f"answered in the name of {reply.site!r}", code="wrong_name")
    place = (reply.run, reply.round, reply.exchange, reply.kind)
    if place != (server.run, server.round, server.exchange, kind):
        raise _Unusable(f"answered round {reply.round}, exchange {reply.exchange}, {reply.kind!r}", code="late_reply")
    if reply.refused is not None:
        raise _Unusable(reply.refused.message[:LONGEST_MESSAGE], code=reply.refused.code[:60])
    said = reply.values.get("said", {})
    if not isinstance(said, dict):
        raise _Unusable("said something that is not a mapping", code="reply_malformed")
    if kind == opening.KIND:
        try:
            opening.check(site, reply, server.public)
        except UsageError as broken:
            raise _Unusable(broken.message, code=broken.code) from None
    if kind == "train" and shows_updates:
        like = part_of(server.state, server.public, site)
        try:
            tensors = decompressed(server.settings.compression, reply.tensors, like)
            check_update(site, tensors, like=like)
        except (UsageError, DataError) as broken:
            code = broken.code if isinstance(broken, UsageError) else "update_shape"
            raise _Unusable(broken.message, code=code) from None
        reply = replace(reply, tensors=tensors)
    return replace(reply, values=said)


def _finished(server: ServerState, received: "mechanisms.Received", chance: "Random") -> ServerState:
    assert server.open is not None
    mechanism = mechanisms.build(server.settings)
    weights = {site: server.public.weights[site] / server.public.rates[site] for site in server.public.sites}
    combine = averaging.combiner(server.settings.aggregation, weights)
    delta, memory = mechanism.at_server(received, server.public, server.mechanism, combine, chance)
    state, optimizer = averaging.server_step(server.settings.server, server.state, delta, server.optimizer)
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        return discard(server, "the state would not be finite any more")
    said = {out.site for out in server.open.left_out}  # who was silent is said already
    broken = [
        LeftOut(site=site, code=code, message=why[:LONGEST_MESSAGE])
        for site, (code, why) in sorted(received.broken.items())
        if site not in said
    ]
    unchanged = len(set(server.state) - set(delta))
    result = replace(server.open, sites=received.sites, left_out=(*server.open.left_out, *broken), unchanged=unchanged)
    chosen = server.settings.mechanism
    if chosen.kind in ROBUST_UNDER and not (isinstance(chosen, LdpFl) and chosen.shuffled):
        lengths, cosines = averaging.compared(received.updates, delta)
        result = replace(result, lengths=lengths, cosines=cosines)
    return _closed(replace(server, state=state, mechanism=memory, optimizer=optimizer), result)


def _closed(server: ServerState, result: RoundResult) -> ServerState:
    return replace(
        server,
        open=None,
        waiting=None,
        exchange=0,
        collecting=Part(),
        round=server.round + 1,
        results=(*server.results, result),
    )


def _answered(memory: Part) -> tuple[str, ...]:
    sites = memory.values.get("answered", [])
    assert isinstance(sites, list)  # _with_answered wrote it
    return tuple(str(site) for site in sites)


def _with_answered(memory: Part, usable: Mapping[str, Reply]) -> Part:
    answered: list[Json] = [*sorted(usable)]
    return Part(tensors=memory.tensors, values={**memory.values, "answered": answered})


def _with_losses(losses: Part, values: Mapping[str, Mapping[str, Json]]) -> Part:
    told = {site: float(said["loss"]) for site, said in values.items() if isinstance(said.get("loss"), float)}  # type: ignore[arg-type]
    return Part(values={**losses.values, **told}) if told else losses


def _whole(value: Any) -> int:
    """A number that a site says of itself, for the report; nothing is divided by it."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
