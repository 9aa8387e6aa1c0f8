"""How well prompts tell pictures apart, while they are learnt and after: each site's own classes, and those of the others.

[shell: writes into the run's folder]
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.privacy.plan import NotPrivate
from sfumato.prompting import asked, build, in_words, pair_of, ready
from sfumato.recipe import Recipe
from sfumato.reports import Figure, QualityReport
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.federation.prompts.learner import PromptLearner


LOCAL, NEIGHBOUR = "local classes", "neighbour classes"  # the directions of the figures


SHOWN = 8  # pictures of the report


PROMPT = "prompt"  # in the folder of a site: its whole prompt


class Bench:
    """Public pictures that the encoders were not trained on, one of a unit; each looked at once."""

    def __init__(self, recipe: Recipe, prepared: Any) -> None:
        from sfumato.evaluation import report

        self.recipe, self.pair = recipe, pair_of(recipe)
        seen: set[str] = set()
        measured = [r for r in report.halves(prepared.public, 0)[1] if r.image is not None]
        self.records = [r for r in measured if not (r.unit in seen or seen.add(r.unit))][: recipe.evaluation.samples]

    @cached_property
    def features(self) -> "Tensor":
        from sfumato.federation.prompts.learner import looked

        return looked(self.records, self.pair.module)

    @lru_cache(maxsize=64)  # noqa: B019  a bench lives as long as its run
    def pictures(self, site: str) -> "tuple[Tensor, Tensor, list[int]]":
        """Features, labels, and places in ``records`` of the pictures that are in a class of the site."""
        import torch

        of = build(self.recipe, site)
        both = [(place, label) for place, r in enumerate(self.records) if (label := of.label(r)) is not None]
        places = [place for place, _ in both]
        return self.features[places], torch.tensor([label for _, label in both], dtype=torch.int64), places

    def scored(self, learner: "PromptLearner", site: str) -> "tuple[Tensor, float]":
        """(R,) whether each picture of a site's classes was told right; and the mean cross-entropy."""
        features, labels, _ = self.pictures(site)
        said = learner.probabilities(features)
        return (said.argmax(1) == labels).double(), float(-said[range(len(labels)), labels].log().mean())

    def by_hand(self, site: str) -> float:
        """Accuracy of the usual prompt, "a photo of" the class."""
        features, labels, _ = self.pictures(site)
        told = self.pair.module.hand_written(build(self.recipe, site).classes)
        return float(((features[:, 0] @ told.T).argmax(1) == labels).double().mean())

    def commonest(self, site: str) -> float:
        labels = self.pictures(site)[1]
        return float(labels.bincount().max() / len(labels))

    def with_prompt(self, site: str, state: "Mapping[str, Tensor]") -> "PromptLearner":
        """A prompt, in front of the classes of a site."""
        learner = build(self.recipe, site)
        learner.load_state_dict(dict(state), strict=False)
        return learner

    def neighbours(self, site: str, sites: Sequence[str]) -> list[str]:
        """Sites that tell other classes apart, one of each kind."""
        own, found = asked(self.recipe).of(site), {}
        for other in sites:
            if (theirs := asked(self.recipe).of(other)) != own:
                found.setdefault(in_words(asdict(theirs)), other)
        return list(found.values())


