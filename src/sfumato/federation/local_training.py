"""A site's own work in a round, charged before its data are read: what it releases before the first, its local steps after."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import LedgerError, UsageError
from sfumato.federation.mechanisms import Promise
from sfumato.federation.messages import Json, State
from sfumato.federation.policy import PolicyRefused, check_limits
from sfumato.federation.sites import Site, TrainSteps
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import (
    DpSgd,
    NotPrivate,
    PrivacyPlan,
    PrivatePlan,
    SiteUpdates,
    TrainingPlan,
)
from sfumato.randomness import Random, SecretRandom

if TYPE_CHECKING:
    from torch import Tensor, nn


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
