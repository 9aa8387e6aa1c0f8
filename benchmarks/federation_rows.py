"""What the rows of ``benchmarks/federation.py`` have in common: what a row says, the mechanisms at equal epsilon, one run of it."""

import json
import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from hostile import Hostile

from sfumato import building, federating
from sfumato.federation import local_training, mechanisms, simulate
from sfumato.federation import mechanism_settings as of
from sfumato.federation.messages import State
from sfumato.federation.policy import WITHOUT_TRUST, SitePolicy
from sfumato.federation.settings import FederationSettings
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.records import Record, UnitTable

FACTORS = {"flipped": -5.0, "scaled": 100.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Attributes:
    says: of the row, for the table.
    private: DP-SGD at the recipe's epsilon in the local steps; else ordinary ones, and ``mechanism`` is what protects, if anything.
    by: the metadata column that says whose site a record is of; "" where records go to sites by chance.
    batch: of all sites together.
    hostile: what the first site, or "heart", makes of its update before it is sent; "" where it is honest.
    """

    says: str
    private: bool = False
    by: str = ""
    sites: int = 4
    rounds: int = 6
    local_steps: int = 20
    mechanism: of.Mechanism = field(default_factory=of.RecordLevel)
    aggregation: of.Aggregation = field(default_factory=of.Mean)
    batch: int = 512
    proximal: float = 0.0
    hostile: Literal["", "flipped", "scaled"] = ""


ADJACENCY = (
    "Neighbours: under central and central-adaptive a site's data are there or are not (zero_out); under the others they are exchanged "
    "for any other (replace_one), which moves a sum twice as far and is the stronger claim: central-replaced is central under it."
)


def site_level(clip: float, *, sites: int, adaptive: bool) -> dict[str, of.Mechanism]:
    """Every mechanism whose unit is the site, at a true epsilon of 8 over all rounds."""
    eight: dict[str, Any] = {"epsilon": 8.0, "max_update_norm": clip}
    found: dict[str, of.Mechanism] = {
        "update-level": of.UpdateLevel(**eight),
        "central": of.Central(**eight),
        "central-replaced": of.Central(**eight, adjacency="replace_one"),
        "central-adaptive": of.Central(**eight, clipping="adaptive", count_noise=None if sites >= 100 else 2.0),
        "local-and-global": of.LocalAndGlobal(**eight, server_epsilon=4.0),
        "ldp-fl": of.LdpFl(epsilon=8.0),
        "distributed": of.Distributed(**eight),
    }
    if not adaptive:
        del found["central-adaptive"]
    return found


def split(model: Any, records: Sequence[Record], row: Row) -> dict[str, UnitTable]:
    """Encoded records by site."""
    if row.sites == 1:
        return {"all": model.encode(list(records))}
    if not row.by:
        records = [replace(record, metadata={**record.metadata, "site": None}) for record in records]
    by_site = simulate.split_by_site(records, row.sites, row.by or None)
    return {name: model.encode(own) for name, own in by_site.items()}


def train(
    recipe: Recipe,
    name: str,
    row: Row,
    tables: Mapping[str, UnitTable],
    privacy: PrivacySettings,
    work: Path,
    start: State | None = None,
) -> tuple[Any, dict[str, Any]]:
    """One run of a row. Args: privacy: where ``row.private``. Returns: the trained model, and what is said of the run."""
    few = row.sites <= 10 and row.mechanism.kind != "distributed"
    federation = FederationSettings(
        sites=row.sites,
        rounds=row.rounds,
        local_steps=row.local_steps,
        mechanism=row.mechanism,
        aggregation=row.aggregation,
        proximal=row.proximal,
        weights="population" if few else "equal",
    )
    recipe = replace(
        recipe,
        privacy=privacy if row.private else replace(privacy, mechanism="none"),
        federation=federation,
        training=replace(recipe.training, expected_batch_size=row.batch),
    )
    folder = Path(tempfile.mkdtemp(dir=work))
    plans = federating.plans_for(recipe, {site: table.num_units for site, table in tables.items()})
    policy = SitePolicy(
        allowed_mechanisms=tuple({*WITHOUT_TRUST, row.mechanism.kind}), allow_not_private=not row.private
    )
    members = [
        federating.member(
            recipe,
            site,
            plans[site],
            table=table,
            ledger=folder / f"site-{number}" / "ledger.db",
            policy=policy,
            identity=federating.identity(folder / f"key-{number}") if row.mechanism.kind == "distributed" else None,
        )
        for number, (site, table) in enumerate(tables.items())
    ]
    task = federating.work_for(recipe, members)
    exchange = simulate.exchange_here(members, task)
    if row.hostile:
        exchange = Hostile(exchange, "heart", FACTORS[row.hostile])
    began, processor = time.monotonic(), time.process_time()
    result = simulate.simulate(members, task, run=name, folder=folder / "server", exchange=exchange, start=start)
    seconds, processor = time.monotonic() - began, time.process_time() - processor
    model = building.build(recipe)
    local_training.load_trained(model, result.state, home={})
    promise = mechanisms.build(federation).promise(task.public)
    shutil.rmtree(folder)
    return model.eval(), {
        "row": name,
        "says": row.says,
        "sites": row.sites,
        "epsilon": result.epsilon,
        "delta": next((s.delta for s in result.sites if s.delta is not None), None),
        "unit": result.unit,
        "trust": promise.trust if result.epsilon is not None else "",
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "discarded": [r.discarded for r in result.rounds if r.discarded],
        "left_out": sum(len(r.left_out) for r in result.rounds),
        "parameters": task.public.dimension,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_megabytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


def of_noise(model: Any, draw: int) -> Any:
    """The model with weights that say nothing: normal ones, of standard deviation 1.5, about what
    ``update_level`` leaves at 200 sites. What it reaches, chance reaches."""
    generator = torch.Generator().manual_seed(draw)
    state = local_training.trained_state(model)
    local_training.load_trained(
        model, {name: 1.5 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
    )
    return model.eval()


def done(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that were measured, in this order."""
    return [json.loads((out / f"{n}.json").read_text("utf-8")) for n in names if (out / f"{n}.json").is_file()]


def said(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """What, claim and cost of a row, for a table."""
    private = found["epsilon"] is not None and math.isfinite(found["epsilon"])
    lost = f"; {len(found['discarded'])} rounds discarded" if found["discarded"] else ""
    return (
        f"{found['says']}{lost}",
        f"{found['epsilon']:.3f}, {found['delta']:.2g}: {found['unit']}; {found['trust']}" if private else "none",
        f"{found['bytes_up'] / 1e6:.2f}, {found['bytes_down'] / 1e6:.2f} | {found['processor_seconds']:.0f} ({found['seconds']:.0f})",
    )


def of_chance(row: Mapping[str, Any]) -> str:
    return (
        f"Chance: {len(row['draws'])} models whose weights are normal noise reach a mean κ of {row['low']:.3f} to {row['high']:.3f} "
        f"(mean {row['kappa']:.3f}): what a caption says moves whatever such a model draws. The interval of a row is of its captions, and "
        "does not hold this."
    )


def loads(found: Sequence[Mapping[str, Any]]) -> str:
    return f"{found[0]['machine']}, load {min(r['load'] for r in found):.0f} to {max(r['load'] for r in found):.0f}."
