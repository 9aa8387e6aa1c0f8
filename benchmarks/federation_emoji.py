"""Rows of ``benchmarks/federation.py`` on emoji: captions to pictures, in three styles that three houses drew.

4,500 pictures; a small diffusion model, most rows of it begun at public icons. Sites hold a style each (alike pictures, drawn
unlike), a group of subjects each, or a subgroup of subjects in one style each (as many sites as the data have names for).
Measured on concepts that no training saw: kappa of style and of group, told by the caption, against what a judge that learnt
from other public emoji reads in the pictures; the Fréchet distance of a small network's features; recall of captions by pictures.
"""

import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from federation_rows import ADJACENCY, Row, done, loads, of_chance, of_noise, said, site_level, split, train

from sfumato import building, pretraining, stages, workflow
from sfumato.evaluation import agreement, pairing, readers, report
from sfumato.evaluation.figures import Maker
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation import mechanism_settings as of
from sfumato.federation.local_training import trained_state
from sfumato.models.settings import Cosine, HashedWords, Mlp, ModelSettings
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe
from sfumato.records import Record
from sfumato.training.folder import RunFolder

PREFIX = "emoji-"
NOISE = "noise-alone"
PRIVACY = PrivacySettings(unit="record", epsilon=8.0, max_grad_norm=0.3)
CLIP, CLIP_OF_MANY = 1.0, 4.0  # of an update of the model below
LONG = 7_200.0  # seconds: the judges end by themselves, so that they are the same ones every time
FACTS = ("style", "group")
RECALL = ("image→text R@10", "text→image R@10")
FRESH = "fresh-"  # rows of a model that begins at no icons
MANY = 100


def _few(says: str, **fields: Any) -> Row:
    return Row(**{"says": says, "sites": 3, "local_steps": 40, "batch": 2_048, **fields})


def _many(says: str, mechanism: of.Mechanism) -> Row:
    """Half of what a site has in each step."""
    return _few(says, mechanism=mechanism, by="holder", sites=MANY, local_steps=20)


ONE: dict[str, Any] = {"sites": 1, "rounds": 1, "local_steps": 240}
STYLE, GROUP = "3 houses, a style each", "5 collections, two groups of subjects each"
ROWS: dict[str, Row] = {
    "fresh-one-place": _few("fresh weights: all at one place, 240 steps", **ONE),
    "fresh-one-place-8": _few("fresh weights: all at one place, 240 steps", **ONE, private=True),
    "fresh-unlike": _few(f"fresh weights: {STYLE}", by="style"),
    "fresh-unlike-8": _few(f"fresh weights: {STYLE}", by="style", private=True),
    "one-place": _few("all at one place, 240 steps", **ONE),
    "one-place-8": _few("all at one place, 240 steps", **ONE, private=True),
    "alike": _few("3 sites, mixed"),
    "alike-8": _few("3 sites, mixed", private=True),
    "unlike": _few(STYLE, by="style"),
    "unlike-8": _few(STYLE, by="style", private=True),
    "prox": _few(f"{STYLE}, FedProx μ = 0.01", by="style", proximal=0.01),
    "prox-8": _few(f"{STYLE}, FedProx μ = 0.01", by="style", private=True, proximal=0.01),
    "long": _few(f"{STYLE}, 2 rounds of 120 steps", by="style", rounds=2, local_steps=120),
    "long-prox": _few(f"{STYLE}, 2 rounds of 120 steps, FedProx μ = 0.1", by="style", rounds=2, local_steps=120, proximal=0.1),
    "groups": _few(GROUP, by="group", sites=5),
    "groups-8": _few(GROUP, by="group", sites=5, private=True),
    "groups-prox": _few(f"{GROUP}, FedProx μ = 0.01", by="group", sites=5, proximal=0.01),
    **{
        name: _few(f"{name.replace('-', ' ')}, 3 houses", by="style", mechanism=mechanism)
        for name, mechanism in site_level(CLIP, sites=3, adaptive=False).items()
    },
    "many": _many(f"{MANY} sites, each a subgroup of one style", of.RecordLevel()),
    **{
        f"{name}-{MANY}": _many(f"{name.replace('-', ' ')}, {MANY} sites", mechanism)
        for name, mechanism in site_level(CLIP_OF_MANY, sites=MANY, adaptive=True).items()
    },
}  # fmt: skip


