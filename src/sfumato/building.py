"""From a recipe to its fresh model, to what the model is told, and to the table that it trains on."""

from pathlib import Path
from typing import Any

from sfumato import recipe as recipes_file
from sfumato import releasing
from sfumato.models.settings import Adapter, FrozenSentence, Prompts, Tokenizer, VaeLatents
from sfumato.recipe import Recipe


def build(recipe: Recipe) -> Any:
    """Fresh; of a run that begins at public weights, with those frozen that the private steps do not train."""
    from sfumato.models import model

    if isinstance(recipe.model.objective, Prompts):
        from sfumato import prompting

        return prompting.build(recipe)
    shapes, seed = shapes_of(recipe), recipe.training.seed
    kind = releasing.kind_of(recipe)
    if kind is not None:
        return model.build_for_release(kind, recipe.model, shapes, seed=seed)
    built = model.build(recipe.model, shapes, seed=seed)
    if recipe.public_start is not None and recipe.public_start.trained:
        built.train_only(recipe.public_start.trained)
    return built


def shapes_of(recipe: Recipe) -> Any:
    """The public sizes of what is modelled."""
    from sfumato.models.shapes import Shapes

    data, side = recipe.data, recipe.data.image_size
    sounds = recipe.model.audio is not None
    return Shapes(
        picture=(side, side, data.channels) if recipe.model.image is not None else None,
        samples=max(1, round(data.audio_seconds * data.sample_rate)) if sounds else None,
        sample_rate=data.sample_rate if sounds else None,
    )


def encode(model: Any, recipe: Recipe, records: Any) -> Any:
    """Records as the model's table: in memory, or memory-mapped where the records are (``data.store: mapped``)."""
    from sfumato import __version__
    from sfumato.data import mapped

    if not isinstance(records, mapped.Stored):
        return model.encode(records)
    described = recipes_file.to_mapping(recipe)
    settings = {
        "version": __version__,
        "model": described["model"],
        "mechanism": recipe.privacy.mechanism,
        "frozen": _frozen(recipe),
    }
    return mapped.encoded(records, model.encode, settings=settings)


def _frozen(recipe: Recipe) -> dict[str, str]:
    """sha256 of what encoders read from elsewhere: other files in the same place encode anew."""
    import hashlib

    found: dict[str, str] = {}
    match recipe.model.text:
        case FrozenSentence(name=name):
            from sfumato.models.codecs import sentence

            found["text"] = sentence.fingerprint(name)
        case Tokenizer(path=path):
            files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.json"))
            found["text"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    match recipe.model.objective:
        case Adapter(path=path):
            from sfumato.models.families import adapter

            found["language"] = adapter.fingerprint(path)
    match recipe.model.image:
        case VaeLatents(folder=folder):
            from sfumato.models.codecs import vae

            found["image"] = vae.fingerprint(folder)
    return found


def told_public(prepared: Any) -> list[Any]:
    """The public records that no figure is measured on."""
    from sfumato.evaluation import report

    usable = [record for record in prepared.public if record.image is not None and record.text]
    return report.halves(usable or prepared.public, 0)[0]
