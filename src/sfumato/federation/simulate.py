"""A whole federation in one process: every site with its own data, plan, ledger and last word. [shell: files of sites]

The exchange of this engine is a loop over the sites; asks and replies go through the same bytes as over a network. Sites hold
different people, so at record level a person's epsilon is their own site's (parallel composition, add-or-remove); the
largest of them is what can be said of everybody.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.federation import local, local_training, mechanisms, opening, rounds, server_state
from sfumato.federation.keeping import Keeper
from sfumato.federation.messages import Ask, Part, Refusal, Reply, State
from sfumato.federation.opening import Released
from sfumato.federation.public import Public
from sfumato.federation.server_state import RoundResult, ServerState
from sfumato.federation.serving import Exchange, serve
from sfumato.federation.settings import FederationSettings
from sfumato.federation.sites import Site, TrainSteps, Work
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Adjacency
from sfumato.privacy.events import Event
from sfumato.privacy.ledger import Ledger, events_of_jsonl, export_jsonl, show
from sfumato.privacy.plan import DpSgd, SiteUpdates
from sfumato.randomness import Random, SecretRandom
from sfumato.records import Record, UnitTable

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """Attributes:
    epsilon: spent according to the site's own ledger, or else the server's; None without a guarantee.
    steps: charged to the site's ledger, in earlier calls too (with bands, a cycle of them counts whole); of steps that are
      not charged one by one, those of its rounds.
    rounds: in which its update was used.
    refused: the other rounds that it was asked for, with the reason.
    """

    name: str
    population: int
    epsilon: float | None
    delta: float | None
    rounds: int
    steps: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, kw_only=True)
class FederationResult:
    """Attributes:
    state: the trained parameters after the last round.
    epsilon: the largest of the sites'; None if any site trained without a guarantee.
    unit, trust: of that epsilon: whose it is, and against whom it holds.
    bytes_up, bytes_down: tensors only, without names and framing.
    """

    state: State
    sites: tuple[SiteResult, ...]
    rounds: tuple[RoundResult, ...]
    unit: str
    trust: str
    finished: bool = True
    stopped: str = ""

    @property
    def epsilon(self) -> float | None:
        values = [site.epsilon for site in self.sites if site.epsilon is not None]
        return max(values) if len(values) == len(self.sites) else None

    @property
    def bytes_up(self) -> int:
        return sum(result.bytes_up for result in self.rounds)

    @property
    def bytes_down(self) -> int:
        return sum(result.bytes_down for result in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything but the state."""
        return {
            "epsilon": self.epsilon,
            "unit": self.unit,
            "trust": self.trust,
            "stopped": self.stopped,
            "rounds": len(self.rounds),
            "sites": [
                {**asdict(site), "refused": [asdict(refusal) for refusal in site.refused]} for site in self.sites
            ],
            "rounds_detail": [
                {
                    **asdict(r),
                    "asked": list(r.asked),
                    "sites": list(r.sites),
                    "left_out": [asdict(o) for o in r.left_out],
                }
                for r in self.rounds
            ],
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


def simulate(
    sites: Sequence[Site],
    work: Work,
    *,
    run: str,
    folder: Path | None = None,
    resume: bool = False,
    start: "State | None" = None,
    chance: Random | None = None,
    on_round: "Callable[[RoundResult, State], str | None] | None" = None,
    pause: Callable[[], bool] | None = None,
    exchange: Exchange | None = None,
    opened: "Callable[[Part], State | None] | None" = None,
) -> FederationResult:
    """All rounds of ``work.settings``, or those that are left.

    A site that refuses is reported and the round goes on with the others; so does one whose update is not usable. The
    ledgers outlive this call, and a site answers no ask twice, so the same run cannot be begun again in the same place.

    Args:
      folder: of the server: its checkpoint after every exchange, and its ledger where the mechanism has one. None: nothing
        is kept, and a mechanism that charges the server is refused.
      resume: goes on from the checkpoint in ``folder``. A round that was open is discarded, stays charged, and counts.
      start: trained parameters that the first round begins at, public; those that are not named begin as they are built.
      chance: of the server; by default the operating system's.
      on_round: sees each round's result and the global state after it; a text that it returns is why no further round is opened.
      pause: asked before each round; then the result is not ``finished``, and can be resumed.
      exchange: another engine's; by default the sites answer in this process.
      opened: makes of what the sites released before the first round the state that it begins with; None where that was
        interrupted. Asked again on ``resume`` until the first round is opened. Without it training begins at fresh weights.
    """
    _check_sites(sites)
    keeper = Keeper(folder) if folder is not None else None
    server = keeper.load(work.settings, work.public, recipe=work.recipe) if keeper is not None and resume else None
    if server is None:
        begun = {**start_of(sites, work), **(start or {})}
        state = {name: t for name, t in begun.items() if name in work.public.holders}
        server = rounds.begin(work.settings, work.public, state, run=run, recipe=work.recipe)
    else:
        server = rounds.interrupted(server)

    def seen(after: ServerState) -> ServerState | None:
        why = on_round(after.results[-1], after.state) if on_round is not None else None
        return rounds.stop(after, why) if why else None

    with server_ledger(work, run, folder) as ledger:
        go_on = partial(
            serve,
            exchange=exchange_here(sites, work) if exchange is None else exchange,
            chance=SecretRandom() if chance is None else chance,
            keeper=keeper,
            ledger=ledger,
            on_round=seen,
            pause=pause,
        )
        if server.round == 0:
            server = go_on(server, until=0)
        if server.round == 1 and server.released.tensors and opened is not None:
            begun = opened(server.released)
            if begun is None:
                return result_of(server, sites, folder)
            server = replace(server, state={name: begun[name].detach().clone() for name in server.state})
        if server.round > 0:
            server = go_on(server)
    return result_of(server, sites, folder)


def exchange_here(sites: Sequence[Site], work: Work) -> Exchange:
    """The exchange in this process, one site after another. What goes wrong at a site, and is no refusal, is raised."""
    by_name = {site.name: site for site in sites}

    def failed(error: Exception) -> None:
        raise error

    def exchange(asked: dict[str, Ask]) -> Mapping[str, Reply]:
        replies = {}
        for name, ask in asked.items():
            reply = local.answer(by_name[name], work, Ask.from_arrays(*ask.to_arrays()), failed=failed)
            replies[name] = Reply.from_arrays(*reply.to_arrays())
        return replies

    return exchange


def start_of(sites: Sequence[Site], work: Work) -> "dict[str, Tensor]":
    """The trained parameters of every kind of model that the sites have, as they are built."""
    state = dict(local_training.trained_state(work.build()))
    for site in sites:
        if site.build is not None:
            state |= local_training.trained_state(site.build())
    return state


def public_of(sites: Sequence[Site], settings: FederationSettings, build: "Callable[[], nn.Module]") -> Public:
    """The public constants of these sites: populations from their plans, parameters from their models.

    A parameter that one site alone has stays at home, where there are others; so does one that ``settings.home`` names."""
    common = _shapes(build)
    held = {site.name: common if site.build is None else _shapes(site.build) for site in sites}
    present = {name for names in held.values() for name in names}
    unknown = [
        home for home in settings.home if not any(replace(settings, home=(home,)).stays_home(n) for n in present)
    ]
    if unknown:
        raise UsageError(
            f"home = {', '.join(unknown)} · is no trained parameter of any site",
            next="Name parameters, or leave it out.",
        )
    held = {site: {n: s for n, s in names.items() if not settings.stays_home(n)} for site, names in held.items()}
    if len(sites) > 1:
        counts = Counter(name for names in held.values() for name in names)
        held = {site: {n: shape for n, shape in names.items() if counts[n] > 1} for site, names in held.items()}
    public = rounds.make_public(settings, {site.name: site.plan.population for site in sites}, held)
    own = {site.name: site.identity.public.hex() for site in sites if site.identity is not None}
    return replace(public, identities=dict(settings.identities) or own)


def _shapes(build: "Callable[[], nn.Module]") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in local_training.trained_state(build()).items()}


