"""From a recipe to its fresh model."""

from typing import Any

from sfumato import releasing
from sfumato.recipe import Recipe


def build(recipe: Recipe) -> Any:
    from sfumato.models import model

    shapes, seed = shapes_of(recipe), recipe.training.seed
    kind = releasing.KIND.get(recipe.privacy.mechanism)
    if kind is not None:
        return model.build_for_release(kind, recipe.model, picture_shape=shapes.of_picture(), seed=seed)
    return model.build(recipe.model, shapes, seed=seed)


def shapes_of(recipe: Recipe) -> Any:
    """The public sizes of what is modelled."""
    from sfumato.models.shapes import Shapes

    side = recipe.data.image_size
    return Shapes(picture=(side, side, recipe.data.channels) if recipe.model.image is not None else None)
