"""One file a modality: fixed public maps between records and tensors (``codec`` says what they are)."""

from typing import Any

from sfumato.models.settings import Diffusion, ModelSettings
from sfumato.models.shapes import Shapes
from sfumato.records import Modality

PIXEL_STD = 0.5  # assumed, of a pixel in [-1, 1]


def build(settings: ModelSettings, shapes: Shapes) -> dict[Modality, Any]:
    """The codecs that the settings name, by modality."""
    from sfumato.models.codecs import audio, image, text_features

    codecs: dict[Modality, Any] = {}
    if settings.text is not None:
        codecs["text"] = text_features.TextFeatures(settings.text)
    if settings.image is not None:
        codecs["image"] = image.PictureCodec(
            settings.image,
            shapes.of_picture(),
            PIXEL_STD if not isinstance(settings.objective, Diffusion) else settings.objective.sigma_data,
        )
    if settings.audio is not None:
        codecs["audio"] = audio.SoundCodec(settings.audio, *shapes.of_sound())
    return codecs
