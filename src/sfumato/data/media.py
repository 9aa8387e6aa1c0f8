"""Pictures and sounds from bytes: looked at before they are decoded, refused with a reason, never guessed."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.errors import DataError, MissingDependency

MAX_SIDE = 8192  # pixels
MAX_PIXELS = 40_000_000
MAX_SAMPLES = 60 * 60 * 48_000  # one hour at 48 kHz, all channels together

MAX_BYTES = 512 * 1024 * 1024  # of one picture or sound inside an archive


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file: a member of an archive that is not compressed. ``name`` is for messages."""

    file: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Raises DataError where the file is shorter than it was, or the part too large."""
        if self.size > MAX_BYTES:
            raise DataError(f"{self.name}: bytes = {self.size} · at most {MAX_BYTES}", next=_TOO_LARGE, code="huge")
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                body = file.read(self.size)
        except OSError as error:
            raise DataError(
                f"{self.name} · cannot be read ({error})", next="Check the file.", code="unreadable"
            ) from None
        if len(body) != self.size:
            raise DataError(
                f"{self.name}: bytes = {len(body)} of {self.size} · the file is shorter than its index says",
                next="Copy the file again.",
                code="unreadable",
            )
        return body


Media = bytes | Path | Span
"""Where a picture or a sound comes from: its bytes, a file, or a part of one."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TOO_LARGE = "Scale it down before it becomes a record; it was not decoded."
_GREY, _COLOUR = ("1", "L", "LA", "La"), ("RGB", "RGBA", "RGBa", "P", "PA")


def read_image(media: Media, *, name: str) -> np.ndarray:
    """Decodes one picture. Transparency is laid on white; the first frame of several is taken only when there is one.

    The size in the header is compared with MAX_SIDE and MAX_PIXELS before a pixel is decoded.
    Returns: (H, W, 1 or 3) uint8. Raises DataError, with a code: missing_file, huge, channels, frames, unreadable.
    """
    from PIL import Image

    try:
        if isinstance(media, Span):
            media = media.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below theirs
            with Image.open(io.BytesIO(media) if isinstance(media, bytes) else media, formats=_FORMATS) as picture:
                refuse_size(picture.width, picture.height, name)
                if getattr(picture, "n_frames", 1) > 1:
                    raise DataError(
                        f"{name}: frames = {getattr(picture, 'n_frames', 1)} · a record is one picture",
                        next="Save each frame as a record of its own.",
                        code="frames",
                    )
                if picture.mode not in _GREY + _COLOUR:
                    raise DataError(
                        f"{name}: mode = {picture.mode} · 8-bit grey or RGB, with or without transparency",
                        next="Convert it (16-bit: choose the window first; CMYK: to RGB).",
                        code="channels",
                    )
                return _flatten(picture)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: size · {_reason(error)}", next=_TOO_LARGE, code="huge") from None
    except FileNotFoundError:
        raise DataError(
            f"{name}: file = {shown(media)} · does not exist",
            next="Put the file there, or take the record out.",
            code="missing_file",
        ) from None
    except Exception as error:  # a damaged file can raise nearly anything inside a decoder
        raise DataError(
            f"{name}: picture = {shown(media)} · cannot be decoded ({_reason(error)})",
            next="Replace it by an undamaged PNG, JPEG, WebP, BMP, GIF, TIFF or PPM, or take the record out.",
            code="unreadable",
        ) from None


def refuse_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1 or max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: size = {width} x {height} · at most {MAX_SIDE} a side, {MAX_PIXELS // 1_000_000} million pixels",
            next=_TOO_LARGE,
            code="huge",
        )


def _flatten(picture: Any) -> np.ndarray:
    """Grey stays grey, all else becomes RGB; transparency on white; turned as its EXIF orientation says."""
    from PIL import Image, ImageOps

    grey = picture.mode in _GREY
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        picture = white.convert("RGB")
    pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    return pixels[:, :, None] if grey else pixels


def fit(pixels: np.ndarray, *, size: int, channels: int) -> np.ndarray:
    """Square of ``size`` pixels with ``channels`` channels, (size, size, channels) uint8.

    A picture that is not square is padded with the mean colour of its border, not cropped: nothing at an edge is lost.
    Whole-number reductions average boxes, others use Lanczos; colour to grey by luminance.
    """
    from PIL import Image

    height, width, given = pixels.shape
    if (height, width, given) == (size, size, channels):
        return pixels
    picture = Image.fromarray(pixels[:, :, 0] if given == 1 else pixels)
    if height != width:
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(0).round().astype(int)
        square = Image.new(
            picture.mode, (max(height, width),) * 2, int(border[0]) if given == 1 else tuple(border.tolist())
        )
        square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2))
        picture = square
    if channels != given:
        picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.width != size:
        method = Image.Resampling.BOX if picture.width % size == 0 else Image.Resampling.LANCZOS
        picture = picture.resize((size, size), method)
    result = np.asarray(picture)
    return result[:, :, None] if channels == 1 else result


def read_audio(media: Media, *, name: str) -> tuple[np.ndarray, int]:
    """Decodes one mono sound; its length is checked in the header first.

    Returns: (T,) float32 in [-1, 1] and its sample rate. Raises DataError: missing_file, huge, channels, unreadable.
    """
    samples, rate = read_sound(media, name=name, channels=1)
    return samples[:, 0], rate


def read_sound(media: Media, *, name: str, channels: int | None = None) -> tuple[np.ndarray, int]:
    """As ``read_audio``, with all channels, (T, channels). Args: channels: refuse any other number."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise MissingDependency(f"soundfile = missing · reads sounds ({error})", next="pip install soundfile") from None
    try:
        if isinstance(media, Span):
            media = media.read()
        with soundfile.SoundFile(io.BytesIO(media) if isinstance(media, bytes) else str(media)) as sound:
            if channels is not None and sound.channels != channels:
                raise DataError(
                    f"{name}: channels = {sound.channels} · one channel",
                    next="Mix it down to mono, or keep one channel.",
                    code="channels",
                )
            if not 0 < sound.frames * sound.channels <= MAX_SAMPLES:
                raise DataError(
                    f"{name}: samples = {sound.frames * sound.channels} · 1 to {MAX_SAMPLES}",
                    next="Cut it; it was not decoded.",
                    code="huge",
                )
            expected, rate = sound.frames, int(sound.samplerate)
            samples = sound.read(dtype="float32", always_2d=True)
            if len(samples) != expected:
                raise DataError(
                    f"{name}: samples = {len(samples)} of {expected} · the whole sound",
                    next="Replace the truncated file.",
                    code="unreadable",
                )
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        missing = isinstance(media, Path) and not media.exists()
        what = "does not exist" if missing else f"cannot be decoded ({_reason(error)})"
        raise DataError(
            f"{name}: sound = {shown(media)} · {what}",
            next="Replace the file, or take the record out.",
            code="missing_file" if missing else "unreadable",
        ) from None
    return np.clip(np.nan_to_num(samples), -1.0, 1.0), rate


def difference_hash(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """How near duplicates are found: a 64-bit difference hash (is a pixel of the 9x8 thumbnail brighter than its right
    neighbour?) and a 16x16 grey thumbnail that confirms it."""
    from PIL import Image

    grey = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (small[:, :-1] > small[:, 1:]).ravel()
    thumbnail = np.asarray(grey.resize((16, 16), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail


def shown(media: Media) -> str:
    return f"{len(media)} bytes" if isinstance(media, bytes) else media.name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
