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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.errors import LedgerError, PrivacyRefused, UsageError
from sfumato.federation import collecting, mechanisms, opening
from sfumato.federation.compression import compressed
from sfumato.federation.gate import Gate
from sfumato.federation.keeping import read_part, write_part
from sfumato.federation.mechanisms import Promise
from sfumato.federation.messages import Ask, Json, Part, Reply, State
from sfumato.federation.policy import PolicyRefused, SitePolicy, check_asked, check_limits
from sfumato.federation.public import Public
from sfumato.federation.rounds import OF_COLLECTING
from sfumato.federation.secure.keys import Identity
from sfumato.federation.settings import ByChargedLoss, FederationSettings
from sfumato.privacy.ledger import Ledger, Sign
from sfumato.privacy.ledger.storage import Lock
from sfumato.privacy.plan import (
    Composition,
    DpSgd,
    MeanEmbedding,
    NotPrivate,
    PrivacyPlan,
    PrivatePlan,
    SiteUpdates,
    TrainingPlan,
)
from sfumato.randomness import Random, SecretRandom
from sfumato.records import UnitTable

if TYPE_CHECKING:
    from torch import Tensor, nn


class TrainSteps(Protocol):
    """Trains ``model`` in place for ``steps`` steps of ``plan`` on ``table``, each charged to ``ledger`` beforehand.

    ``first_step`` is how many steps of the plan were taken before, so that a schedule can go on where it was. Of a plan
    without a guarantee nothing is charged, and ``ledger`` may be None.
    """

    def __call__(
        self,
        model: "nn.Module",
        table: UnitTable,
        plan: TrainingPlan,
        ledger: Ledger | None,
        *,
        steps: int,
        first_step: int,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """One member of a federation.

    Attributes:
      table: its records, or what reads them; that is called after policy and ledger have agreed, by training only.
      opening: its plan of what is released once, before the first round, where the recipe begins with that; ``release``
        makes it, of the site's own records: called after policy and ledger have agreed.
      plan: covers ALL rounds: ``plan.steps = rounds x local_steps``. With bands > 1, they should divide local_steps: every
        round begins its own cycle, which is charged whole. ``plan.population`` is public. Where the mechanism and not the
        steps protects (``Promise.trains`` is "free"), it is a ``NotPrivate`` one.
      ledger: its own file; it outlives the rounds, and the run. What the site keeps lies beside it.
      account: of its own data set, shared with its other runs.
      account_limit: (epsilon, delta) of all runs on that account together.
      sign: signs the ledger's head at the end of every round, with the site's key (``release.keys.signer``).
      gates: each looks at what is about to be sent, and may refuse it.
      build: makes this site's own model, where it is another than the others'.
      identity: the key that the others know it by, for secure aggregation.
      elsewhere: its records and its ledger are on another machine; here it is its name and its plan.
    """

    name: str
    table: UnitTable | Callable[[], UnitTable]
    plan: TrainingPlan
    ledger: Path
    account: Path | None = None
    account_limit: tuple[float, float] | None = None
    sign: Sign | None = None
    policy: SitePolicy = field(default_factory=SitePolicy)
    gates: tuple[Gate, ...] = ()
    build: "Callable[[], nn.Module] | None" = None
    identity: Identity | None = None
    elsewhere: bool = False
    opening: MeanEmbedding | None = None
    release: "Callable[[MeanEmbedding, Random], State] | None" = None

    @property
    def whole(self) -> PrivacyPlan:
        """What is charged to its ledger in all."""
        if self.opening is None:
            return self.plan
        assert isinstance(self.plan, DpSgd)  # ``planning`` makes no other
        return Composition.of(self.opening, self.plan, target_epsilon=self.plan.target_epsilon)

    @property
    def folder(self) -> Path:
        return self.ledger.parent

    def read(self) -> UnitTable:
        return self.table() if callable(self.table) else self.table


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is run at every site, from the site's own copy of the recipe: the server cannot change it.

    Attributes:
      recipe: sha256 of the resolved recipe, as the policy names it; an ask for another one is refused.
      build: makes the model with its initial weights, the same at every call.
      random: chance of the mechanism, a new source for every answer.
    """

    settings: FederationSettings
    public: Public
    build: "Callable[[], nn.Module]"
    train_steps: TrainSteps
    recipe: str = ""
    random: Callable[[], Random] = SecretRandom


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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Attributes:
    answered: (round, exchange) of the last ask of this run that was taken up, answered well or not.
    rounds: in which an update was made.
    collecting: of the open round.
    home: parameters that are trained here and sent to nobody.
    """

    path: Path
    run: str
    answered: tuple[int, int] = (0, -1)  # before the opening
    rounds: int = 0
    collecting: Part = field(default_factory=Part)
    home: State = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, site: Site, ask: Ask) -> "Iterator[Memory]":
        """Of this run; one process at a time. Raises PolicyRefused where another run is kept here, LedgerError if it is busy."""
        path = site.ledger.with_suffix(".kept")
        site.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(path, ask.run)
        try:
            if not path.exists():
                if site.ledger.exists():
                    raise LedgerError(
                        f"{path} · is gone, and the ledger {site.ledger} is not: asks could be answered twice",
                        next="Restore the site's folder, or begin a new run in a new one.",
                        code="memory_missing",
                    )
                yield cls(path=path, run=ask.run)
                return
            part = read_part(path)
            values: Any = part.values
            if values["run"] != ask.run:
                raise PolicyRefused(
                    f"run = {ask.run!r} · this site's folder is of another run", next="Give each run its own folder.",
                    code="other_run",
                )  # fmt: skip
            yield cls(
                path=path,
                run=ask.run,
                answered=(values["answered"][0], values["answered"][1]),
                rounds=values["rounds"],
                collecting=Part(tensors=_under("collecting/", part.tensors), values=values["collecting"]),
                home=_under("home/", part.tensors),
            )
        finally:
            lock.release()

    def answering(self, ask: Ask) -> "Memory":
        """Noted, before anything is done for it. What an earlier round left of its exchanges is forgotten."""
        kept = self.collecting if ask.exchange else Part()
        return replace(self, answered=(ask.round, ask.exchange), collecting=kept)

    def write(self) -> None:
        tensors = {f"home/{name}": tensor for name, tensor in self.home.items()}
        tensors |= {f"collecting/{name}": tensor for name, tensor in self.collecting.tensors.items()}
        values: dict[str, Json] = {
            "run": self.run,
            "answered": list(self.answered),
            "rounds": self.rounds,
            "collecting": dict(self.collecting.values),
        }
        write_part(self.path, Part(tensors=tensors, values=values))


