"""A recipe whose model is a prompt (``model.objective.kind: prompts``): its encoders, what it allows, how well it tells pictures apart.

The steps are in ``federation.prompts``, the rounds in ``federating``. [shell: reads and writes files]
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import __version__, building
from sfumato import recipe as recipes_file
from sfumato.data.places import cache_of, private_folder
from sfumato.data.settings import OWN
from sfumato.errors import UsageError
from sfumato.models.prompt_settings import ClipFolder, Prompts, SmallPair
from sfumato.privacy.plan import NotPrivate
from sfumato.recipe import Recipe
from sfumato.reports import Figure, QualityReport
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.federation.prompts.learner import PromptLearner
    from sfumato.federation.prompts.settings import PromptSettings
    from sfumato.federation.prompts.training import PromptSteps

LOCAL, NEIGHBOUR = "local classes", "neighbour classes"  # the directions of the figures
SHOWN = 8  # pictures of the report
PROMPT = "prompt"  # in the folder of a site: its whole prompt


# -- what a recipe says, and what it must not --


def asked(recipe: Recipe) -> Prompts:
    assert isinstance(recipe.model.objective, Prompts)  # or it is not asked
    return recipe.model.objective


def is_prompts(recipe: Recipe) -> bool:
    return isinstance(recipe.model.objective, Prompts)


def only_federated(recipe: Recipe, verb: str) -> None:
    """Raises UsageError: what does not apply to prompts is said, and not passed over."""
    if is_prompts(recipe):
        raise UsageError(
            f"sfumato {verb}, model.objective.kind = prompts · a prompt is learnt by sites together, and generates nothing",
            next="Train it by `sfumato federate`; `sfumato evaluate` says how well it tells pictures apart.",
            code="only_federated",
        )


def planned(recipe: Recipe) -> Recipe:
    """The recipe with what follows from its method: the parts of a step that are clipped, and what stays at home.

    Other recipes as they are. Raises UsageError for settings that prompts do not have."""
    if not is_prompts(recipe):
        return recipe
    _refuse(recipe)
    of, privacy = settings(recipe), recipe.privacy
    home = of.method.home
    if recipe.federation.home not in ((), home):
        raise UsageError(
            f"federation.home = {', '.join(recipe.federation.home)} · what stays at home follows from the method, and is "
            f"{', '.join(home) or 'nothing'}",
            next="Leave federation.home out.",
        )
    parts = privacy.parts
    if not parts and privacy.mechanism == "dp_sgd":
        assert not isinstance(privacy.max_grad_norm, str)  # _refuse
        parts = of.parts(privacy.max_grad_norm)
        if parts:
            privacy = replace(privacy, max_grad_norm=_UNSET, parts=parts)
    return replace(recipe, privacy=privacy, federation=replace(recipe.federation, home=home))


_UNSET = 1.0  # of privacy.max_grad_norm where there are parts: they have their own


def _refuse(recipe: Recipe) -> None:
    training, federation, privacy, evaluation = recipe.training, recipe.federation, recipe.privacy, recipe.evaluation
    wrong = {
        "training.optimizer": (training.optimizer, "sgd"),
        "training.schedule": (training.schedule, "constant"),
        "training.warmup_steps": (training.warmup_steps, 0),
        "training.weight_decay": (training.weight_decay, 0.0),
        "training.ema_decay": (training.ema_decay, 0.0),
        "federation.mechanism": (federation.mechanism.kind, "record_level"),
        "federation.proximal": (federation.proximal, 0.0),
        "federation.holds": (dict(federation.holds), {}),
        "federation.selection": (
            federation.selection.kind,
            federation.selection.kind if federation.selection.kind != "by_charged_loss" else "everyone",
        ),
        "privacy.clipping": (privacy.clipping, "flat"),
        "privacy.bands": (privacy.bands, 1),
        "privacy.largest_batch": (privacy.largest_batch, None),
        "evaluation.directions": (evaluation.directions, ()),
        "evaluation.usefulness": (evaluation.usefulness, ()),
        "evaluation.retrieval": (evaluation.retrieval, False),
        "data.channels": (recipe.data.channels, 1 if isinstance(asked(recipe).encoders, SmallPair) else recipe.data.channels),
    }  # fmt: skip
    for name, (given, must) in wrong.items():
        if given != must:
            raise UsageError(
                f"{name} = {_told(given)} · a prompt is moved by plain steps, made private record by record, and generates nothing: "
                f"must be {_told(must)}",
                next=f"Set {name}: {_told(must)}.",
            )
    if privacy.mechanism not in ("dp_sgd", "none") or privacy.max_grad_norm == "auto" or privacy.warm_start is not None:
        raise UsageError(
            f"privacy.mechanism = {privacy.mechanism}, max_grad_norm = {privacy.max_grad_norm} · prompts are learnt in steps with a fixed "
            "clip",
            next="Set privacy.mechanism: dp_sgd, a number for max_grad_norm, and no warm_start.",
        )
    names = {part.name for part in privacy.parts}
    wanted = {part.name for part in settings(recipe).parts(1.0)}
    if privacy.parts and names != wanted:
        raise UsageError(
            f"privacy.parts = {', '.join(sorted(names))} · a step of this method releases {', '.join(sorted(wanted)) or 'one prompt'}",
            next="Name these, or leave privacy.parts out: then each is clipped to privacy.max_grad_norm.",
        )


def _told(value: Any) -> str:
    return json.dumps(value, default=str)


def settings(recipe: Recipe) -> "PromptSettings":
    from sfumato.federation.prompts.settings import PromptSettings

    of, rate = asked(recipe), recipe.training.learning_rate
    return PromptSettings(
        method=of.method,
        tokens=of.tokens,
        learning_rate=rate,
        local_learning_rate=rate if of.local_learning_rate is None else of.local_learning_rate,
        releases=of.releases,
        initial_std=of.initial_std,
        seed=recipe.training.seed,
    )


def sizes(recipe: Recipe) -> tuple[int, int]:
    """(numbers that are trained, bytes that a record takes on its way): from the settings, without the encoders' weights."""
    of = asked(recipe)
    match of.encoders:
        case SmallPair(width=width, features=features):
            pass
        case ClipFolder(path=path):
            of_clip = _clip_config(path)
            width, features = of_clip["width"], of_clip["features"]
    prompt = of.tokens * width
    trained = {"p_G": prompt, "p_L": prompt}
    rank = getattr(of.method, "rank", 0)
    trained |= {"u": of.tokens * rank, "v": rank * width}
    number = sum(trained[name] for name in {"p_G", *of.method.home})
    count = max(len(classes.names) for classes in of.classes.values())
    return number, 4 * (2 * prompt + count * features)


