"""One stage of a run that begins with a release: the release, records drawn from it, the model trained on them. [shell]

Claim: what the plan says of its first stage is all that the private records give here. It is charged before it is made
(``releasing.once``), and made once. Everything after it is post-processing: what is fitted to it, the records drawn from it, every
weight that DP-SGD begins at. Texts are those of public records.

Each boundary can be resumed: the release lies in RUN/released, the generator and the training on drawn records have checkpoints
in RUN/warm, as has their end. Once the private steps have a checkpoint, none of this is looked at but the charge of the release.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato import releasing, starting, warm_parts
from sfumato.errors import UsageError
from sfumato.models.settings import WarmStart
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.releases import MeanEmbedding
from sfumato.randomness import Random, SecretRandom
from sfumato.recipe import Recipe
from sfumato.records import Record
from sfumato.starting import Start
from sfumato.training.folder import RunFolder
from sfumato.warm_parts import Part

if TYPE_CHECKING:
    from torch import Tensor

NAME = "warm_start"  # of the release, in RUN/released
FOLDER = "warm"  # of what was made of it, in RUN


def parts(recipe: Recipe) -> tuple[Part, ...]:
    """What the recipe's warm start releases of records, and draws of the release."""
    from sfumato.building import shapes_of

    return warm_parts.parts_of(_settings(recipe), recipe.model, shapes_of(recipe), recipe.training.seed)


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
    own = parts(recipe)
    usable(own, prompts)  # or it refuses, before anything is charged
    found, for_release = releasing.once(
        run, book, release, NAME, lambda: warm_parts.release(own, private, release, random), random
    )
    stds = {part.name: part.std(release) for part in own}
    return learn(run, recipe, model, own, found, stds, prompts, progress), for_release


def usable(own: Sequence[Part], prompts: Sequence[str]) -> list[str]:
    """The public texts for which records can be drawn. Raises UsageError where there is none."""
    found = warm_parts.usable(own, prompts)
    if not found:
        raise UsageError(
            "warm_start · draws records for texts of public units, and none of these says a class; or there are none",
            next="Raise data.public_units, or correct model.warm_start.release.",
        )
    return found


def learn(
    run: RunFolder,
    recipe: Recipe,
    model: Any,
    own: Sequence[Part],
    released: "dict[str, Tensor]",
    stds: dict[str, float],
    prompts: Sequence[str],
    progress: Callable[[str], None],
) -> str:
    """Trains ``model`` on records drawn from what was released, or loads the weights that this came to before. Post-processing.

    Args: released, stds: by part, over the population. Returns: how it stopped, "steps" or "interrupted".
    """
    start = _start(run)
    if starting.steps_have_begun(run):
        return "steps"
    if start.there:
        start.load(model)
        return "steps"
    asked, seed = _settings(recipe), recipe.training.seed
    progress(f"warm start: released once, and charged; drawing {asked.records} records from it")
    drawn = warm_parts.draw(
        own, released, stds, usable(own, prompts), asked.records, seed,
        lambda of, table, steps: start.train("generator", of, table, steps, recipe, progress),
    )  # fmt: skip
    if drawn is None:
        return "interrupted"
    steps = replace(
        recipe.training, steps=asked.steps, expected_batch_size=asked.records_at_once, learning_rate=asked.learning_rate
    )
    if not start.train("model", model, model.encode(drawn), steps, recipe, progress):
        return "interrupted"
    start.save(model)
    progress("warm start: the model has learnt what was released; the private steps begin at its weights")
    return "steps"


def load(run: RunFolder, model: Any) -> None:
    """The weights that the private steps begin at."""
    _start(run).load(model)


def boundary(recipe: Recipe, *, by: str = "") -> list[str]:
    """Sentences for the claim. Args: by: who released it, where that is not one."""
    asked = _settings(recipe)
    share = recipe.privacy.warm_start
    assert share is not None  # the recipe sees to it
    what = ", and ".join(part.maker.in_words() for part in parts(recipe))
    return [
        f"Inside, and charged before the first step, with {share.share:.3g} of the guarantee{f', by {by}' if by else ''}: {what}. "
        f"{asked.records:,} records were drawn from it for texts of public units, and the model was trained on those: that is "
        "post-processing. The private steps began at its weights.",
        "Declared public: the texts, not the pictures, of half of the public units, for which these records were drawn.",
    ]


def _start(run: RunFolder) -> Start:
    return Start(run, FOLDER, "warm start", unspent="post-processing")


def _settings(recipe: Recipe) -> WarmStart:
    assert recipe.model.warm_start is not None  # the recipe sees to it
    return recipe.model.warm_start
