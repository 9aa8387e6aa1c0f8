"""The built-in sets: fetched, opened by their settings; here also emoji in three styles, digits, articles of clothing."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data import fetch as fetching
from sfumato.data.clinic import SITES_OF, Clinic
from sfumato.data.entries import Entries, Entry, Source
from sfumato.data.fetch import EXAMPLES, IDX_FILES, missing_files
from sfumato.data.icons import Icons, code_points
from sfumato.data.settings import OWN, DataSettings
from sfumato.data.spoken import Prompts, Stamps
from sfumato.data.words import Emails, WordNet
from sfumato.errors import DataError
from sfumato.records import Record

__all__ = ["Clinic", "Emoji", "Labelled", "fetch", "open_example", "open_public"]

DIGITS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "ru": ("ноль", "единица", "двойка", "тройка", "четвёрка", "пятёрка", "шестёрка", "семёрка", "восьмёрка", "девятка"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}
CLOTHES = {
    "en": ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "ru": ("футболка", "брюки", "свитер", "платье", "пальто", "сандалия", "рубашка", "кроссовок", "сумка", "ботинок"),
    "zh": ("T恤", "裤子", "套头衫", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴"),
}
PHRASES = {
    "mnist": {
        "en": (
            "a handwritten {}",
            "the digit {}, handwritten",
            "{a} {} written by hand",
            "handwritten digit: {}",
            "somebody wrote {a} {}",
        ),
        "ru": ("цифра от руки: {}", "рукописная цифра, {}", "написано от руки: {}"),
        "zh": ("手写数字{}", "手写的{}", "一个手写的{}"),
    },
    "fashion-mnist": {
        "en": (
            "a photo of {a} {}",
            "{a} {}",
            "{a} {} on a dark ground",
            "product picture: {}",
            "a grey picture of {a} {}",
        ),
        "ru": ("на снимке {}", "{}", "фото товара: {}"),
        "zh": ("{}的照片", "{}", "商品图片：{}"),
    },
}
_PIXELS_MD5 = {
    "mnist": {"train": "6510e85a72c3e9475c492d559d3770d2", "test": "240610fa99e73bfa49df8e7fc24d3206"},
    "fashion-mnist": {"train": "f209073e486d5113ebe2cc431d4df862", "test": "b7656a891b218fc13e45205c48a92cae"},
}


def fetch(name: str, *, folder: Path | str | None = None) -> dict[str, Any]:
    """Brings a built-in set into the cache, and says what it holds: ``fetch.fetch`` with records, units, modalities,
    problems and sha256 (of the archives' sums). The clinic is generated: its records are those of the default settings."""
    result = fetching.fetch(name, folder=folder)
    settings = DataSettings(source=name)  # type: ignore[arg-type]
    parts = [part for part in (open_example(settings), open_public(settings)) if part is not None]
    records = sum(len(part) for part in parts)
    units = settings.units + settings.public_units if name == "clinic" else records
    if name == "emails":
        units = len({entry.unit for entry in Emails(Path(result["path"])).entries()})
    sums = " ".join(package["sha256"] for package in result["packages"])
    return result | {
        "records": records,
        "units": units,
        "modalities": {kind: records if kind in settings.needed else 0 for kind in ("text", "image", "audio")},
        "problems": [],
        "sha256": hashlib.sha256(sums.encode()).hexdigest() if sums else None,
    }


def open_example(settings: DataSettings) -> Source:
    """The part of a built-in set that is for training (emoji: all of it, ``prepare.load`` splits it by concept)."""
    match settings.source:
        case "clinic":
            return _clinic(settings, patients=min(settings.units, settings.limit_units or settings.units), public=False)
        case "mnist" | "fashion-mnist":
            return Labelled(
                settings.source, located(settings), split="train", languages=settings.languages, seed=settings.seed
            )
        case "emoji":
            return Emoji(located(settings), languages=settings.languages, seed=settings.seed)
        case "wordnet":
            return WordNet(located(settings))
        case "emails":
            return Emails(located(settings))
        case "prompts":
            return Prompts(located(settings))
        case "stamps":
            speech = "audio" in settings.needed
            return Stamps(located(settings), languages=settings.languages, seed=settings.seed, speech=speech)
        case "icons":
            return Icons(located(settings), size=max(settings.image_size, 32))
        case other:
            raise AssertionError(f"not an example: {other}")


def open_public(settings: DataSettings) -> Source | None:
    """The public part that a built-in set brings along: other patients, the official test set; None for emoji."""
    match settings.source:
        case "clinic":
            return _clinic(settings, patients=settings.public_units, public=True) if settings.public_units else None
        case "mnist" | "fashion-mnist":
            return Labelled(
                settings.source, located(settings), split="test", languages=settings.languages, seed=settings.seed
            )
        case _:
            return None


def _clinic(settings: DataSettings, *, patients: int, public: bool) -> Clinic:
    return Clinic(
        patients=patients,
        image_size=max(settings.image_size, 32),
        languages=settings.languages,
        seed=settings.seed,
        audio="audio" in settings.needed,
        public=public,
        sites=SITES_OF[settings.hospitals],
    )


def folder_of(settings: DataSettings) -> Path | None:
    """Where the files of a built-in set lie; None for generated sets and for the user's own."""
    return None if settings.source in ("clinic", *OWN) else located(settings)


def located(settings: DataSettings) -> Path:
    """The folder with the files: the user's own, or the cache (fetched now if it is not there)."""
    if settings.path is None:
        return Path(fetching.fetch(settings.source)["path"])
    folder, example = Path(settings.path), EXAMPLES[settings.source]
    if any(any(folder.glob(package.archive)) for package in example.packages):
        return Path(fetching.fetch(settings.source, folder=folder)["path"])
    if settings.source == "emoji":
        lacking = [
            f for f in missing_files(folder, example) if not f.startswith("captions/") or f[9:11] in settings.languages
        ]
    else:
        lacking = missing_files(folder, example)
    if lacking:
        raise DataError(
            f"path = {folder} · lacks {', '.join(lacking)}",
            next=f"Put them there, or {', '.join(p.archive for p in example.packages)}; or leave data.path out.",
            code="missing_file",
        )
    return folder


class Labelled:
    """MNIST or Fashion-MNIST: idx files (gzipped too), captions in a few phrasings, the class as a fact."""

    def __init__(
        self, name: str, folder: Path, *, split: str, languages: Sequence[str] = ("en",), seed: int = 0
    ) -> None:
        self.name, self.split, self.languages, self.seed = name, split, tuple(languages), seed
        self.names = DIGITS if name == "mnist" else CLOTHES
        self.fact = "digit" if name == "mnist" else "article"
        self.facts: Mapping[str, tuple[str, ...]] = {self.fact: self.names["en"]}
        images, labels = IDX_FILES[:2] if split == "train" else IDX_FILES[2:]
        self.images = read_idx(folder / images)
        self.labels = read_idx(folder / labels)
        if self.images.ndim != 3 or self.labels.ndim != 1 or len(self.images) != len(self.labels):
            raise DataError(
                f"{folder}: shapes = {self.images.shape} and {self.labels.shape} · (N, H, W) pictures and (N,) labels",
                next="Use the original files.",
            )
        if len(self.labels) and self.labels.max() > 9:
            raise DataError(f"{folder / labels}: label = {self.labels.max()} · 0 to 9", next="Use the original files.")

    @property
    def is_the_published_one(self) -> bool:
        """Whether the pixels are those of the published set, by their md5."""
        return (
            hashlib.md5(self.images.tobytes(), usedforsecurity=False).hexdigest() == _PIXELS_MD5[self.name][self.split]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Record]:
        draws = np.random.Generator(np.random.PCG64([self.seed, len(self)])).random((len(self), 2)).tolist()
        for row, (label, (u, v)) in enumerate(zip(self.labels.tolist(), draws, strict=True)):
            language = self.languages[int(u * len(self.languages))]
            phrases = PHRASES[self.name][language]
            word = self.names[language][label]
            article = "some" if word == "trousers" else "an" if word[0] in "aeiou" else "a"
            name = f"{self.split}/{row:05d}"
            yield Record(
                id=name,
                unit=name,
                text=phrases[int(v * len(phrases))].format(word, a=article),
                image=self.images[row, :, :, None],
                metadata={"facts": {self.fact: self.names["en"][label]}, "language": language},
            )


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from an idx file, gzipped or not. Raises DataError when it is torn or of another kind."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path.name} · cannot be read ({error})", next="Fetch it again.", code="unreadable") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] > 4 or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path.name} · is not an idx file of bytes", next="Use the original file.", code="unreadable")
    shape = np.frombuffer(raw, ">u4", raw[3], 4).astype(int).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(values) != int(np.prod(shape)):
        raise DataError(
            f"{path.name}: bytes = {len(values)} · {int(np.prod(shape))} by its header",
            next="It is torn: fetch it again.",
            code="unreadable",
        )
    return values.reshape(shape)


