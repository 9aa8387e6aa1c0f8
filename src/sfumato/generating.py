"""New records from a trained model, in any direction that it knows: PNG, WAV and TXT files. Spends nothing. [shell]"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.errors import DataError, UsageError
from sfumato.records import MODALITIES, Modality, Record, prompt

EXTENSION: dict[Modality, str] = {"image": ".png", "audio": ".wav", "text": ".txt"}


def generate(
    run_or_bundle: Path | str,
    *,
    texts: Sequence[str] = (),
    images: Sequence[Path | str] = (),
    audios: Sequence[Path | str] = (),
    want: Sequence[str] = (),
    count: int = 1,
    out: Path | str = "generated",
    seed: int = 0,
) -> dict[str, Any]:
    """Draws ``count`` records for each thing told, and writes them as OUT/PROMPT-NUMBER.png, .wav or .txt.

    Texts, pictures and sounds are told together, the first with the first and so on; a single one goes with all.

    Args:
      run_or_bundle: a finished run, a bundle, or a folder with a model, such as checkpoints/best of a run.
      want: modalities; none: what the first direction gives that takes what is told.

    Raises: UsageError for what does not fit the model, DataError for a file that cannot be read.
    """
    from sfumato.models import model as models
    from sfumato.training import samples

    if count < 1:
        raise UsageError(f"count = {count} · must be at least 1", next="Give --count 1 or more.")
    folder = model_folder(run_or_bundle)
    model = models.load(folder)
    prompts = _prompts(model, texts, images, audios)
    told: tuple[Modality, ...] = tuple(
        name for name in MODALITIES if any(getattr(record, name) is not None for record in prompts)
    )
    wanted = _wanted(model.directions, told, want)
    rows = [record for record in prompts for _ in range(count)]
    made = model.sample(rows, wanted, seed=seed)
    files: list[str] = []
    for row, record in enumerate(made):
        stem = Path(out) / f"{row // count:03d}-{row % count:03d}"
        for name in wanted:
            path = stem.with_name(stem.name + EXTENSION[name])
            match name:
                case "image":
                    samples.write_grid(path, np.asarray(record.image)[None], columns=1)
                case "audio":
                    samples.write_wav(path, np.asarray(record.audio), int(record.sample_rate or 0))
                case "text":
                    samples.write_text(path, (record.text or "") + "\n")
            files.append(str(path))
    return {
        "files": files,
        "model": str(folder),
        "texts": [record.text for record in rows],
        "direction": f"{'+'.join(told) or 'nothing'}→{'+'.join(wanted)}",
        "made": [record.text for record in made] if "text" in wanted else [],
        "watermarked": False,
    }


def model_folder(given: Path | str) -> Path:
    """The folder of the weights. Raises UsageError where there are none."""
    folder = Path(given).resolve()
    for place in (folder / "model", folder):
        if (place / "sfumato.json").is_file():
            return place
    raise UsageError(f"model = {folder} · has no folder model/", next="Give a finished run's folder, or a bundle.")


def _prompts(
    model: Any, texts: Sequence[str], images: Sequence[Path | str], audios: Sequence[Path | str]
) -> list[Record]:
    given = {"text": len(texts), "image": len(images), "audio": len(audios)}
    number = max(given.values())
    if any(1 < length != number for length in given.values()):
        counts = ", ".join(f"{length} of {name}" for name, length in given.items() if length)
        raise UsageError(
            f"told = {counts} · must be equally many, or one that goes with all",
            next="Repeat --text, --image and --audio equally often.",
        )
    if not number:
        if any(not direction.given for direction in model.directions):
            return [prompt()]
        raise UsageError(
            f"told = nothing · this model knows {', '.join(map(str, model.directions))}",
            next='Give --text "…", --image FILE or --audio FILE.',
        )
    pictures = [_picture(model, Path(path)) for path in images]
    sounds = [_sound(model, Path(path)) for path in audios]

    def of(values: Sequence[Any], row: int) -> Any:
        return None if not values else values[row if len(values) > 1 else 0]

    rate = _shapes(model).sample_rate if sounds else None
    return [
        prompt(text=of(texts, row), image=of(pictures, row), audio=of(sounds, row), sample_rate=rate)
        for row in range(number)
    ]


def _wanted(directions: Sequence[Any], told: tuple[Modality, ...], want: Sequence[str]) -> tuple[Modality, ...]:
    """What is asked for. Raises UsageError, with what the model knows, where nothing fits."""
    for name in want:
        if name not in MODALITIES:
            raise UsageError(
                f"want = {name} · must be one of {', '.join(MODALITIES)}", next="Give --want text, image or audio."
            )
    fitting = [d for d in directions if set(told) <= set(d.given) and set(want) <= set(d.wanted)]
    both = set(want) & set(told)
    if not fitting or both:
        asked = f"{'+'.join(told) or 'nothing'}→{'+'.join(want) or 'anything'}"
        raise UsageError(
            f"direction = {asked} · this model knows {', '.join(map(str, directions))}",
            next="Tell it, and ask it for, what one of these has.",
        )
    first = min(
        fitting, key=lambda direction: len(set(direction.given) - set(told))
    )  # the nearest, and of those the first
    return tuple(name for name in MODALITIES if name in (want or first.wanted))


def _shapes(model: Any) -> Any:
    from sfumato.models.shapes import Shapes

    return getattr(model, "shapes", None) or Shapes(picture=model.picture_shape)


def _picture(model: Any, path: Path) -> np.ndarray:
    """A file as the model's pictures are."""
    from sfumato.data import media

    height, width, channels = _shapes(model).of_picture()
    if height != width:
        raise UsageError(f"model's pictures are {height} x {width} · only square ones are told", next="Use --text.")
    return media.fit(media.read_image(path, name=str(path)), size=height, channels=channels)


def _sound(model: Any, path: Path) -> np.ndarray:
    """A file at the model's sample rate, cut to its length."""
    from scipy.signal import resample_poly

    from sfumato.data import media

    samples, rate = _shapes(model).of_sound()
    sound, given = media.read_audio(path, name=str(path))
    if given != rate:
        common = math.gcd(given, rate)
        if max(given, rate) // common > 10_000:
            raise DataError(
                f"{path}: sample rate = {given} · cannot be brought to {rate}",
                next=f"Save it at {rate} hertz.",
                code="sample_rate",
            )
        sound = resample_poly(sound, rate // common, given // common)
    return np.clip(sound[:samples], -1, 1).astype(np.float32)
