"""One stage of a run that begins with a release: the release, records drawn from it, the model trained on them. [shell]

Claim: what the plan says of its first stage is all that the private records give here. It is charged before it is made
(``releasing.once``), and made once. Everything after it is post-processing: what is fitted to it, the records drawn from it, every
weight that DP-SGD begins at. Texts are those of public records.

Each boundary can be resumed: the release lies in RUN/released, the generator and the training on drawn records have checkpoints
in RUN/warm, as has their end. Once the private steps have a checkpoint, none of this is looked at but the charge of the release.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sfumato import releasing
from sfumato.errors import OutsideError, UsageError
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import NotPrivate
from sfumato.privacy.releases import MeanEmbedding
from sfumato.randomness import Random, SecretRandom
from sfumato.recipe import Recipe
from sfumato.records import Record
from sfumato.training.folder import RunFolder
from sfumato.training.settings import TrainingSettings

NAME = "warm_start"  # of the release, in RUN/released
FOLDER = "warm"  # of what was made of it, in RUN
MODEL = "model.safetensors"  # the weights that the private steps begin at


def maker_of(recipe: Recipe, picture_shape: tuple[int, int, int]) -> Any:
    """What the recipe's warm start releases of records, and draws of the release."""
    from sfumato.models.class_moments import ClassMomentsMaker
    from sfumato.models.from_mean import FromMean
    from sfumato.models.settings import ClassMoments, ModelSettings

    asked = recipe.model.warm_start
    assert asked is not None  # the recipe sees to it
    if isinstance(asked.release, ClassMoments):
        return ClassMomentsMaker(asked.release, picture_shape)
    from sfumato.models import model as models

    of = asked.release
    settings = ModelSettings(image=of.image, text=of.text, backbone=of.backbone, random_features=of.random_features)
    return models.build_for_release(FromMean.kind, settings, picture_shape=picture_shape, seed=recipe.training.seed)


def dimension(maker: Any) -> int:
    """How many numbers are released."""
    return maker.dimension if _by_class(maker) else maker.dimensions["mean"]


def begin(
    run: RunFolder,
    book: Ledger,
    recipe: Recipe,
    release: MeanEmbedding,
    model: Any,
    private: Sequence[Record],
    prompts: Sequence[str],
    progress: Callable[[str], None],
    *,
    random: Random | None = None,
) -> tuple[str, bool]:
    """Releases what ``release`` says, or reads what was released before, and trains ``model`` on records drawn from it.

    Guarantee: the model's weights, and everything in RUN/warm, are a release of that one event in ``book``.

    Args: private: the records, of which the release is made; prompts: public texts.
    Returns: how it stopped, "steps" or "interrupted"; whether all chance came from a source that may be released.
    Raises: BudgetExhausted where the release was charged and is lost.
    """
    random = random or SecretRandom()
    maker = maker_of(recipe, model.shapes.of_picture())
    prompts = maker.usable(prompts) if _by_class(maker) else prompts
    if not prompts:  # before anything is charged
        raise UsageError(
            "warm_start · draws records for texts of public units, and none of these says a class; or there are none",
            next="Raise data.public_units, or correct model.warm_start.release.",
        )
    found, for_release = releasing.once(
        run, book, release, NAME, lambda: {"mean": _released(maker, private, release, random)}, random
    )
    if (run.checkpoints / "last" / "state.json").is_file():
        return "steps", for_release  # the private steps have begun: their checkpoint holds everything
    weights = run.path / FOLDER / MODEL
    if weights.is_file():
        load(run, model)
        return "steps", for_release
    progress(f"warm start: released once, and charged; drawing {_settings(recipe).records} records from it")
    drawn = _drawn(run, recipe, maker, found["mean"], release, prompts, progress)
    if drawn is None:
        return "interrupted", for_release
    asked = _settings(recipe)
    steps = replace(
        recipe.training, steps=asked.steps, expected_batch_size=asked.records_at_once, learning_rate=asked.learning_rate
    )
    if not _train(run, "model", model, model.encode(drawn), steps, recipe, progress):
        return "interrupted", for_release
    _save(run, model)
    progress("warm start: the model has learnt what was released; the private steps begin at its weights")
    return "steps", for_release


