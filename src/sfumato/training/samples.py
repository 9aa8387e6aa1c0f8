"""What a model makes, to be looked at and listened to: grids of pictures, sounds with their spectrograms, texts. [shell]

In a run's ``samples/``, for one direction STEM.png, STEM-00.wav, STEM.txt; STEM is ``real`` (what the public examples really
are), ``step-NNNNNN`` or ``final``, with the direction after it unless it is text→image. ``index.json`` names the directions.
"""

import json
import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.errors import OutsideError
from sfumato.records import MODALITIES, Modality, Record, prompt

PICTURES = 18  # examples of a direction that makes pictures alone
OTHERS = 8  # of one that makes texts or sounds
COLUMNS = 6
TALL = 64  # mel bands of a spectrogram that is looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One direction with its public examples.

    Attributes: slug: what its files have after their stem; "" for text→image.
    """

    name: str
    given: tuple[Modality, ...]
    wanted: tuple[Modality, ...]
    slug: str
    examples: list[Record]

    def prompts(self) -> list[Record]:
        """What the model is told of the examples: nothing but the given modalities."""
        rate = "audio" in self.given
        return [
            prompt(**{name: getattr(r, name) for name in self.given}, sample_rate=r.sample_rate if rate else None)
            for r in self.examples
        ]


class Samples:
    """The same public examples and the same seed each time. A watcher of the loop; a stage calls ``begin`` and ``write``."""

    def __init__(self, folder: Path, directions: Sequence[Any], public: Sequence[Record], *, seed: int = 0) -> None:
        self._folder = folder
        self._seed = seed
        self.shown = [found for direction in directions if (found := _chosen(direction, public)).examples]

    def figures(self, values: dict[str, Any]) -> None:
        """Samples are drawn, not counted."""

    def picture(self, step: int, model: Any) -> None:
        self.write(f"step-{step:06d}", model)

    def begin(self) -> None:
        """What the examples really are, and what is told of them."""
        for shown in self.shown:
            self._write("real", shown, shown.examples)
            for name in shown.given:
                if name != "text":  # texts are in the index
                    for number, record in enumerate(shown.examples[:OTHERS]):
                        _write_given(self._folder / f"given{shown.slug}-{number:02d}", name, record)
        index = [
            {
                "direction": shown.name,
                "given": list(shown.given),
                "wanted": list(shown.wanted),
                "slug": shown.slug,
                "examples": len(shown.examples),
                "texts": [record.text for record in shown.examples] if "text" in shown.given else [],
            }
            for shown in self.shown
        ]
        write_text(self._folder / "index.json", json.dumps(index, indent=1, ensure_ascii=False) + "\n")
        captions = next((entry["texts"] for entry in index if not entry["slug"]), [])
        write_text(self._folder / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False) + "\n")

    def write(self, stem: str, model: Any) -> None:
        """Draws one record for each example of each direction, and writes them under ``stem``."""
        for shown in self.shown:
            self._write(stem, shown, model.sample(shown.prompts(), shown.wanted, seed=self._seed))

    def _write(self, stem: str, shown: Shown, records: Sequence[Record]) -> None:
        for name in shown.wanted:
            several = f"-{name}" if len(shown.wanted) > 1 else ""
            write_records(self._folder / f"{stem}{shown.slug}{several}", name, records)


def slug(given: Sequence[Modality], wanted: Sequence[Modality]) -> str:
    """ "-image-to-text"; "" for text→image."""
    name = f"-{'-'.join(given) or 'nothing'}-to-{'-'.join(wanted)}"
    return "" if name == "-text-to-image" else name


def write_records(stem: Path, modality: Modality, records: Sequence[Record]) -> list[Path]:
    """One file for all pictures or texts, and of sounds a WAV each beside their spectrograms. Returns the files."""
    match modality:
        case "image":
            pictures = [record.image for record in records if record.image is not None]
            path = stem.with_name(stem.name + ".png")
            write_grid(path, np.stack(pictures), columns=min(COLUMNS, len(pictures)))
            return [path]
        case "audio":
            sounds = [record.audio for record in records if record.audio is not None]
            rate = next(record.sample_rate for record in records if record.sample_rate)
            path = stem.with_name(stem.name + ".png")
            write_spectrograms(path, sounds, rate)
            files = [stem.with_name(f"{stem.name}-{number:02d}.wav") for number in range(len(sounds))]
            for file, sound in zip(files, sounds, strict=True):
                write_wav(file, sound, rate)
            return [path, *files]
        case "text":
            path = stem.with_name(stem.name + ".txt")
            write_text(path, "".join(one_line(record.text or "") + "\n" for record in records))
            return [path]


def write_grid(path: Path, pictures: np.ndarray, *, columns: int, scale: int | None = None) -> None:
    """Writes (N, H, W, C) uint8 as one PNG, enlarged to be looked at. Raises OutsideError where the disk says no."""
    from PIL import Image

    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    scale = scale or max(1, 96 // max(height, width))
    grid = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        grid[top : top + height, left : left + width] = picture
    image = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    scratch = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(scratch, format="PNG")
        scratch.replace(path)
    except OSError as error:
        raise _refused("picture", path, error) from None


def write_spectrograms(path: Path, sounds: Sequence[np.ndarray], sample_rate: int, *, columns: int = 4) -> None:
    """A grid of log-mel spectrograms, time to the right, high notes at the top."""
    from sfumato.data import spectrogram

    pictures = spectrogram.spectrograms(spectrogram.stack(sounds), sample_rate, bands=TALL, frames=2 * TALL)
    write_grid(path, pictures, columns=min(columns, len(sounds)))


def write_wav(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    """(T,) in [-1, 1] as 16-bit PCM, one channel; louder is cut. Raises OutsideError where the disk says no."""
    cut = np.clip(np.nan_to_num(np.asarray(sound, np.float64)), -1, 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(np.round(cut * 32767).astype("<i2").tobytes())
    except OSError as error:
        raise _refused("sound", path, error) from None


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise _refused("text", path, error) from None


def one_line(text: str) -> str:
    """Nothing that ends a line or is no letter for a terminal."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text).strip()


def _chosen(direction: Any, public: Sequence[Record]) -> Shown:
    """Public records, one a unit, that have everything that the direction tells and wants."""
    needed = (*direction.given, *direction.wanted)
    found, units = [], set()
    for record in public:
        if record.unit not in units and all(_has(record, name) for name in MODALITIES if name in needed):
            found.append(record)
            units.add(record.unit)
    most = PICTURES if direction.wanted == ("image",) else OTHERS
    found = found[:: max(1, len(found) // most)][:most]
    return Shown(
        name=str(direction),
        given=direction.given,
        wanted=direction.wanted,
        slug=slug(direction.given, direction.wanted),
        examples=found,
    )


def _has(record: Record, name: Modality) -> bool:
    return bool(record.text) if name == "text" else getattr(record, name) is not None


def _write_given(stem: Path, name: Modality, record: Record) -> None:
    """One picture, or one sound."""
    write_records(stem, name, [record])


def _refused(what: str, path: Path, error: OSError) -> OutsideError:
    return OutsideError(
        f"{what} = {path} · could not be written ({error})", next="Free some disk space, then --resume."
    )