STYLES = {
    "flat": {"en": "flat", "ru": "плоский", "zh": "扁平"},
    "shaded": {"en": "shaded", "ru": "с тенями", "zh": "渐变"},
    "3d": {"en": "3d", "ru": "объёмный", "zh": "立体"},
}


GROUPS = (  # Unicode's, in the order of their numbers in the captions
    "smileys", "people", "components", "animals", "food", "travel", "activities", "objects", "symbols", "flags"
)  # fmt: skip


class Emoji(Entries):
    """Pictures of emoji in three styles with a caption: label, some tags, the style word. A record is its own unit, but
    sets are split by ``metadata["concept"]``, because the styles of one concept, and its captions, say nearly the same.

    Who holds which, in a federation: by ``style``, three houses that each drew all (Twitter, Google, Microsoft); by ``group``,
    ten collections of different subjects; by ``subgroup``, a hundred.
    """

    name = "emoji"
    facts: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, folder: Path, *, languages: Sequence[str] = ("en",), seed: int = 0) -> None:
        self.folder, self.languages, self.seed = folder, tuple(languages), seed
        self.groups: dict[str, tuple[str, str]] = {}
        self.captions = {language: self._words(language) for language in self.languages}
        self.files = {
            style: {
                code_points(file.stem): file
                for file in sorted((folder / style).iterdir())
                if file.suffix in (".png", ".webp")
            }
            for style in STYLES
        }
        first = self.captions[self.languages[0]]
        in_all = set(first).intersection(*self.captions.values())
        drawn = set(self.files["flat"]) | set(self.files["shaded"])
        self.concepts = sorted(in_all & drawn, key=lambda concept: (len(concept), concept))

    def _words(self, language: str) -> dict[str, tuple[str, list[str]]]:
        path = self.folder / "captions" / f"{language}.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            self.groups |= {code_points(row["hexcode"]): _group(row) for row in rows}
            return {code_points(row["hexcode"]): (row["label"], list(row.get("tags", []))) for row in rows}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path} · must be the emojibase list of captions ({error})", next="Fetch it again.", code="unreadable"
            ) from None

    def entries(self) -> Iterator[Entry]:
        for number, concept in enumerate(self.concepts):
            rng = np.random.Generator(np.random.PCG64([self.seed, number]))
            for style, files in self.files.items():
                language = self.languages[int(rng.integers(len(self.languages)))]
                label, tags = self.captions[language][concept]
                others = [tag for tag in tags if tag.casefold() != label.casefold()]
                chosen = rng.permutation(len(others))[: rng.integers(2, 5)]
                if concept not in files:
                    continue
                text = ", ".join([label, *(others[i] for i in sorted(chosen)), STYLES[style][language]])
                name = f"{concept}/{style}"
                group, subgroup = self.groups[concept]
                metadata = {"concept": concept, "style": style, "label": label, "language": language}
                metadata |= {"group": group, "subgroup": subgroup}
                yield Entry(id=name, unit=name, text=text, image=files[concept], metadata=metadata)


def _group(row: Mapping[str, Any]) -> tuple[str, str]:
    """Of one row of captions; a letter of a flag's country code has none."""
    if row.get("group") is None:
        return "letters", "letters"
    group = GROUPS[row["group"]]
    return group, f"{group} {row['subgroup']}"
