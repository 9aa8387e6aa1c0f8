"""WordNet, e-mails, prompts, stamps and icons, on small stand-ins of the same format."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from sfumato.data.checking import check
from sfumato.data.prepare import load
from sfumato.data.settings import DataSettings
from sfumato.data.spoken import STAMP_RATE, captions_of
from sfumato.data.words import WordNet, body_of
from sfumato.errors import DataError, MissingDependency, UsageError

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is perceived or known
00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a general concept
00002684 03 n 0a object 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 physical_object 0 000 | a tangible entity; "rackets | balls"
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "data.verb").write_text("00001 29 v 01 entity 0 000 01 + 02 00 | to be | \n")
    (tmp_path / "data.adj").write_text("00003 00 a 01 ajar(p) 0 000 | slightly open  \n")
    (tmp_path / "data.adv").write_text("")
    return tmp_path


def test_wordnet_gives_a_word_its_part_and_its_gloss(wordnet):
    prepared = load(DataSettings(source="wordnet", path=str(wordnet), public_units=0), unit="record")
    assert [r.text for r in prepared.private] == [
        "entity (noun): that which is perceived or known",
        "abstraction (noun): a general concept",
        'object (noun): a tangible entity; "rackets | balls"',
        "entity (verb): to be |",
        "ajar (adjective): slightly open",
    ]
    assert prepared.private[1].metadata["words"] == ["abstraction", "abstract entity"]
    assert len(prepared.private[2].metadata["words"]) == 10
    assert prepared.facts["part"] == ("noun", "verb", "adjective", "adverb")
    assert all(r.image is None and r.audio is None for r in prepared.private)


def test_wordnet_is_split_by_word(wordnet):
    prepared = load(DataSettings(source="wordnet", path=str(wordnet), public_units=2), unit="record")
    private, public = ({r.metadata["concept"] for r in part} for part in (prepared.private, prepared.public))
    assert (len(private), len(public), private & public) == (2, 2, set())


def test_a_line_that_is_not_wordnets_is_named(wordnet):
    (wordnet / "data.adv").write_text("00003 00 a zz ajar\n")
    with pytest.raises(DataError, match=r"data\.adv:1"):
        list(WordNet(wordnet))


MAILS = {
    "easy-ham-1/00001.aa.txt": b"From: Ann <Ann@Example.org>\nSubject: Re:\n  lunch\nX-Secret: header\n\nAt noon?\n",
    "easy-ham-1/00002.bb.txt": b"From: ann@example.org\nSubject: two\nContent-Type: multipart/mixed; boundary=b\n\n"
    b"--b\nContent-Type: text/plain; charset=no-such\n\nplain caf\xe9\n--b\n"
    b"Content-Type: text/html\n\n<p>html</p>\n--b\nContent-Type: image/png\nContent-Transfer-Encoding: base64\n\nAAAA\n--b--\n",
    "spam-2/00003.cc.txt": b"From: =?koi8-r?B?8NLJ18XU?= <spam@x.com>\nSubject: =?utf-8?q?h=C3=A9?=\nContent-Type: text/html\n\n"
    b"<html><style>p{}</style><script>steal()</script><p>Buy &amp; <b>win</b></p></html>\n",
    "hard-ham-1/00004.dd.txt": b"no headers at all",
}


@pytest.fixture
def mails(tmp_path: Path) -> Path:
    for name, body in MAILS.items():
        file = tmp_path / "mails" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    return tmp_path


def test_emails_are_subject_and_words_and_belong_to_their_sender(mails):
    data = DataSettings(source="emails", path=str(mails), public_units=0)
    records = load(data, unit="person").private
    assert [r.text for r in records] == [
        "Subject: Re: lunch\n\nAt noon?",
        "Subject: two\n\nplain café",
        "Subject: \n\nno headers at all",
        "Subject: hé\n\nBuy &\nwin",
    ]
    assert [r.unit for r in records] == [
        "ann@example.org",
        "ann@example.org",
        "nobody known, hard-ham-1/00004",
        "spam@x.com",
    ]
    assert [r.metadata["facts"]["kind"] for r in records] == ["easy ham", "easy ham", "hard ham", "spam"]
    assert not any("Secret" in r.text or "steal" in r.text for r in records)
    assert len({r.unit for r in load(data, unit="record").private}) == 4
    with pytest.raises(UsageError, match="names no persons"):
        load(DataSettings(source="wordnet", path=str(mails)), unit="person")


def test_a_mail_of_nothing_has_no_words():
    import email

    assert body_of(email.message_from_string("Subject: x\nContent-Type: image/png\n\nAAAA")) == ""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "wav" / "digits").mkdir(parents=True)
    for name in ("hello", "beep", "silent", "digits/1", "dot"):
        soundfile.write(tmp_path / "wav" / f"{name}.wav", np.linspace(-0.1, 0.1, 800), 8000)
    (tmp_path / "transcripts.txt").write_text(
        "; Core sounds\n\nhello: Hello: welcome.\nbeep: [a tone]\nsilent: (1 second of silence)\ndigits/1: one\ndot: dot [.]\n"
    )
    return tmp_path


def test_prompts_are_speech_with_its_transcript(prompts):
    prepared = load(DataSettings(source="prompts", path=str(prompts), public_units=0), unit="record")
    assert {r.id: r.text for r in prepared.private} == {"digits/1": "one", "dot": "dot", "hello": "Hello: welcome."}
    assert all((r.sample_rate, len(r.audio)) == (8000, 800) for r in prepared.private)
    assert prepared.card["modalities"] == ["text", "audio"]
    assert "her voice" in prepared.card["warning"]
    (prompts / "transcripts.txt").write_text("hello: Hello.\n")
    with pytest.raises(DataError, match="has no transcript"):
        load(DataSettings(source="prompts", path=str(prompts), public_units=0), unit="record")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps" / "animals"
    root.mkdir(parents=True)
    for number, name in enumerate(("frog", "frog-1", "owl", "bare")):
        Image.new("RGB", (20, 20), (60 * number, 100, 0)).save(root / f"{name}.png")
    for name in ("frog", "frog-1", "owl"):
        (root / f"{name}.txt").write_text(f"A {name}.\nde.utf8=Ein {name}\nru.utf8=Зверь {name}.\nzh_CN.utf8=动物\n")
    time = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(root / "frog_desc.ogg", np.stack([tone, tone], 1), 44_100)
    soundfile.write(root / "owl_desc_ru.wav", tone[:22_050], 22_050)
    return tmp_path


def test_stamps_are_pictures_with_captions_split_by_thing(stamps):
    data = DataSettings(source="stamps", path=str(stamps), channels=3, public_units=1)
    prepared = load(data, unit="record")
    assert {r.text for r in [*prepared.private, *prepared.public]} == {"A frog.", "A frog-1.", "A owl."}
    private, public = ({r.metadata["concept"] for r in part} for part in (prepared.private, prepared.public))
    assert private | public == {"animals/frog", "animals/owl"}
    assert not private & public
    assert prepared.facts == {"category": ("animals",)}


def test_spoken_stamps_have_one_rate_and_one_channel_in_the_asked_language(stamps):
    data = DataSettings(
        source="stamps", path=str(stamps), modalities=("text", "image", "audio"), public_units=0, languages=("en", "ru")
    )
    records = load(data, unit="record").private
    assert {r.id: r.text for r in records} == {"animals/frog": "A frog.", "animals/owl": "Зверь owl."}
    assert {r.sample_rate for r in records} == {STAMP_RATE}
    frog = next(r for r in records if r.id.endswith("frog"))
    assert abs(len(frog.audio) - STAMP_RATE) < 400
    power = np.abs(np.fft.rfft(frog.audio))
    assert abs(power.argmax() * STAMP_RATE / len(frog.audio) - 440) < 3
    assert captions_of(stamps / "stamps" / "animals" / "owl.txt")["zh"] == "动物"


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path d="M0 0H12V24H0Z" fill="{}"/></svg>'


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    for pack, names in {"mdi": ("ship", "old"), "lucide": ("anchor",), "openmoji": ("2693", "1F44B-1F3FB")}.items():
        (tmp_path / pack).mkdir()
        for name in names:
            (tmp_path / pack / f"{name}.svg").write_text(SVG.format("black" if pack != "openmoji" else "#00f"))
    mdi = [
        {"name": "ship", "aliases": ["big-boat", "ship"], "deprecated": False},
        {"name": "old", "aliases": [], "deprecated": True},
    ]
    wave = {"annotation": "wave", "tags": "hand", "openmoji_tags": "", "skintone": "1"}
    anchor = {"annotation": "anchor", "tags": "ship, tool", "openmoji_tags": "boat", "skintone": ""}
    (tmp_path / "mdi.json").write_text(json.dumps(mdi))
    (tmp_path / "lucide.json").write_text(json.dumps({"anchor": ["ship", "harbor"]}))
    (tmp_path / "openmoji.json").write_text(
        json.dumps([{"hexcode": "1F44B-1F3FB", **wave}, {"hexcode": "2693", **anchor}])
    )
    return tmp_path


def test_icons_are_drawn_at_the_asked_size_with_name_tags_and_style(icons):
    pytest.importorskip("resvg_py")
    data = DataSettings(source="icons", path=str(icons), channels=3, image_size=48, public_units=1)
    prepared = load(data, unit="record")
    together = [*prepared.private, *prepared.public]
    assert {r.text for r in together} == {
        "ship, big boat, glyph",
        "anchor, ship, harbor, outline",
        "anchor, ship, tool, boat, colour",
    }
    assert len({r.metadata["concept"] for r in prepared.public}) == 1
    held = {r.id: (r.metadata["tags"], r.metadata.get("code")) for r in together}
    assert held["mdi/ship"] == (["big boat", "ship"], None)
    assert held["openmoji/2693"] == (["ship", "tool", "boat"], "2693")
    for r in together:
        assert r.image.shape == (48, 48, 3)
        assert (r.image[:, 30:] == 255).all()
        assert r.image[24, 10].tolist() == ([0, 0, 255] if "colour" in r.text else [0, 0, 0])
    (icons / "mdi" / "ship.svg").write_text("<svg")
    assert [p["code"] for p in check(data)["problems"] if p["level"] == "error"] == ["unreadable"]


def test_without_the_renderer_the_package_is_named(icons, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependency, match="resvg-py = missing"):
        load(DataSettings(source="icons", path=str(icons)), unit="record")


@pytest.mark.parametrize(
    ("source", "lacking"),
    [("wordnet", "data.adj"), ("emails", "mails"), ("prompts", "wav"), ("stamps", "stamps"), ("icons", "mdi")],
)
def test_a_folder_that_lacks_the_files_is_told_which(source, lacking, tmp_path):
    with pytest.raises(DataError, match=f"lacks {lacking}"):
        load(DataSettings(source=source, path=str(tmp_path)), unit="record")