class Watch:
    """After every round: how well each site's prompt tells its own classes apart, and those of its neighbours. A line of
    ``quality.jsonl``: functions of what was released and of public pictures."""

    def __init__(self, folder: Path, recipe: Recipe, prepared: Any, homes: "Callable[[], Mapping[str, Any]]") -> None:
        self._bench, self._folder, self._homes = Bench(recipe, prepared), folder, homes
        self._lowest = float("inf")

    def picture(self, round: int, model: "PromptLearner") -> bool:
        """Whether the loss is the lowest so far."""
        from sfumato.evaluation import watching

        shared = {"p_G": model.p_G.detach()}
        losses, own, others = [], [], []
        homes = self._homes()
        for site, home in homes.items():
            right, loss = self._bench.scored(self._bench.with_prompt(site, {**home, **shared}), site)
            losses.append(loss)
            own.append(float(right.mean()))
            for other in self._bench.neighbours(site, list(homes)):
                there = self._bench.with_prompt(other, {**home, **shared})
                others.append(float(self._bench.scored(there, other)[0].mean()))
        line: dict[str, Any] = {
            "step": round,
            "public_loss": sum(losses) / len(losses),
            "accuracy_local": sum(own) / len(own),
        }
        if others:
            line["accuracy_neighbour"] = sum(others) / len(others)
        with (self._folder / watching.FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        lowest = line["public_loss"] < self._lowest
        self._lowest = min(self._lowest, line["public_loss"])
        return lowest


def site_folders(run: RunFolder) -> dict[str, Path]:
    """By site, where its whole prompt lies in this run, or would."""
    names = [site["name"] for site in run.read_json("reports/federation.json")["sites"]]
    return {name: run.path / "sites" / f"site-{n}" / PROMPT for n, name in enumerate(names, start=1)}


def write_sites(run: RunFolder, recipe: Recipe, state: "Mapping[str, Tensor]", homes: "Mapping[str, Any]") -> None:
    """The whole prompt of every site whose own part is known here, in the site's folder: for the site's use, never sent."""
    for name, folder in site_folders(run).items():
        if name in homes:
            learner = build(recipe, name)
            learner.load_state_dict({**homes[name], **state}, strict=False)
            learner.save(folder, whole=True)


def evaluate(
    run: RunFolder, recipe: Recipe, plan: Any, prepared: Any, progress: "Callable[[str], None]"
) -> QualityReport:
    """Accuracy of every site's prompt on its own classes and on its neighbours', beside what costs nothing."""
    from sfumato.reports import to_dict

    ready(recipe, prepared)
    bench, found = Bench(recipe, prepared), site_folders(run)
    progress("evaluation: telling public pictures apart")
    shared = build(recipe)
    shared.restore(run.model)
    notes: list[str] = []
    local, neighbour, sites = [], [], list(found)
    for site, folder in found.items():
        own = build(recipe, site)
        there = (folder / "sfumato.json").is_file()
        own.restore(folder if there else run.model)
        if not there and own.settings.method.home:
            notes.append(
                f"The part of {site} that stays there is not on this machine: measured is the shared prompt alone."
            )
        if not len(bench.pictures(site)[2]):
            notes.append(f"No public picture is in a class of {site}: nothing was measured of it.")
            continue
        local.append(_figure(bench, plan, LOCAL, site, [(own, site)], [(build(recipe, site), site)], [(shared, site)]))
        others = [other for other in bench.neighbours(site, sites) if len(bench.pictures(other)[2])]
        if others:
            state = own.trained()
            neighbour.append(
                _figure(
                    bench, plan, NEIGHBOUR, site,
                    [(bench.with_prompt(other, state), other) for other in others],
                    [(build(recipe, other), other) for other in others],
                    [(shared, other) for other in others],
                )
            )  # fmt: skip
    if len(local) and not neighbour:
        notes.append("All sites tell the same classes apart: there are no neighbour classes.")
    figures = [figure for of in (local, neighbour) for figure in (*_mean(of), *of)]
    for figure in figures:
        progress(
            f"quality: {figure.name} ({figure.direction}) {figure.value:.3f}, by hand {figure.baseline['prompt written by hand']:.3f}"
        )
    quality = QualityReport(figures=figures, notes=[*notes, _how(bench)])
    run.write_json("reports/quality.json", to_dict(quality))
    _show(run, bench, found)
    return quality


def _figure(
    bench: Bench,
    plan: Any,
    direction: str,
    site: str,
    trained: "Sequence[tuple[PromptLearner, str]]",
    first: "Sequence[tuple[PromptLearner, str]]",
    shared: "Sequence[tuple[PromptLearner, str]]",
) -> Figure:
    """Means over the classes of one or several sites; the interval is as wide as if all of them erred together."""
    scores = [bench.scored(learner, other)[0] for learner, other in trained]
    value = sum(float(s.mean()) for s in scores) / len(scores)
    width = 1.96 * sum(float(s.std(correction=0)) / len(s) ** 0.5 for s in scores) / len(scores)
    tasks = [other for _, other in trained]
    alone = [
        float(bench.scored(bench.with_prompt(other, {"p_G": learner.p_G.detach()}), other)[0].mean())
        for learner, other in shared
    ]
    before = [float(bench.scored(learner, other)[0].mean()) for learner, other in first]
    baseline = {
        "prompt written by hand": sum(map(bench.by_hand, tasks)) / len(tasks),
        "before training": sum(before) / len(before),
        "shared prompt alone": sum(alone) / len(alone),
        "commonest class": sum(map(bench.commonest, tasks)) / len(tasks),
    }
    return Figure(
        name=f"{direction}: accuracy, {site}",
        value=value,
        low=max(0.0, value - width),
        high=min(1.0, value + width),
        baseline=baseline,
        extractor=bench.pair.name,
        samples=min(len(s) for s in scores),
        covered_by="internal" if isinstance(plan, NotPrivate) else "post-processing",
        direction=direction,
    )


def _mean(figures: Sequence[Figure]) -> list[Figure]:
    """Over the sites, first in the report."""
    if len(figures) < 2:
        return []
    count = len(figures)
    return [
        replace(
            figures[0],
            name=f"{figures[0].direction}: accuracy, mean of the sites",
            value=sum(f.value for f in figures) / count,
            low=sum(f.low or 0.0 for f in figures) / count,
            high=sum(f.high or 0.0 for f in figures) / count,
            baseline={key: sum(f.baseline[key] for f in figures) / count for key in figures[0].baseline},
        )
    ]


def _how(bench: Bench) -> str:
    return (
        f"Measured on {len(bench.records):,} public pictures, one of a unit, that the encoders were not trained on. Local: a site's prompt "
        "in front of the classes that it tells apart; neighbour: in front of those of the other sites, their mean. Shared prompt alone: "
        "with what is a site's own as it was before training."
    )


def _show(run: RunFolder, bench: Bench, found: Mapping[str, Path]) -> None:
    """Some of the measured pictures, what they are told as, and what they are."""
    from sfumato.training import samples

    slug = samples.slug(("image",), ("text",))
    sites = [site for site in found if len(bench.pictures(site)[2])]
    real, made, shown = [], [], 0
    for number in range(SHOWN if sites else 0):
        site = sites[number % len(sites)]
        features, labels, places = bench.pictures(site)
        at = number // len(sites)
        if at >= len(places):
            continue
        learner = build(bench.recipe, site)
        learner.restore(found[site] if (found[site] / "sfumato.json").is_file() else run.model)
        real.append(f"{site}: {learner.classes[int(labels[at])]}\n")
        made.append(f"{site}: {learner.read(features[at : at + 1])[0]}\n")
        samples.write_records(run.samples / f"given{slug}-{shown:02d}", "image", [bench.records[places[at]]])
        shown += 1
    samples.write_text(run.samples / f"real{slug}.txt", "".join(real))
    samples.write_text(run.samples / f"final{slug}.txt", "".join(made))
    entry = {
        "direction": "image→text",
        "given": ["image"],
        "wanted": ["text"],
        "slug": slug,
        "examples": shown,
        "texts": [],
    }
    samples.write_text(
        run.samples / "index.json", json.dumps([entry] if shown else [], indent=1, ensure_ascii=False) + "\n"
    )
