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

from sfumato import releasing, starting
from sfumato.errors import UsageError
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.releases import MeanEmbedding
from sfumato.randomness import Random, SecretRandom
from sfumato.recipe import Recipe
from sfumato.records import Record
from sfumato.starting import Start
from sfumato.training.folder import RunFolder
from sfumato.training.settings import TrainingSettings

NAME = "warm_start"  # of the release, in RUN/released
FOLDER = "warm"  # of what was made of it, in RUN


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
    start = _start(run)
    if starting.steps_have_begun(run):
        return "steps", for_release
    if start.there:
        start.load(model)
        return "steps", for_release
    progress(f"warm start: released once, and charged; drawing {_settings(recipe).records} records from it")
    drawn = _drawn(run, recipe, maker, found["mean"], release, prompts, progress)
    if drawn is None:
        return "interrupted", for_release
    asked = _settings(recipe)
    steps = replace(
        recipe.training, steps=asked.steps, expected_batch_size=asked.records_at_once, learning_rate=asked.learning_rate
    )
    if not start.train("model", model, model.encode(drawn), steps, recipe, progress):
        return "interrupted", for_release
    start.save(model)
    progress("warm start: the model has learnt what was released; the private steps begin at its weights")
    return "steps", for_release


def load(run: RunFolder, model: Any) -> None:
    """The weights that the private steps begin at."""
    _start(run).load(model)


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


def _start(run: RunFolder) -> Start:
    return Start(run, FOLDER, "warm start", unspent="post-processing")


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
    if not _start(run).train("generator", maker, table, settings, recipe, progress):
        return None
    texts = [prompts[i % len(prompts)] for i in range(asked.records)]
    pictures = maker.generate(texts, seed=seed)
    return [
        Record(id=f"warm/{i}", unit=f"warm/{i:09d}", text=text, image=picture)
        for i, (text, picture) in enumerate(zip(texts, pictures, strict=True))
    ]