def _clip_config(path: str) -> dict[str, int]:
    try:
        described = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return {"width": int(described["text_config"]["hidden_size"]), "features": int(described["projection_dim"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"model.objective.encoders.path = {path} · is no folder of a CLIP checkpoint ({error})",
            next="Give a folder that `save_pretrained` of a CLIPModel has written.",
        ) from None


# -- encoders --


@dataclass(frozen=True)
class Pair:
    """Attributes: module: frozen (``federation.prompts.encoders.Encoders``). public: sentences for the claim. name: for figures."""

    module: Any
    public: tuple[str, ...]
    name: str


_ready: dict[str, Pair] = {}  # of this process, by what they were made of


def ready(recipe: Recipe, prepared: Any) -> None:
    """Makes the encoders that ``build`` needs, or takes those that were kept: small ones are trained on the public half that measures
    nothing. Other recipes need nothing."""
    if not is_prompts(recipe) or _key(recipe) in _ready:
        return
    of = asked(recipe).encoders
    _ready[_key(recipe)] = _clip(of) if isinstance(of, ClipFolder) else _small(of, recipe, prepared)


def _key(recipe: Recipe) -> str:
    return repr((asked(recipe).encoders, recipe.data, recipe.training.seed, recipe.privacy.unit))


def pair_of(recipe: Recipe) -> Pair:
    """The encoders of this process; they are made where nobody has called ``ready``, as in a process of Ray's."""
    if _key(recipe) not in _ready:
        from sfumato.data import prepare

        small = isinstance(asked(recipe).encoders, SmallPair)
        private = recipe.privacy.mechanism != "none"
        ready(recipe, prepare.load(recipe.data, unit=recipe.privacy.unit, private=private) if small else None)
    return _ready[_key(recipe)]


def _clip(of: ClipFolder) -> Pair:
    from sfumato.federation.prompts.encoders import ClipEncoders, fingerprint

    _clip_config(of.path)
    found = fingerprint(of.path)
    if of.sha256 not in (None, found):
        raise UsageError(
            f"model.objective.encoders.path = {of.path} · has the sha256 {found}, not that of the recipe",
            next="Get the checkpoint that the recipe was written for; all sites must stand on the same one.",
        )
    said = f"Declared public: the CLIP checkpoint, frozen, fitted to none of the private records; sha256 of its files: {found}."
    return Pair(ClipEncoders(of.path), (said,), f"CLIP {Path(of.path).name}, sha256 {found[:12]}")


def _small(of: SmallPair, recipe: Recipe, prepared: Any) -> Pair:
    import numpy as np
    import torch

    from sfumato.data.checking import content_digest
    from sfumato.federation.keeping import read_part, write_part
    from sfumato.federation.messages import Part
    from sfumato.federation.prompts import small

    pairs = [r for r in building.told_public(prepared) if r.image is not None and r.text]
    if len(pairs) < of.batch:
        raise UsageError(
            f"data.public_units = {recipe.data.public_units} · makes {len(pairs)} public pairs to train the encoders on",
            next=f"Set more units aside, at least {of.batch} pairs' worth, or give a CLIP checkpoint: "
            "model.objective.encoders: {kind: clip, path: ...}.",
        )
    digest = hashlib.sha256(json.dumps([asdict(of), recipe.training.seed, __version__]).encode())
    for record in pairs:
        digest.update(content_digest(record))
    name = digest.hexdigest()
    path, known = cache_of(recipe.data) / f"encoders-{name[:16]}.safetensors", {"longest": of.longest, "layers": 1}
    shape = {"width": of.width, "features": of.features, **known}
    if path.is_file():
        part = read_part(path)
        words: Any = part.values["words"]
        module = small.SmallEncoders(words, **shape)
        module.load_state_dict(dict(part.tensors))
        module = module.requires_grad_(False).eval()
    else:
        pictures = torch.from_numpy(np.stack([r.image for r in pairs if r.image is not None])).float()
        module = small.trained(
            pictures.permute(0, 3, 1, 2) / 255,
            [str(r.text) for r in pairs],
            steps=of.steps,
            batch=of.batch,
            learning_rate=of.learning_rate,
            seed=recipe.training.seed,
            **shape,
        )
        private_folder(path.parent)  # what else lies there is private
        write_part(path, Part(tensors=module.state_dict(), values={"words": list(module.words)}))
    said = (
        f"Declared public: a small pair of encoders, trained on {len(pairs):,} public pairs of picture and text, and frozen; sha256 of "
        f"pairs and settings: {name}."
    )
    return Pair(module, (said,), f"small encoders of {len(pairs):,} public pairs")


def build(recipe: Recipe, site: str | None = None) -> "PromptLearner":
    """A fresh prompt, the same at every call. Args: site: whose classes; None: the first of the recipe's."""
    from sfumato.federation.prompts.learner import PromptLearner

    of, pair = asked(recipe), pair_of(recipe)

    def described() -> dict[str, Any]:
        return {"format": 2, "family": "prompts", "settings": recipes_file.to_mapping(recipe)["model"]}

    classes = next(iter(of.classes.values())) if site is None else of.of(site)
    return PromptLearner(pair.module, classes, settings(recipe), described=described, public=pair.public).eval()


def train_steps() -> "PromptSteps":
    from sfumato.federation.prompts.training import PromptSteps

    return PromptSteps()


def refuse_elsewhere(recipe: Recipe) -> None:
    """Raises UsageError where sites on different machines would train different encoders."""
    if is_prompts(recipe) and isinstance(asked(recipe).encoders, SmallPair) and recipe.data.source in OWN:
        raise UsageError(
            f"model.objective.encoders.kind = small, data.source = {recipe.data.source} · each site would train encoders of its own on its "
            "own public records, and no prompt fits two of them",
            next="Give all sites one checkpoint: model.objective.encoders: {kind: clip, path: ..., sha256: ...}.",
        )


# -- how well pictures are told apart --


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
                found.setdefault(_told(asdict(theirs)), other)
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
