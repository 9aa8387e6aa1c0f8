"""From settings, or from a folder, to a model: the one place that chooses its class.

``families`` are trained on records; ``from_latents``, ``from_mean``, ``from_codes``, ``from_class_moments`` and ``from_sound_moments`` on
what was released.
"""

import json
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import UsageError
from sfumato.models import families
from sfumato.models.generative import Generative
from sfumato.models.settings import ModelSettings
from sfumato.models.shapes import Shapes


def build(
    settings: ModelSettings,
    shapes: Shapes | None = None,
    *,
    picture_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Generative:
    """A fresh model. ``seed`` fixes the initial weights, which are public, and leaves torch's own generator alone.

    Args: picture_shape: for ``Shapes(picture=...)``, where there is nothing but pictures and texts.
    """
    shapes = _shapes(shapes, picture_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return families.build(settings, shapes)


def build_for_release(
    kind: str,
    settings: ModelSettings,
    shapes: Shapes | None = None,
    *,
    picture_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Any:
    """A model that learns from what was released: ``from_latents``, ``from_mean``, ``from_codes``, ``from_class_moments`` or
    ``from_sound_moments``. Args: as ``build``."""
    from sfumato.models.from_class_moments import FromClassMoments
    from sfumato.models.from_codes import FromCodes
    from sfumato.models.from_latents import FromLatents
    from sfumato.models.from_mean import FromMean
    from sfumato.models.from_sound_moments import FromSoundMoments

    shapes = _shapes(shapes, picture_shape)
    kinds = {of.kind: of for of in (FromLatents, FromMean, FromCodes, FromClassMoments)}
    if kind not in (*kinds, FromSoundMoments.kind):
        names = ", ".join((*kinds, FromSoundMoments.kind))
        raise UsageError(f"kind = {kind!r} · must be one of {names}", next="Use the version that wrote it.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == FromSoundMoments.kind:
            return FromSoundMoments(settings, shapes)
        return kinds[kind](settings, shapes.of_picture())


def _shapes(shapes: Shapes | None, picture_shape: tuple[int, int, int] | None) -> Shapes:
    if (shapes is None) == (picture_shape is None):
        raise UsageError(
            f"shapes = {shapes}, picture_shape = {picture_shape} · exactly one must be given", next="Leave one out."
        )
    return shapes or Shapes(picture=picture_shape)


def _described_shapes(described: Any) -> Shapes:
    from pydantic import TypeAdapter

    if "picture_shape" in described:
        return Shapes(picture=tuple(described["picture_shape"]))
    return TypeAdapter(Shapes).validate_python(described["shapes"])


def load(folder: Path | str) -> Any:
    """Reads what ``save`` wrote. [shell] Raises UsageError where something is missing or does not fit."""
    from pydantic import TypeAdapter, ValidationError
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        described = json.loads((folder / "sfumato.json").read_text(encoding="utf-8"))
        text = described["settings"].get("text") or {}
        if text.get("kind") == "tokenizer":
            text["path"] = str(folder / text["path"])  # it lies beside the weights
        settings = TypeAdapter(ModelSettings).validate_python(described["settings"])
        kind = described.get("kind")
        if kind is not None:
            of_release = build_for_release(kind, settings, _described_shapes(described))
            parts = [path.parent.name for path in sorted(folder.glob("*/model.safetensors"))]
            of_release.restore(described, {part: load_file(folder / part / "model.safetensors") for part in parts})
            return of_release.eval()
        if settings.objective.kind == "prompts":  # has no shapes, and nothing to load here
            families.build(settings, Shapes())
        model = build(settings, TypeAdapter(Shapes).validate_python(described["shapes"]))
        if model.frozen() != described.get("frozen", {}):
            raise ValueError(f"frozen weights {model.frozen()}, made with {described.get('frozen', {})}")
        model.read(folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ValidationError, SafetensorError) as error:
        if isinstance(error, UsageError) and error.code == families.NO_GENERATOR:
            raise
        raise UsageError(
            f"model = {folder} · is not a model that this version wrote ({type(error).__name__}: {str(error)[:200]})",
            next="Give the folder of a run or a bundle.",
        ) from None
    return model.eval()
