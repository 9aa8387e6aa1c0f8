"""What a site does in one round: check its own limits, take the global weights, train in private, give back the difference.

What leaves the site is the difference of the trained parameters, and the public number of steps; nothing else. It was
trained under the site's own plan, so it is as private as the plan says, whoever reads it (record-level privacy at the site).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sfumato.errors import LedgerError, UsageError
from sfumato.federation.policy import SitePolicy, require_permission
from sfumato.privacy.ledger import Ledger, Sign
from sfumato.privacy.plan import DpSgd, TrainingPlan
from sfumato.records import UnitTable

if TYPE_CHECKING:
    from torch import Tensor, nn

State = Mapping[str, "Tensor"]


class TrainSteps(Protocol):
    """Trains ``model`` in place for ``steps`` steps of ``plan`` on ``table``, each charged to ``ledger`` beforehand.

    ``first_step`` is how many steps of the plan were charged before, so that a schedule can go on where it was.
    """

    def __call__(
        self, model: "nn.Module", table: UnitTable, plan: TrainingPlan, ledger: Ledger, *, steps: int, first_step: int
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """One member of a federation.

    Attributes:
      table: its records; they are read by this site's training only.
      plan: covers ALL rounds: ``plan.steps = rounds x local_steps``. With bands > 1, they should divide local_steps: every
        round begins its own cycle, which is charged whole. ``plan.population`` is public, and is its weight.
      ledger: its own file; it outlives the rounds, and the run.
      account: of its own data set, shared with its other runs.
      account_limit: (epsilon, delta) of all runs on that account together.
      sign: signs the ledger's head at the end of every round, with the site's key (``release.keys.signer``).
    """

    name: str
    table: UnitTable
    plan: TrainingPlan
    ledger: Path
    account: Path | None = None
    account_limit: tuple[float, float] | None = None
    sign: Sign | None = None
    policy: SitePolicy = field(default_factory=SitePolicy)

    @property
    def weight(self) -> float:
        return float(self.plan.population)


@dataclass(frozen=True, kw_only=True)
class LocalUpdate:
    """Attributes:
    delta: new minus global, of every trained parameter.
    steps: taken in this round; public.
    weight: the site's public population.
    """

    site: str
    delta: dict[str, "Tensor"]
    steps: int
    weight: float

    @property
    def bytes(self) -> int:
        return state_bytes(self.delta)


def open_ledger(site: Site, run: str) -> Ledger:
    return Ledger.open(
        site.ledger,
        run=run,
        plan=site.plan,
        account=site.account,
        account_limit=site.account_limit,
        sign=site.sign,
    )


def train_round(
    site: Site,
    global_state: State,
    *,
    build: Callable[[], "nn.Module"],
    train_steps: TrainSteps,
    steps: int,
    run: str,
) -> LocalUpdate:
    """One round at one site. Nothing of the arguments is changed, but the site's ledger is written.

    Guarantee: the update is a function of the global state and of ``steps`` steps of the site's plan, all of them charged to
    the site's ledger. A refusal comes before the data is touched.

    Raises: PrivacyRefused: the policy, the plan or the ledger says no. UsageError: the model cannot be federated.
    """
    with open_ledger(site, run) as ledger:
        require_permission(site.policy, plan=site.plan, ledger=ledger, steps=steps)
        model = build()
        load_trained(model, global_state)
        fixed = {name: tensor.clone() for name, tensor in _not_trained(model).items()}
        before = ledger.spent_steps
        train_steps(model, site.table, site.plan, ledger, steps=steps, first_step=steps_of(site.plan, before))
        charged = ledger.spent_steps - before
        if isinstance(site.plan, DpSgd) and charged != site.plan.events_of(steps):
            raise LedgerError(
                f"site {site.name}: {charged} events charged · the round has {steps} steps, which are "
                f"{site.plan.events_of(steps)} events",
                next="Nothing was sent. Train with an engine that reserves every step.",
                code="ledger_steps",
            )
    after = _not_trained(model)
    leaking = [name for name, tensor in fixed.items() if not tensor.equal(after[name])]
    if leaking:
        raise UsageError(
            f"site {site.name}: {', '.join(leaking[:3])} changed in training · only trained parameters are protected",
            next="Use layers without running statistics (group norm in place of batch norm).",
        )
    trained = trained_state(model)
    delta = {name: trained[name] - tensor for name, tensor in global_state.items()}
    return LocalUpdate(site=site.name, delta=delta, steps=steps, weight=site.weight)


def steps_of(plan: TrainingPlan, events: int) -> int:
    """How many steps so many charged events stand for; with bands, a cycle that was begun counts whole."""
    return min(plan.steps, plan.bands * events) if isinstance(plan, DpSgd) else events


def trained_state(model: "nn.Module") -> dict[str, "Tensor"]:
    """A copy of the trained parameters: all that the server and the sites exchange."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: "nn.Module", state: State) -> None:
    """Puts the exchanged parameters into a model. Raises UsageError unless they are exactly its trained ones."""
    own = trained_state(model)
    different = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
    if different:
        raise UsageError(
            f"state: {', '.join(different[:3])} · must be the model's trained parameters, name by name and shape by shape",
            next="Build the same model at every site.",
        )
    model.load_state_dict(dict(state), strict=False)


def _not_trained(model: "nn.Module") -> dict[str, "Tensor"]:
    """Buffers and frozen parameters: what no clipping and no noise protects."""
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def state_bytes(state: State) -> int:
    """What a state weighs on the wire, without names and framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
