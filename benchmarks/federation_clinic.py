"""Rows of ``benchmarks/federation.py`` on generated patients: histories to chest films.

One small model (a variational autoencoder of a few thousand weights, because noise on updates grows with their number) on 8,000
patients, 6 rounds of 20 steps. Mean kappa: six facts that a history says, asked of the model, against what a judge that learnt
from other public records reads in its films: 1 is perfect, 0 is guessing.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from federation_rows import ADJACENCY, Row, done, loads, of_chance, of_noise, said, site_level, split, train

from sfumato import building, stages, workflow
from sfumato.evaluation import agreement, readers, report
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation import mechanism_settings as of
from sfumato.models.settings import Cosine, Mlp, ModelSettings, Terms, Variational
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.recipes.clinic import FINDINGS, TERMS

PREFIX = ""
NOISE = "noise-alone"
ASKED = 1_000  # held-out histories
PRIVACY = PrivacySettings(unit="person", records_per_unit=2, epsilon=8.0, max_grad_norm=1.0)
CLIP, CLIP_OF_MANY = 2.0, 3.0  # of an update of the model below
MANY = 200


def _many(says: str, mechanism: of.Mechanism) -> Row:
    """Sites of 40 patients, with a batch of 10: 5 steps a round."""
    return Row(says=says, mechanism=mechanism, sites=MANY, local_steps=5, batch=10 * MANY)


def _words(name: str, sites: int) -> str:
    return f"{name.replace('-', ' ')}, {sites} sites"


ROWS: dict[str, Row] = {
    "one-place": Row(says="all records at one place, 120 steps", sites=1, rounds=1, local_steps=120),
    "one-place-8": Row(says="all records at one place, 120 steps", sites=1, rounds=1, local_steps=120, private=True),
    "alike": Row(says="patients mixed over 4 sites"),
    "alike-8": Row(says="patients mixed over 4 sites", private=True),
    "unlike": Row(says="4 hospitals", by="site"),
    "unlike-8": Row(says="4 hospitals", by="site", private=True),
    "prox": Row(says="4 hospitals, FedProx μ = 0.01", by="site", proximal=0.01),
    "prox-8": Row(says="4 hospitals, FedProx μ = 0.01", by="site", private=True, proximal=0.01),
    "prox-more-8": Row(says="4 hospitals, FedProx μ = 0.1", by="site", private=True, proximal=0.1),
    "long": Row(says="4 hospitals, 2 rounds of 60 steps", by="site", rounds=2, local_steps=60),
    "long-prox": Row(
        says="4 hospitals, 2 rounds of 60 steps, FedProx μ = 0.1", by="site", rounds=2, local_steps=60, proximal=0.1
    ),
    "trimmed-8": Row(says="4 hospitals, trimmed mean", by="site", private=True, aggregation=of.TrimmedMean(trimmed=1)),
    "flipped-8": Row(says="4 hospitals, one sends −5 times its update; mean", by="site", private=True, hostile="flipped"),
    "flipped-trimmed-8": Row(
        says="4 hospitals, one sends −5 times its update; trimmed mean", by="site", private=True, hostile="flipped",
        aggregation=of.TrimmedMean(trimmed=1),
    ),
    "scaled-8": Row(says="4 hospitals, one sends 100 times its update; mean", by="site", private=True, hostile="scaled"),
    "scaled-trimmed-8": Row(
        says="4 hospitals, one sends 100 times its update; trimmed mean", by="site", private=True, hostile="scaled",
        aggregation=of.TrimmedMean(trimmed=1),
    ),
    **{
        name: Row(says=_words(name, 4), by="site", mechanism=mechanism)
        for name, mechanism in site_level(CLIP, sites=4, adaptive=False).items()
    },
    "many": _many("200 sites of 40 patients, mixed", of.RecordLevel()),
    **{
        f"{name}-{MANY}": _many(_words(name, MANY), mechanism)
        for name, mechanism in site_level(CLIP_OF_MANY, sites=MANY, adaptive=True).items()
    },
}  # fmt: skip


def base() -> Recipe:
    """Histories to films at toy size: 64 frequencies, eight terms, one narrow layer."""
    wanted = workflow.resolve(
        "hospitals",
        ["data.modalities=[text,image]", "data.may_lack=false", "data.units=8000", "data.public_units=4000"],
    )
    return replace(
        wanted,
        name="benchmark",
        privacy=replace(wanted.privacy, warm_start=None),  # the rounds alone are measured
        model=ModelSettings(
            image=Cosine(kept=8),
            text=Terms(axes=(*TERMS, *FINDINGS)),
            backbone=Mlp(width=32, depth=1),
            objective=Variational(experts="mixture_of_products", latent=8, text_weight=4.0),
        ),
        training=replace(wanted.training, expected_batch_size=512, learning_rate=1e-2, warmup_steps=0),
    )


class Bench:
    """The records, and the judge that learnt from half of the public ones."""

    def __init__(self, work: Path) -> None:
        self.work, self.recipe = work, base()
        self.prepared = stages.load(self.recipe)
        self.learnt, held_out = report.halves(self.prepared.public, 0)
        self.asked = held_out[:ASKED]
        self.facts = readers.known(self.asked, tuple(self.prepared.facts))
        self.tables: dict[tuple[int, str], dict[str, Any]] = {}

    @cached_property
    def reader(self) -> readers.Reader:
        facts = tuple(self.prepared.facts)
        return readers.make("image", self.learnt, facts, EvaluationSettings(judge_seconds=100), seed=0)

    @cached_property
    def real(self) -> float:
        return agreement.mean_kappa(self.facts, self.reader.read(self.asked), resamples=2, seed=0)[0]

    def train(self, name: str, row: Row) -> tuple[Any, dict[str, Any]]:
        key = (row.sites, row.by)
        if key not in self.tables:
            self.tables = {key: split(building.build(self.recipe), self.prepared.private, row)}
        return train(self.recipe, name, row, self.tables[key], PRIVACY, self.work)

    def measure(self, model: Any) -> dict[str, Any]:
        read = self._read(model)
        value, low, high = agreement.mean_kappa(self.facts, read, seed=0)
        each = {
            fact: agreement.mean_kappa({fact: self.facts[fact]}, {fact: read[fact]}, resamples=2, seed=0)[0]
            for fact in self.facts
        }
        return {"kappa": value, "low": low, "high": high, "kappas": each, "kappa_real": self.real}

    def noise(self) -> dict[str, Any]:
        """Twenty models whose weights are noise: what a row must be beyond, to have learnt anything."""
        models = (of_noise(building.build(self.recipe), draw) for draw in range(20))
        kappas = [agreement.mean_kappa(self.facts, self._read(model), resamples=2, seed=0)[0] for model in models]
        return {"kappa": float(np.mean(kappas)), "low": min(kappas), "high": max(kappas), "draws": kappas}

    def _read(self, model: Any) -> dict[str, list[str]]:
        return self.reader.read(model.sample([report.told(r, ("text",)) for r in self.asked], ("image",), seed=1))


def table(out: Path) -> list[str]:
    """Every row that is done."""
    found = done(out, list(ROWS))
    lines = [
        "## clinic: histories to films",
        "",
        "| row | what | ε, δ: of whom, who is trusted | mean κ (95 %) | "
        "side, zone, kind, heart, effusion, view | MB up, down | processor seconds (wall) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        what, claim, cost = said(row)
        each = ", ".join(f"{row['kappas'][fact]:.2f}" for fact in ("side", "zone", "kind", "heart", "effusion", "view"))
        kappa = f"{row['kappa']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(f"| {row['row']} | {what} | {claim} | {kappa} | {each} | {cost} |")
    if found:
        real = f"the judge reads real held-out films at κ = {found[0]['kappa_real']:.3f}"
        lines += ["", f"{found[0]['parameters']:,} parameters; {real}. {loads(found)}"]
    lines += ["", *(of_chance(row) for row in done(out, [NOISE])), "", ADJACENCY]
    return lines