def base() -> Recipe:
    """Captions to emoji at toy size, begun at icons."""
    wanted = workflow.resolve("emoji-private", ["data.public_units=400"])
    assert wanted.public_start is not None
    return replace(
        wanted,
        name="benchmark",
        model=ModelSettings(
            image=Cosine(kept=6),
            text=HashedWords(buckets=256, width=16),
            backbone=Mlp(width=64, depth=1),
            objective=wanted.model.objective,
            sampling=wanted.model.sampling,
        ),
        public_start=replace(wanted.public_start, steps=1_500),
        training=replace(wanted.training, learning_rate=1e-2, warmup_steps=0),
    )


class Bench:
    """The records, the weights that icons made, and the judges that learnt from half of the public records."""

    def __init__(self, work: Path) -> None:
        self.work, self.recipe = work, base()
        self.prepared = stages.load(self.recipe)
        self.private = [_held(record) for record in self.prepared.private]
        self.learnt, self.asked = report.halves([_told(record) for record in self.prepared.public], 0)
        self.facts = readers.known(self.asked, FACTS)
        self.one_each = list({report.group_of(record): i for i, record in enumerate(self.asked)}.values())
        self.start = self._public_start()
        self.tables: dict[tuple[int, str], dict[str, Any]] = {}

    @cached_property
    def reader(self) -> readers.Reader:
        return readers.make("image", self.learnt, FACTS, EvaluationSettings(judge_seconds=LONG), seed=0)

    @cached_property
    def pairs(self) -> pairing.Pairing:
        return pairing.train(
            readers.views("image", self.learnt), readers.texts_of(self.learnt), [report.group_of(r) for r in self.learnt],
            seconds=LONG, seed=0, pretrained=False,
        )  # fmt: skip

    @cached_property
    def beside(self) -> dict[str, Any]:
        """What real pictures reach, and what the weights do that icons made."""
        model = building.build(self.recipe)
        pretraining.load(self._run, model)
        return {"real": self.quality(self.asked), "start": self.quality(self._made(model.eval()))}

    @property
    def _run(self) -> RunFolder:
        return RunFolder(self.work / "emoji-start")

    def _public_start(self) -> dict[str, Any]:
        self._run.path.mkdir(exist_ok=True)
        model = building.build(self.recipe)
        pretraining.begin(self._run, self.recipe, self.prepared, model, lambda line: print(line, file=sys.stderr))
        return trained_state(model)

    def noise(self) -> dict[str, Any]:
        """Twenty models whose weights are noise: what a row must be beyond, to have learnt anything."""
        draws = [self.quality(self._made(of_noise(building.build(self.recipe), draw))) for draw in range(20)]
        kappas = [draw["kappa"] for draw in draws]
        distances = [draw["frechet"][0] for draw in draws]
        return {
            "kappa": float(np.mean(kappas)),
            "low": min(kappas),
            "high": max(kappas),
            "draws": kappas,
            "frechet": [float(np.mean(distances)), min(distances), max(distances)],
        }

    def _made(self, model: Any) -> list[Record]:
        return model.sample([report.told(r, ("text",)) for r in self.asked], ("image",), seed=1)

    def quality(self, made: list[Record]) -> dict[str, Any]:
        read = self.reader.read(made)
        maker = Maker(direction="text→image", covered_by="internal", shuffled="", order=np.arange(len(made)), seed=0)
        of_made, of_real = (self.pairs.picture_features(readers.views("image", r)) for r in (made, self.asked))
        distance = maker.of_sets(of_made, of_real, self.pairs.picture_extractor, "pictures")
        texts = self.pairs.texts(readers.texts_of([self.asked[i] for i in self.one_each]))
        shown = self.pairs.images(readers.views("image", [made[i] for i in self.one_each]))
        recall = {
            f.name: [f.value, f.low, f.high]
            for f in maker.of_pairs(self.pairs, (shown, texts), (shown, texts), "image")
        }
        value, low, high = agreement.mean_kappa(self.facts, read, seed=0)
        return {
            "kappa": value,
            "low": low,
            "high": high,
            "kappas": {
                f: agreement.mean_kappa({f: self.facts[f]}, {f: read[f]}, resamples=2, seed=0)[0] for f in FACTS
            },
            "frechet": [distance.value, distance.low, distance.high],
            "frechet_real": distance.baseline["real held-out"],
            "recall": recall,
            "concepts": len(self.one_each),
        }

    def train(self, name: str, row: Row) -> tuple[Any, dict[str, Any]]:
        key = (row.sites, row.by)
        if key not in self.tables:
            self.tables = {key: split(building.build(self.recipe), self.private, row)}
        start = None if name.startswith(FRESH) else self.start
        recipe = replace(self.recipe, public_start=None)  # done above
        model, found = train(recipe, name, row, self.tables[key], PRIVACY, self.work, start)
        sizes = sorted(table.num_units for table in self.tables[key].values())
        return model, {**found, "smallest": sizes[0], "largest": sizes[-1]}

    def measure(self, model: Any) -> dict[str, Any]:
        return {**self.quality(self._made(model)), "beside": self.beside}


