"""Built-in sets with speech: telephone prompts of one speaker, and stamps with a caption that is also spoken."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sfumato.data import media
from sfumato.data.entries import Entries, Entry
from sfumato.errors import DataError

STAMP_RATE = 16_000  # hertz, of the spoken captions after resampling
_SIGN = re.compile(r"\s*\[.\]$")
_COPY = re.compile(r"[-_]?\d+$")


class Prompts(Entries):
    """Telephone prompts: one speaker, 8 kHz, with transcripts. Tones and silence, whose transcript is in brackets, are
    left out; so is a sign in brackets behind its name, "dot [.]"."""

    name = "prompts"
    facts: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            lines = (folder / "transcripts.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{folder / 'transcripts.txt'} · cannot be read ({error})", next="Fetch it again.", code="unreadable"
            ) from None
        said = (line.partition(": ") for line in lines if line and not line.startswith(";"))
        self.transcripts = {name.strip(): words.strip() for name, colon, words in said if colon}

    def entries(self) -> Iterator[Entry]:
        for file in sorted((self.folder / "wav").rglob("*.wav")):
            name = file.relative_to(self.folder / "wav").with_suffix("").as_posix()
            words = self.transcripts.get(name)
            if words is None:
                error = DataError(f"{name} · has no transcript", next="Use the original files.", code="missing_file")
                yield Entry(id=name, unit=None, problem=error)
            elif not words.startswith(("[", "(")):
                spoken = _SIGN.sub("", words)
                yield Entry(id=name, unit=None, text=spoken, audio=file, metadata={"words": len(spoken.split())})


class Stamps(Entries):
    """Pictures of things with a caption, in some languages also spoken. Split by ``concept``: frog and frog-1 are one.

    Args: speech: only stamps whose caption is spoken in the record's language; then mono at STAMP_RATE.
    """

    name = "stamps"

    def __init__(
        self, folder: Path, *, languages: Sequence[str] = ("en",), seed: int = 0, speech: bool = False
    ) -> None:
        self.root, self.languages, self.seed, self.speech = folder / "stamps", tuple(languages), seed, speech
        self.files = [p for p in sorted(self.root.rglob("*.png")) if p.with_suffix(".txt").is_file()]
        if not self.files:
            raise DataError(f"{self.root} · has no stamps", next="Fetch it again.", code="missing_file")
        self.facts: Mapping[str, tuple[str, ...]] = {
            "category": tuple(sorted({file.relative_to(self.root).parts[0] for file in self.files}))
        }

    def entries(self) -> Iterator[Entry]:
        for number, file in enumerate(self.files):
            captions = captions_of(file.with_suffix(".txt"))
            voices = {language: self._voice(file, language) for language in self.languages}
            told = [
                language
                for language in self.languages
                if captions.get(language) and (voices[language] or not self.speech)
            ]
            if not told:
                continue  # not captioned, or not spoken, in any of these languages
            rng = np.random.Generator(np.random.PCG64([self.seed, number]))
            language = told[int(rng.integers(len(told)))]
            name = file.relative_to(self.root).with_suffix("").as_posix()
            metadata = {
                "facts": {"category": name.split("/")[0]},
                "concept": _COPY.sub("", name),
                "language": language,
            }
            voice = voices[language]
            yield Entry(
                id=name,
                unit=None,
                text=captions[language],
                image=file,
                audio=(lambda voice=voice, name=name: speech_of(voice, name)) if self.speech and voice else None,
                metadata=metadata,
            )

    def _voice(self, file: Path, language: str) -> Path | None:
        stem = f"{file.stem}_desc" if language == "en" else f"{file.stem}_desc_{language}"
        return next((p for suffix in (".ogg", ".wav") if (p := file.with_name(stem + suffix)).is_file()), None)


def captions_of(table: Path) -> dict[str, str]:
    """By language: the first line is English, the others ``ru.utf8=...``."""
    first, *others = table.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    captions = {"en": first.strip()}
    spelling = {"ru": "ru", "zh_CN": "zh"}
    for line in others:
        code, equals, words = line.partition(".utf8=")
        if equals and code in spelling:
            captions[spelling[code]] = words.strip()
    return captions


def speech_of(file: Path, name: str) -> tuple[np.ndarray, int]:
    """A spoken caption, whatever its rate and channels, as mono at STAMP_RATE."""
    from math import gcd

    from scipy.signal import resample_poly

    samples, rate = media.read_sound(file, name=name)
    mono = samples.mean(axis=1)
    common = gcd(rate, STAMP_RATE)
    resampled = resample_poly(mono, STAMP_RATE // common, rate // common) if rate != STAMP_RATE else mono
    return np.clip(resampled, -1.0, 1.0).astype(np.float32), STAMP_RATE
