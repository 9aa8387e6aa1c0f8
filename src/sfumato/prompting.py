"""A recipe whose model is a prompt (``model.objective.kind: prompts``): its encoders, and what it allows.

The steps are in ``federation.prompts``, the rounds in ``federating``, what is measured in ``prompt_quality``.
[shell: reads and writes files]
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import __version__, building
from sfumato import recipe as recipes_file
from sfumato.data.places import cache_of, private_folder
from sfumato.data.settings import OWN
from sfumato.errors import UsageError
from sfumato.models.prompt_settings import ClipFolder, Prompts, SmallPair
from sfumato.recipe import Recipe

if TYPE_CHECKING:
    from sfumato.federation.prompts.learner import PromptLearner
    from sfumato.federation.prompts.settings import PromptSettings
    from sfumato.federation.prompts.training import PromptSteps


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
                f"{name} = {in_words(given)} · a prompt is moved by plain steps, made private record by record, and generates nothing: "
                f"must be {in_words(must)}",
                next=f"Set {name}: {in_words(must)}.",
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


def in_words(value: Any) -> str:
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