def load(run: RunFolder, model: Any) -> None:
    """The weights that the private steps begin at."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(run.path / FOLDER / MODEL))


def is_there(run: RunFolder) -> bool:
    return (run.path / FOLDER / MODEL).is_file()


def boundary(recipe: Recipe, picture_shape: tuple[int, int, int]) -> list[str]:
    """Sentences for the claim."""
    asked, maker = _settings(recipe), maker_of(recipe, picture_shape)
    share = recipe.privacy.warm_start
    assert share is not None  # the recipe sees to it
    if _by_class(maker):
        what = maker.in_words()
    else:
        terms = ", ".join(axis.name for axis in maker.settings.text.axes)
        what = (
            "one noisy mean of random features of pictures and of terms of texts together (a public list of terms, written without "
            f"looking at private records: {terms})"
        )
    return [
        f"Inside, and charged before the first step, with {share.share:.3g} of the guarantee: {what}. "
        f"{asked.records:,} records were drawn from it for texts of public units, and the model was trained on those: that is "
        "post-processing. The private steps began at its weights.",
        "Declared public: the texts, not the pictures, of half of the public units, for which these records were drawn.",
    ]


def _by_class(maker: Any) -> bool:
    """Else it is a ``FromMean``."""
    from sfumato.models.class_moments import ClassMomentsMaker

    return isinstance(maker, ClassMomentsMaker)


def _settings(recipe: Recipe) -> Any:
    assert recipe.model.warm_start is not None  # the recipe sees to it
    return recipe.model.warm_start


def _released(maker: Any, private: Sequence[Record], release: MeanEmbedding, random: Random) -> Any:
    from sfumato.privacy import latents

    table = maker.encode(private)
    if _by_class(maker):
        return latents.release_class_sums(
            table, maker.features, release, random, classes=maker.classes, products=maker.settings.products
        )
    return latents.release_mean(table, maker.record_features, release, random)


def _drawn(
    run: RunFolder,
    recipe: Recipe,
    maker: Any,
    released: Any,
    release: MeanEmbedding,
    prompts: Sequence[str],
    progress: Callable[[str], None],
) -> list[Record] | None:
    """Records that are nobody's; None where the fitting of the generator was interrupted."""
    asked, seed = _settings(recipe), recipe.training.seed
    if _by_class(maker):
        std = release.noise_multiplier * release.max_norm / release.population
        return maker.draw(released, std, prompts, asked.records, seed)
    table, of = maker.receive(released, prompts), asked.release
    settings = TrainingSettings(
        steps=of.steps, expected_batch_size=of.texts_at_once, learning_rate=of.learning_rate, seed=seed
    )
    if not _train(run, "generator", maker, table, settings, recipe, progress):
        return None
    texts = [prompts[i % len(prompts)] for i in range(asked.records)]
    pictures = maker.generate(texts, seed=seed)
    return [
        Record(id=f"warm/{i}", unit=f"warm/{i:09d}", text=text, image=picture)
        for i, (text, picture) in enumerate(zip(texts, pictures, strict=True))
    ]


def _train(
    run: RunFolder,
    name: str,
    model: Any,
    table: Any,
    settings: TrainingSettings,
    recipe: Recipe,
    progress: Callable[[str], None],
) -> bool:
    """Trains on what nobody gave, from a checkpoint of its own if there is one. False where Ctrl-C ended it."""
    from sfumato.training import loop, watch

    batch = min(settings.expected_batch_size, table.num_units)
    trained = loop.train(
        model,
        table,
        NotPrivate(population=table.num_units, expected_batch_size=float(batch), steps=settings.steps),
        settings,
        recipe.performance,
        checkpoints=run.path / FOLDER / name,
        watchers=[watch.Line(lambda line: progress(f"warm start, {name}: {line}"), unspent="post-processing")],
    )
    return trained.stopped != "interrupted"


def _save(run: RunFolder, model: Any) -> None:
    """There whole, or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = run.path / FOLDER / MODEL
    scratch = path.with_name(f".{MODEL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, scratch)
        releasing.sync(scratch)
        scratch.replace(path)
        releasing.sync(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk is an OSError to some, and not to safetensors
        raise OutsideError(
            f"{path} · could not be written ({error})", next="Free some disk space and run again with --resume."
        ) from None
