"""Public icons with names and tags, drawn from SVG: to start on, before a private training on pictures of this kind."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data import media
from sfumato.data.entries import Entries, Entry
from sfumato.errors import DataError, MissingDependency

STYLES = {"mdi": "glyph", "lucide": "outline", "openmoji": "colour"}


class Icons(Entries):
    """Three sets: Material Design (glyphs), Lucide (outlines), OpenMoji (in colour). Caption: name, tags, style word.

    Split by ``concept``, the name. ``tags`` holds all of them, ``code`` the code points that OpenMoji names its files by.
    Variants by skin colour and deprecated icons are left out.
    Args: size: pixels a side; SVG is drawn at that size, not scaled afterwards.
    """

    name = "icons"
    facts: Mapping[str, tuple[str, ...]] = {"style": tuple(STYLES.values())}

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder, self.size = folder, size
        self._draw = _renderer()

    def entries(self) -> Iterator[Entry]:
        for pack in STYLES:
            for stem, label, tags in _listed(pack, self._json(pack)):
                yield self._entry(pack, stem, label, [tag for tag in dict.fromkeys(tags) if tag])

    def _entry(self, pack: str, stem: str, label: str, tags: list[str]) -> Entry:
        others = [tag for tag in tags if tag.casefold() != label.casefold()]
        name, file = f"{pack}/{stem}", self.folder / pack / f"{stem}.svg"
        return Entry(
            id=name,
            unit=None,
            text=", ".join([label, *others[:4], STYLES[pack]]),
            image=lambda: self._picture(file, name),
            metadata={
                "facts": {"style": STYLES[pack]},
                "concept": label.casefold(),
                "label": label,
                "tags": tags,
                "pack": pack,
                **({"code": code_points(stem)} if pack == "openmoji" else {}),
            },
        )

    def _picture(self, file: Path, name: str) -> np.ndarray:
        try:
            drawn = self._draw(svg_string=file.read_text(encoding="utf-8"), width=self.size, height=self.size)
        except FileNotFoundError:
            raise DataError(f"{name} · does not exist", next="Fetch it again.", code="missing_file") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{name} · cannot be drawn ({error})", next="Fetch it again.", code="unreadable") from None
        return media.read_image(bytes(drawn), name=name)

    def _json(self, pack: str) -> Any:
        path = self.folder / f"{pack}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} · must be the list of the pack ({error})", next="Fetch it again.", code="unreadable"
            ) from None


def _listed(pack: str, listed: Any) -> Iterator[tuple[str, str, list[str]]]:
    """(file, label, tags) of each icon, in order. Raises DataError for a list of another shape."""
    try:
        if pack == "lucide":
            for name in sorted(listed):
                yield name, name.replace("-", " "), [str(tag) for tag in listed[name]]
            return
        for row in listed:
            if pack == "mdi" and not row["deprecated"]:
                yield row["name"], row["name"].replace("-", " "), [alias.replace("-", " ") for alias in row["aliases"]]
            elif pack == "openmoji" and not row["skintone"]:
                tags = f"{row['tags']}, {row['openmoji_tags']}".split(", ")
                yield row["hexcode"], row["annotation"], [tag.strip() for tag in tags]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{pack}.json · has another shape ({error!r})", next="Fetch it again.", code="row") from None


def code_points(code: str) -> str:
    """One spelling for a sequence of code points: lower case, dashes, without the presentation selector."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def _renderer() -> Any:
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(f"resvg-py = missing · draws icons ({error})", next="pip install resvg-py") from None
    return resvg_py.svg_to_bytes