def kept_at_home(site: Site) -> "dict[str, Tensor]":
    """The parameters that this site trained for itself, as the last round left them: for its own use, never to be sent."""
    path = site.ledger.with_suffix(".kept")
    return _under("home/", read_part(path).tensors) if path.exists() else {}


def _under(prefix: str, tensors: State) -> "dict[str, Tensor]":
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _log(site: Site, ask: Ask, what: str) -> None:
    """To the site's own log. Never sent."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with site.ledger.with_suffix(".log").open("a", encoding="utf-8") as file:
        file.write(f"{now} {ask.run} round {ask.round} exchange {ask.exchange}: {what}\n")


# -- a round's training --


@dataclass(frozen=True, kw_only=True)
class LocalUpdate:
    """Attributes:
    delta: new minus global, of every parameter that is exchanged.
    steps: taken in this round; public.
    charged: events in the site's ledger by now; a function of the plan.
    home: the trained parameters that stay here.
    loss: of the weights with which the round began, noised and charged.
    """

    site: str
    delta: "dict[str, Tensor]"
    steps: int
    charged: int = 0
    home: State = field(default_factory=dict)
    loss: float | None = None

    def said(self) -> dict[str, Json]:
        return {
            "steps": self.steps,
            "charged": self.charged,
            **({"loss": self.loss} if self.loss is not None else {}),
        }


def open_ledger(site: Site, run: str, plan: PrivacyPlan) -> Ledger:
    limit = site.account_limit
    if site.policy.account_epsilon is not None and isinstance(plan, PrivatePlan):
        limit = (site.policy.account_epsilon, plan.delta)
    return Ledger.open(
        site.ledger, run=run, plan=plan, account=site.account, account_limit=limit, sign=site.sign
    )  # fmt: skip


def open_round(site: Site, *, run: str, random: Random | None = None) -> State:
    """What this site releases before the first round, by the name of each part.

    Guarantee: the site's ledger was charged with ``site.opening`` before its records were read; what comes back is that one
    event. It is made once: a ledger that holds it already refuses.
    Raises: PrivacyRefused: the policy or the ledger says no.
    """
    if site.opening is None or site.release is None:
        raise UsageError(
            f"site {site.name} · has nothing to release before the first round", next="Use the recipe of the server."
        )
    with open_ledger(site, run, site.whole) as ledger:
        (event,) = site.opening.events()
        left = ledger.remaining(site.plan.event(1)) if isinstance(site.plan, DpSgd) else None
        check_limits(site.policy, plan=site.plan, left=left, steps=0, before=(event,))
        if ledger.remaining(event) < 1:
            raise PolicyRefused(
                "opening · was charged before; it is made once", next="Begin a new run.", code="budget_exhausted"
            )
        ledger.commit(ledger.reserve(event, 0))  # durable before the data are read
        return dict(site.release(site.opening, random if random is not None else SecretRandom()))


def train_round(
    site: Site,
    global_state: State,
    *,
    build: "Callable[[], nn.Module]",
    train_steps: TrainSteps,
    steps: int,
    run: str,
    promise: Promise | None = None,
    home: Mapping[str, Any] | None = None,
    rounds: int = 0,
    number: int = 1,
    largest_loss: float | None = None,
    random: Random | None = None,
) -> LocalUpdate:
    """One round at one site. Nothing of the arguments is changed, but the site's ledger is written.

    Guarantee: where the steps are private, the update is a function of the global state and of ``steps`` steps of the site's
    plan, all of them charged to the site's ledger. Where the mechanism protects (``promise.trains`` "free"), its event of this
    round is charged before the data are read. A refusal comes before the data is touched.

    Args: home: parameters that stay here, as the last round left them. rounds: in which an update was made before.
      number: of the round. What a server's account has spent by then is of all rounds, asked or not: a coin decided.
      largest_loss: the loss is told too, clipped to it, with chance from ``random``; it is charged as one step more.
    Raises: PrivacyRefused: the policy, the plan or the ledger says no. UsageError: the model cannot be federated.
    """
    from sfumato.training.rounds import charged_loss

    if promise is not None and promise.trains == "free":
        return _free_round(site, global_state, build, train_steps, steps, run, promise, home or {}, rounds, number)
    with open_ledger(site, run, site.whole) as ledger:
        left = ledger.remaining(site.plan.event(1)) if isinstance(site.plan, DpSgd) else None
        told = isinstance(site.plan, DpSgd) and largest_loss is not None
        released = (
            site.opening.events() if site.opening is not None and not ledger.remaining(site.opening.events()[0]) else ()
        )
        check_limits(site.policy, plan=site.plan, left=left, steps=steps + told, before=released)
        model, fixed = _prepared(build, global_state, home or {})
        loss = None
        if isinstance(site.plan, DpSgd) and largest_loss is not None:
            loss = charged_loss(model, site.read, site.plan, ledger, largest_loss=largest_loss, random=random)
        opened = len(released)
        before = ledger.spent_steps - opened
        first = steps_of(site.plan, before) if isinstance(site.plan, DpSgd) else rounds * steps
        train_steps(model, site.read(), site.plan, ledger, steps=steps, first_step=first)
        spent = ledger.spent_steps - opened
        if isinstance(site.plan, DpSgd) and spent - before != site.plan.events_of(steps):
            raise LedgerError(
                f"site {site.name}: {spent - before} events charged · the round has {steps} steps, which are "
                f"{site.plan.events_of(steps)} events",
                next="Nothing was sent. Train with an engine that reserves every step.",
                code="ledger_steps",
            )
    return replace(_update(site, model, fixed, global_state, steps, spent), loss=loss)


def _free_round(
    site: Site,
    global_state: State,
    build: "Callable[[], nn.Module]",
    train_steps: TrainSteps,
    steps: int,
    run: str,
    promise: Promise,
    home: Mapping[str, Any],
    rounds: int,
    number: int,
) -> LocalUpdate:
    """Ordinary steps, of which only what the mechanism makes is sent."""
    if not isinstance(site.plan, NotPrivate):
        raise UsageError(
            f"plan = {type(site.plan).__name__} · under this mechanism the local steps are ordinary ones",
            next="Give the site a NotPrivate plan, or use mechanism record_level.",
        )
    charged = 0
    if promise.at_site is not None:
        with open_ledger(site, run, promise.at_site) as ledger:
            event = promise.at_site.event(1)
            check_limits(site.policy, plan=promise.at_site, left=ledger.remaining(event), steps=1)
            ledger.commit(ledger.reserve(event, ledger.spent_steps))  # durable before the data are read
            charged = ledger.spent_steps
    else:
        plan = promise.at_server or site.plan
        before = number - 1
        left = max(0, plan.event().count - before * plan.event(1).count) if isinstance(plan, SiteUpdates) else None
        check_limits(site.policy, plan=plan, left=left, steps=1 if isinstance(plan, SiteUpdates) else steps)
    model, fixed = _prepared(build, global_state, home)
    train_steps(model, site.read(), site.plan, None, steps=steps, first_step=rounds * steps)
    return _update(site, model, fixed, global_state, steps, charged)


def _prepared(
    build: "Callable[[], nn.Module]", global_state: State, home: Mapping[str, Any]
) -> "tuple[nn.Module, dict[str, Tensor]]":
    """The model as the round begins, and what of it must not change."""
    model = build()
    load_trained(model, global_state, home=home)
    return model, {name: tensor.clone() for name, tensor in _not_trained(model).items()}


def _update(
    site: Site, model: "nn.Module", fixed: "dict[str, Tensor]", global_state: State, steps: int, charged: int
) -> LocalUpdate:
    after = _not_trained(model)
    leaking = [name for name, tensor in fixed.items() if not tensor.equal(after[name])]
    if leaking:
        raise UsageError(
            f"site {site.name}: {', '.join(leaking[:3])} changed in training · only trained parameters are protected",
            next="Use layers without running statistics (group norm in place of batch norm).",
        )
    trained = trained_state(model)
    return LocalUpdate(
        site=site.name,
        delta={name: trained[name] - tensor for name, tensor in global_state.items()},
        steps=steps,
        charged=charged,
        home={name: tensor for name, tensor in trained.items() if name not in global_state},
    )


def steps_of(plan: TrainingPlan, events: int) -> int:
    """How many steps so many charged events stand for; with bands, a cycle that was begun counts whole."""
    return min(plan.steps, plan.bands * events) if isinstance(plan, DpSgd) else events


def trained_state(model: "nn.Module") -> "dict[str, Tensor]":
    """A copy of the trained parameters: all that the server and the sites may exchange."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: "nn.Module", state: State, *, home: Mapping[str, Any] | None = None) -> None:
    """Puts exchanged parameters, and those that stay at home, into a model.

    Args: home: None: ``state`` must be all that the model trains. Else what else it trains comes from here, or is as built.
    Raises: UsageError unless the names and shapes are the model's own.
    """
    own = trained_state(model)
    unknown = set(state) - set(own) if home is not None else set(own) ^ set(state)
    different = sorted(unknown) or [n for n in state if own[n].shape != state[n].shape]
    if different:
        raise UsageError(
            f"state: {', '.join(different[:3])} · must be the model's trained parameters, name by name and shape by shape",
            next="Build the same model at every site.",
        )
    model.load_state_dict({**dict(home or {}), **dict(state)}, strict=False)


def _not_trained(model: "nn.Module") -> "dict[str, Tensor]":
    """Buffers and frozen parameters: what no clipping and no noise protects."""
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {**frozen, **dict(model.named_buffers())}