def _told(record: Record) -> Record:
    facts = {name: str(record.metadata[name]) for name in FACTS}
    return replace(record, metadata={**record.metadata, "facts": facts})


def _held(record: Record) -> Record:
    """Who holds it, where there are many: whoever draws such subjects in such a style."""
    return replace(
        record, metadata={**record.metadata, "holder": f"{record.metadata['style']} {record.metadata['subgroup']}"}
    )


def table(out: Path) -> list[str]:
    """Every row that is done, and what stands beside them."""
    found = done(out, [f"{PREFIX}{name}" for name in ROWS])
    lines = [
        "## emoji: captions to pictures",
        "",
        "| row | what | ε, δ: of whom, who is trusted | Fréchet distance (95 %) | κ of style, group; mean (95 %) | "
        "R@10 image→text, text→image | MB up, down | processor seconds (wall) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if found:
        for name, words in (
            ("real", "real held-out pictures"),
            ("start", "what icons alone made: where all but the first rows begin"),
        ):
            lines.append(f"| | {words} | | {_quality(found[0]['beside'][name])} | | |")
    for row in found:
        what, claim, cost = said(row)
        lines.append(f"| {row['row']} | {what} | {claim} | {_quality(row)} | {cost} |")
    if found:
        sizes = {(row["sites"], row["smallest"], row["largest"]) for row in found if row["sites"] > 1}
        held = "; ".join(f"{sites} sites: {low} to {high} records" for sites, low, high in sorted(sizes))
        concepts = found[0]["beside"]["real"]["concepts"]
        recall = f"R@10 is among {concepts} concepts: chance is {10 / concepts:.3f}"
        lines += ["", f"{found[0]['parameters']:,} parameters; {held}. {recall}. {loads(found)}"]
    lines += ["", *(of_chance(row) for row in done(out, [f"{PREFIX}{NOISE}"])), "", ADJACENCY]
    return lines


def _quality(found: dict[str, Any]) -> str:
    distance, low, high = found["frechet"]
    each = ", ".join(f"{found['kappas'][fact]:.2f}" for fact in FACTS)
    kappa = f"{each}; {found['kappa']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
    recall = ", ".join(f"{found['recall'][name][0]:.3f}" for name in RECALL)
    return f"{distance:.2f} ({low:.2f} to {high:.2f}) | {kappa} | {recall}"
