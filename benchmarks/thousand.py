"""A thousand sites in one process: 60 handwritten digits each, 20 rounds; answers a second, and memory.

    .venv/bin/python benchmarks/thousand.py --sites 1000 --rounds 20 --rate 0.1

Sites are trained one after the other, each with ordinary steps of a small variational autoencoder (``federation.base`` of digits);
the server clips, adds noise and is charged (``central``). What is measured is the engine, not the model: 60 digits a
site and a few rounds teach little. Prints JSON, and writes it to --out.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sfumato import building, federating, stages, workflow
from sfumato.federation import simulate
from sfumato.federation.mechanism_settings import Central
from sfumato.federation.policy import WITHOUT_TRUST, SitePolicy
from sfumato.federation.settings import Everyone, FederationSettings, Uniform
from sfumato.models.settings import Cosine, HashedWords, Mlp, ModelSettings, Variational
from sfumato.privacy.settings import PrivacySettings


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sites", type=int, default=1_000)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument(
        "--rate", type=float, default=0.1, help="with which each site is asked in a round; 1: everyone"
    )
    arguments.add_argument("--steps", type=int, default=5, help="of a site in a round")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/federation/thousand.json"))
    given = arguments.parse_args()
    federation = FederationSettings(
        sites=given.sites,
        rounds=given.rounds,
        local_steps=given.steps,
        mechanism=Central(epsilon=8.0),
        selection=Everyone() if given.rate == 1 else Uniform(rate=given.rate),
        weights="equal",
    )
    recipe = replace(
        workflow.resolve("mnist", ["data.public_units=100"]),
        model=ModelSettings(
            image=Cosine(kept=8),
            text=HashedWords(buckets=64, width=16),
            backbone=Mlp(width=32, depth=1),
            objective=Variational(experts="mixture_of_products", latent=8),
        ),
        privacy=PrivacySettings(mechanism="none", unit="record", max_grad_norm=1.0),
        federation=federation,
    )
    recipe = replace(recipe, training=replace(recipe.training, expected_batch_size=10 * given.sites, warmup_steps=0))
    split = simulate.split_by_site(stages.load(recipe).private, given.sites)
    model = building.build(recipe)
    tables = {name: model.encode(own) for name, own in split.items()}
    plans = federating.plans_for(recipe, {name: table.num_units for name, table in tables.items()})
    before = megabytes()
    folder = Path(tempfile.mkdtemp())
    policy = SitePolicy(allowed_mechanisms=tuple({*WITHOUT_TRUST, "central"}))
    members = [
        federating.member(
            recipe,
            name,
            plans[name],
            table=table,
            ledger=folder / f"site-{i}" / "ledger.db",
            policy=policy,
            identity=None,
        )
        for i, (name, table) in enumerate(tables.items())
    ]
    began, processor = time.monotonic(), time.process_time()
    work = federating.work_for(recipe, members)
    result = simulate.simulate(members, work, run="thousand", folder=folder / "server")
    seconds, processor = time.monotonic() - began, time.process_time() - processor
    shutil.rmtree(folder)
    answers = sum(len(one.sites) for one in result.rounds)
    found = {
        "sites": given.sites,
        "rounds": len(result.rounds),
        "discarded": sum(bool(one.discarded) for one in result.rounds),
        "rate": given.rate,
        "steps": given.steps,
        "parameters": work.public.dimension,
        "epsilon": result.epsilon,
        "answers": answers,
        "answers_per_processor_second": answers / processor,
        "seconds": seconds,
        "processor_seconds": processor,
        "megabytes": megabytes(),
        "megabytes_before_the_first_round": before,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "load": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
