"""A whole federation in one process: every site with its own data, plan, ledger and last word; the server averages.

Sites hold different people, so a person's epsilon is their own site's (parallel composition, add-or-remove); the largest
of them is what can be said of everybody.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato import checks
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation import aggregate, local
from sfumato.federation.local import LocalUpdate, Site, TrainSteps
from sfumato.federation.settings import FederationSettings
from sfumato.privacy.plan import DpSgd, TrainingPlan
from sfumato.privacy.planning import training_plan
from sfumato.privacy.settings import PrivacySettings
from sfumato.records import Record

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A round that a site, or the server in its name, said no to."""

    round: int  # from 1
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """Attributes:
    epsilon: spent according to the site's ledger; None without a guarantee.
    steps: charged to the ledger, in earlier calls too; with bands, a cycle of them counts whole.
    rounds: in which its update was used.
    refused: the other rounds, with the reason.
    """

    name: str
    population: int
    epsilon: float | None
    delta: float | None
    rounds: int
    steps: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One round: who was in it, and who had spent what by its end."""

    round: int  # from 1
    sites: tuple[str, ...]
    steps: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class FederationResult:
    """Attributes:
    state: the trained parameters after the last round.
    epsilon: the largest of the sites'; None if any site trained without a guarantee.
    bytes_up, bytes_down: tensors only, without names and framing.
    """

    state: "dict[str, Tensor]"
    sites: tuple[SiteResult, ...]
    rounds: tuple[RoundResult, ...]

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
        from dataclasses import asdict

        return {
            "epsilon": self.epsilon,
            "rounds": len(self.rounds),
            "sites": [
                {**asdict(site), "refused": [asdict(refusal) for refusal in site.refused]} for site in self.sites
            ],
            "rounds_detail": [{**asdict(result), "sites": list(result.sites)} for result in self.rounds],
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


def simulate(
    sites: Sequence[Site],
    *,
    build: "Callable[[], nn.Module]",
    train_steps: TrainSteps,
    rounds: int,
    local_steps: int,
    run: str,
    on_round: "Callable[[RoundResult, dict[str, Tensor]], None] | None" = None,
) -> FederationResult:
    """Federated averaging of differences over ``rounds`` rounds of ``local_steps`` steps at each site.

    A site that refuses is reported and the round goes on with the others; so does one whose update is not finite. The
    ledgers outlive this call: begun again in the same place, the sites have only what is left.

    Args:
      build: makes the model with its initial weights, the same at every call.
      on_round: sees each round's result and the global state after it.
    """
    checks.positive(rounds=rounds, local_steps=local_steps)
    _check_sites(sites)
    state = local.trained_state(build())
    taken: dict[str, int] = {site.name: 0 for site in sites}
    refused: dict[str, list[Refusal]] = {site.name: [] for site in sites}
    results = []
    for number in range(1, rounds + 1):
        updates: list[LocalUpdate] = []
        for site in sites:
            try:
                update = local.train_round(
                    site, state, build=build, train_steps=train_steps, steps=local_steps, run=run
                )
            except PrivacyRefused as no:
                refused[site.name].append(Refusal(round=number, code=no.code, message=no.message))
                continue
            try:
                aggregate.check_update(site.name, update.delta, like=state)
            except UsageError as broken:
                refused[site.name].append(Refusal(round=number, code=broken.code, message=broken.message))
                continue
            updates.append(update)
        if updates:
            mean = aggregate.fedavg({u.site: u.delta for u in updates}, {u.site: u.weight for u in updates})
            state = aggregate.add(state, mean)
        for update in updates:
            taken[update.site] += 1
        result = RoundResult(
            round=number,
            sites=tuple(update.site for update in updates),
            steps=sum(update.steps for update in updates),
            bytes_up=sum(update.bytes for update in updates),
            bytes_down=local.state_bytes(state) * len(sites),  # also to those who then refuse
        )
        results.append(result)
        if on_round is not None:
            on_round(result, state)
    return FederationResult(
        state=state,
        sites=tuple(_site_result(site, taken[site.name], refused[site.name], local_steps) for site in sites),
        rounds=tuple(results),
    )


def site_plan(
    privacy: PrivacySettings, federation: FederationSettings, *, expected_batch_size: float, population: int
) -> TrainingPlan:
    """One site's plan, over all rounds. Its population is its own, never the federation's.

    Args: population: of the site: public where ``federation.populations`` gives it, else counted and hereby declared public.

    Raises: UsageError: a round would end within a cycle of correlated noise, which is charged whole; or one public number is
      given for all sites together. PrivacyRefused: no plan.
    """
    if privacy.population is not None:
        raise UsageError(
            f"population = {privacy.population} · is of one training on all units; a site samples its own, and its rate is that "
            "of its own number",
            next="Set privacy.population: null, and federation.populations to the public number of every site (left out, "
            "they are counted and declared public).",
        )
    if federation.local_steps % privacy.bands:
        raise UsageError(
            f"local_steps = {federation.local_steps} · must be a multiple of privacy.bands = {privacy.bands}: every round begins "
            "its own cycles of so many steps, and a cycle is charged whole",
            next=f"Set federation.local_steps: {-(-federation.local_steps // privacy.bands) * privacy.bands}, or fewer bands.",
        )
    return training_plan(
        replace(privacy, population=population if federation.populations else None),
        steps=federation.rounds * federation.local_steps,
        expected_batch_size=expected_batch_size,
        population=population,
    )


def split_by_site(records: Sequence[Record], sites: int) -> dict[str, list[Record]]:
    """The records of each site: by ``metadata["site"]`` where it is known (more of them than sites are put together), else
    by a hash of the unit's name: one unit more must not move others to other sites, or the sites' epsilons were no longer
    those of disjoint data. All records of a unit go to one site, that of its first record: otherwise its epsilons would add
    up. The names of the sites are public."""
    checks.positive(sites=sites)
    named = sorted({str(record.metadata["site"]) for record in records if record.metadata.get("site")})
    by_name = len(named) >= sites and all(record.metadata.get("site") for record in records)
    names = named if by_name else [f"site-{index + 1}" for index in range(sites)]
    groups = [" + ".join(names[index::sites]) for index in range(sites)]
    home: dict[str, str] = {}
    for record in records:
        if record.unit not in home:
            index = names.index(str(record.metadata["site"])) if by_name else _number(record.unit)
            home[record.unit] = groups[index % sites]
    split: dict[str, list[Record]] = {group: [] for group in groups}
    for record in records:
        split[home[record.unit]].append(record)
    return split


def _number(unit: str) -> int:
    return int.from_bytes(hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _site_result(site: Site, taken: int, refused: list[Refusal], local_steps: int) -> SiteResult:
    if isinstance(site.plan, DpSgd):
        from sfumato.privacy.ledger import show

        # Where no ledger could be opened, nothing was charged and no data touched.
        spent = show(site.ledger) if site.ledger.exists() else {"epsilon": 0.0, "steps": 0}
    else:
        spent = {"epsilon": None, "steps": taken * local_steps}
    return SiteResult(
        name=site.name,
        population=site.plan.population,
        epsilon=spent["epsilon"],
        delta=site.plan.delta if isinstance(site.plan, DpSgd) else None,
        rounds=taken,
        steps=local.steps_of(site.plan, spent["steps"]),
        refused=tuple(refused),
    )


def _check_sites(sites: Sequence[Site]) -> None:
    names = [site.name for site in sites]
    if not sites or len(set(names)) != len(names) or len({site.ledger for site in sites}) != len(sites):
        raise UsageError(
            f"sites = {names} · must be at least one, each with its own name and its own ledger",
            next="Name them apart.",
        )
    seen: dict[str, str] = {}
    for site in sites:
        for unit in site.table.unit_names:
            if seen.setdefault(unit, site.name) != site.name:
                raise UsageError(
                    f"sites {seen[unit]} and {site.name} · hold the same unit: its epsilons would add up",
                    next="Give all records of a person to one site (simulate.split_by_site does).",
                )
