"""A site as its own side of a federation knows it, and what runs at every one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sfumato.federation.gate import Gate
from sfumato.federation.messages import State
from sfumato.federation.policy import SitePolicy
from sfumato.federation.public import Public
from sfumato.federation.secure.keys import Identity
from sfumato.federation.settings import FederationSettings
from sfumato.privacy.ledger import Ledger, Sign
from sfumato.privacy.plan import (
    Composition,
    DpSgd,
    MeanEmbedding,
    PrivacyPlan,
    TrainingPlan,
)
from sfumato.randomness import Random, SecretRandom
from sfumato.records import UnitTable

if TYPE_CHECKING:
    from torch import nn


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
