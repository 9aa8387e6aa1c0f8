"""One file a modality: fixed public maps between records and tensors (``codec`` says what they are)."""

from typing import Any

from sfumato.models.settings import (
    Bytes,
    Cosine,
    Diffusion,
    FrozenSentence,
    HashedWords,
    MelSpectrogram,
    MelTokens,
    ModelSettings,
    MuLaw,
    PatchTokens,
    Pixels,
    Terms,
    Tokenizer,
    VaeLatents,
    Waveform,
    Words,
)
from sfumato.models.shapes import Shapes
from sfumato.records import Modality

PIXEL_STD = 0.5  # assumed, of a pixel in [-1, 1]


def build(settings: ModelSettings, shapes: Shapes) -> dict[Modality, Any]:
    """The codecs that the settings name, by modality."""
    codecs: dict[Modality, Any] = {}
    match settings.text:
        case Bytes() | Words() | Tokenizer() as text:
            from sfumato.models.codecs import text_tokens

            codecs["text"] = text_tokens.build(text)
        case HashedWords() | FrozenSentence() | Terms() as text:
            from sfumato.models.codecs.text_features import TextFeatures

            codecs["text"] = TextFeatures(text)
    match settings.image:
        case PatchTokens() as image:
            from sfumato.models.codecs.picture_tokens import PictureTokens

            codecs["image"] = PictureTokens(image, shapes.of_picture())
        case VaeLatents() as image:
            from sfumato.models.codecs.vae import VaeCodec

            codecs["image"] = VaeCodec(image, shapes.of_picture())
        case Pixels() | Cosine() as image:
            from sfumato.models.codecs.image import PictureCodec

            of = settings.objective
            codecs["image"] = PictureCodec(
                image, shapes.of_picture(), of.sigma_data if isinstance(of, Diffusion) else PIXEL_STD
            )
    match settings.audio:
        case Waveform() | MelSpectrogram() as audio:
            from sfumato.models.codecs.audio import SoundCodec

            codecs["audio"] = SoundCodec(audio, *shapes.of_sound())
        case MelTokens() as audio:
            from sfumato.models.codecs.sound_tokens import MelTokenCodec

            codecs["audio"] = MelTokenCodec(audio, *shapes.of_sound())
        case MuLaw() as audio:
            from sfumato.models.codecs.sound_tokens import MuLawCodec

            codecs["audio"] = MuLawCodec(audio, *shapes.of_sound())
    return codecs