def work_of(
    sites: Sequence[Site],
    *,
    build: "Callable[[], nn.Module]",
    train_steps: TrainSteps,
    settings: FederationSettings,
    recipe: str = "",
    random: Callable[[], Random] = SecretRandom,
    releases: Mapping[str, Mapping[str, Released]] | None = None,
) -> Work:
    """What these sites run together, in one process. Args: releases: by site and part, of what is released before the first round."""
    return Work(
        settings=settings,
        public=opening.announced(public_of(sites, settings, build), releases or {}),
        build=build,
        train_steps=train_steps,
        recipe=recipe,
        random=random,
    )


def server_ledger(work: Work, run: str, folder: Path | None) -> "Any":
    """The server's ledger, open, where the mechanism charges one; as a context manager."""
    plan = mechanisms.build(work.settings).promise(work.public).at_server
    if plan is None:
        return nullcontext(None)
    if folder is None:
        raise UsageError(
            f"mechanism = {work.settings.mechanism.kind} · is charged to the server's ledger, and the server has no folder",
            next="Give simulate(folder=...).",
        )
    return Ledger.open(folder / "ledger.db", run=run, plan=plan)


def result_of(server: ServerState, sites: Sequence[Site], folder: Path | None) -> FederationResult:
    """What a federation came to, from the server's state and the ledgers."""
    promise = mechanisms.build(server.settings).promise(server.public)
    of_server = show(folder / "ledger.db") if promise.at_server is not None and folder is not None else None

    @cache  # of a thousand sites many have spent the same
    def epsilon_of(events: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float | None:
        return accounting.epsilon(events, delta, adjacency=adjacency)

    return FederationResult(
        state=server.state,
        sites=tuple(_site_result(site, server, promise, of_server, epsilon_of) for site in sites),
        rounds=server.results,
        unit=sites[0].plan.unit if promise.unit == "training" else promise.unit,
        trust=promise.trust,
        finished=server.done,
        stopped=server.stopped,
    )


def split_by_site(records: Sequence[Record], sites: int, column: str | None = None) -> dict[str, list[Record]]:
    """The records of each site: by ``metadata["site"]`` where it is known (more of them than sites are put together), else
    by a hash of the unit's name: one unit more must not move others to other sites, or the sites' epsilons were no longer
    those of disjoint data. All records of a unit go to one site, that of its first record: otherwise its epsilons would add
    up. The names of the sites are public.

    Args: column: of metadata, in place of "site"; then nothing is split by chance.
    Raises: UsageError: a record lacks ``column``, or it has fewer values than there are sites.
    """
    checks.positive(sites=sites)
    key = column or "site"
    named = sorted({str(record.metadata[key]) for record in records if record.metadata.get(key)})
    lacking = sum(not record.metadata.get(key) for record in records)
    by_name = len(named) >= sites and not lacking
    if column is not None and not by_name:
        raise UsageError(
            f"data.site_column = {column}, sites = {sites} · {lacking} of {len(records)} records lack it; there are {len(named)} values",
            next="Name a metadata column that every record has, and no more sites than it has values; or leave it out.",
        )
    names = named if by_name else [f"site-{index + 1}" for index in range(sites)]
    groups = [" + ".join(names[index::sites]) for index in range(sites)]
    index_of = {name: index for index, name in enumerate(names)}
    home: dict[str, str] = {}
    for record in records:
        if record.unit not in home:
            index = index_of[str(record.metadata[key])] if by_name else _number(record.unit)
            home[record.unit] = groups[index % sites]
    split: dict[str, list[Record]] = {group: [] for group in groups}
    for record in records:
        split[home[record.unit]].append(record)
    return split


def _number(unit: str) -> int:
    return int.from_bytes(hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _site_result(
    site: Site,
    server: ServerState,
    promise: mechanisms.Promise,
    of_server: dict[str, Any] | None,
    epsilon_of: Callable[[tuple[Event, ...], float, Adjacency], float | None],
) -> SiteResult:
    taken = sum(site.name in result.sites for result in server.results if result.round)
    charged = promise.at_site or (site.plan if promise.trains == "private" else None)
    steps, epsilon, delta = taken * server.settings.local_steps, None, None
    if isinstance(charged, DpSgd | SiteUpdates):
        if site.elsewhere:
            events = events_asked(site, promise, server.results, server.settings.steps_per_round)
        else:  # Where no ledger could be opened, nothing was charged and no data touched.
            events = tuple(events_of_jsonl(export_jsonl(site.ledger))) if site.ledger.exists() else ()
        value, delta = epsilon_of(events, charged.delta, charged.adjacency), charged.delta
        epsilon = value if value is None or math.isfinite(value) else None
        if promise.trains == "private":
            before = site.opening.events() if site.opening is not None else ()
            steps = local_training.steps_of(site.plan, sum(event.count for event in events if event not in before))
    elif of_server is not None:
        epsilon, delta = of_server["epsilon"], of_server["delta"]
    return SiteResult(
        name=site.name,
        population=site.plan.population,
        epsilon=epsilon,
        delta=delta,
        rounds=taken,
        steps=steps,
        refused=server_state.refusals(server, site.name),
    )


def events_asked(
    site: Site, promise: mechanisms.Promise, results: Sequence[RoundResult], steps: int, *, used: bool = False
) -> tuple[Event, ...]:
    """What a site has charged at most, as its ledger is on another machine: every round that it was asked for, whether it
    answered or not. What it did charge, its own ledger says.

    Args: steps: charged in a round. used: only rounds whose update of this site was used; so much it has charged at least.
    """
    took = [site.name in (result.sites if used else result.asked) for result in results]
    asked = sum(took[i] for i, result in enumerate(results) if result.round)
    opened = any(took[i] for i, result in enumerate(results) if not result.round)
    before = site.opening.events() if site.opening is not None and opened else ()
    charged = promise.at_site or site.plan
    assert isinstance(charged, DpSgd | SiteUpdates)
    if isinstance(charged, SiteUpdates):
        return (charged.event(asked),)
    steps_asked = min(charged.event().count, asked * charged.events_of(steps))
    return (*before, *((charged.event(steps_asked),) if steps_asked else ()))


def _check_sites(sites: Sequence[Site]) -> None:
    names = [site.name for site in sites]
    if not sites or len(set(names)) != len(names) or len({site.ledger for site in sites}) != len(sites):
        raise UsageError(
            f"sites = {names} · must be at least one, each with its own name and its own ledger",
            next="Name them apart.",
        )
    seen: dict[str, str] = {}
    for site in sites:
        for unit in site.table.unit_names if isinstance(site.table, UnitTable) else ():
            if seen.setdefault(unit, site.name) != site.name:
                raise UsageError(
                    f"sites {seen[unit]} and {site.name} · hold the same unit: its epsilons would add up",
                    next="Give all records of a person to one site (simulate.split_by_site does).",
                )
