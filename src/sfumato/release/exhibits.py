"""What the report shows of ``samples/``: for each direction what was told, what was made, what is real; within bounds of size.

``index.json`` names the directions (``training/samples.py`` writes it); a run without one has text→image alone.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_PICTURE = 8 * 2**20  # bytes of one PNG that is put into the page
MAX_SOUND = 512 * 2**10  # and of one WAV
MAX_SOUNDS = 6 * 2**20  # and of all of them: what is more is named, and stays in samples/
HEARD = 6  # sounds of a direction
ROWS = 8  # texts of a direction
STRIP = 6  # pictures over time
TITLES = {"text": "texts", "image": "pictures", "audio": "sounds"}


def directions(run_dir: Path) -> list[dict[str, Any]]:
    """Names of files and texts, by direction; nothing is embedded yet. Directions of pictures come first."""
    folder = run_dir / "samples"
    index = _json(folder / "index.json")
    if not isinstance(index, list):
        index = [_from_captions(folder)]
    return [_described(folder, entry) for entry in index if isinstance(entry, dict)]


def embedded(run_dir: Path, found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Every file that the page shows, by name, as a data address; None for what is too large or broken."""
    folder = run_dir / "samples"
    files: dict[str, dict[str, Any] | None] = {}
    left = MAX_SOUNDS
    for entry in found:
        names = [name for part in entry["parts"] for name in _names(part)] + [row for row in entry["told"] if row]
        for name in dict.fromkeys(names):
            path = folder / name
            if path.suffix == ".wav":
                files[name] = sound = _sound(path, left)
                left -= 0 if sound is None else len(sound["src"])
            else:
                files[name] = _picture(path)
    return files


def _described(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    slug = str(entry.get("slug") or "")
    if slug and not re.fullmatch(r"[a-z-]+", slug):
        slug = "-unknown"  # a name of ours has letters and dashes only; nothing else is looked for on the disk
    wanted = [name for name in entry.get("wanted") or () if name in TITLES]
    given = [name for name in entry.get("given") or () if name in TITLES]
    several = len(wanted) > 1
    texts = [str(text) for text in entry.get("texts") or ()]
    return {
        "direction": str(entry.get("direction") or ""),
        "slug": slug,
        "given": given,
        "texts": texts,
        "told": _told(folder, slug, given),
        "parts": [_part(folder, slug + (f"-{name}" if several else ""), name) for name in wanted],
    }


def _part(folder: Path, slug: str, modality: str) -> dict[str, Any]:
    part: dict[str, Any] = {"modality": modality, "final": None, "real": None, "steps": []}
    extension = "txt" if modality == "text" else "png"
    steps = sorted(
        path.name
        for path in folder.glob(f"step-*{slug}.{extension}")
        if re.fullmatch(rf"step-\d+{slug}\.\w+", path.name)
    )
    last = f"final{slug}.{extension}"
    if not (folder / last).is_file():
        last = steps[-1] if steps else None
    real = f"real{slug}.{extension}" if (folder / f"real{slug}.{extension}").is_file() else None
    if modality == "text":
        return {**part, "made": _lines(folder, last), "really": _lines(folder, real)}
    part |= {"final": last, "real": real, "steps": spread(steps, STRIP)}
    if modality == "audio":
        stem = "" if last is None else last.removesuffix(".png")
        part |= {"made": _wavs(folder, stem), "really": _wavs(folder, f"real{slug}")}
    return part


def _told(folder: Path, slug: str, given: Sequence[str]) -> list[str]:
    """The pictures or sounds that each example was told, where it was told any."""
    extension = "png" if "image" in given else "wav" if "audio" in given else None
    if extension is None:
        return []
    names = [path.name for path in folder.glob(f"given{slug}-*.{extension}")]
    kind = r"\d\d\.png" if extension == "png" else r"\d\d-\d\d\.wav"
    return sorted(name for name in names if re.fullmatch(rf"given{slug}-{kind}", name))[:ROWS]


def _wavs(folder: Path, stem: str) -> list[str]:
    found = sorted(path.name for path in folder.glob(f"{stem}-*.wav")) if stem else []
    return [name for name in found if re.fullmatch(rf"{re.escape(stem)}-\d\d\.wav", name)][:HEARD]


def _lines(folder: Path, name: str | None) -> list[str]:
    if name is None:
        return []
    return (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[:ROWS]


def _names(part: Mapping[str, Any]) -> list[str]:
    """The files of a part."""
    if part["modality"] == "text":
        return []
    heard = [*part["made"], *part["really"]] if part["modality"] == "audio" else []
    return [name for name in (part["final"], part["real"], *part["steps"], *heard) if name]


def _from_captions(folder: Path) -> dict[str, Any]:
    captions = _json(folder / "captions.json") or []
    if isinstance(captions, dict):
        captions = captions.get("captions") or []
    return {"direction": "text→image", "given": ["text"], "wanted": ["image"], "slug": "", "texts": captions}


def _json(path: Path) -> Any:
    from sfumato.errors import UsageError

    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} · must be JSON ({error})", next="Remove it.") from None


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, first and last among them, evenly."""
    if len(names) <= count:
        return list(names)
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


def _picture(path: Path) -> dict[str, Any] | None:
    """A PNG as a data address with its size in pixels; None for what is no PNG of reasonable size."""
    if path.stat().st_size > MAX_PICTURE:
        return None
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    step = re.search(r"step-0*(\d+)", path.name)
    return {
        "src": "data:image/png;base64," + base64.b64encode(data).decode("ascii"),
        "width": int.from_bytes(data[16:20], "big"),
        "height": int.from_bytes(data[20:24], "big"),
        "step": int(step.group(1)) if step else None,
    }


def _sound(path: Path, left: int) -> dict[str, Any] | None:
    """A WAV as a data address; None for what is no WAV, or more than is ``left``."""
    size = path.stat().st_size
    if size > MAX_SOUND or size * 4 // 3 + 64 > left:
        return None
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    return {"src": "data:audio/wav;base64," + base64.b64encode(data).decode("ascii")}
