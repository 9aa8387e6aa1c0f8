"""Tokens of texts, pictures and sounds: what comes back, what is said of them, and what is refused."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import DataError, PrivacyRefused, UsageError
from sfumato.models.codecs import text_tokens
from sfumato.models.codecs.lattice import Lattice
from sfumato.models.codecs.picture_tokens import PictureTokens
from sfumato.models.codecs.sound_tokens import MelTokenCodec, MuLawCodec
from sfumato.models.codecs.text_tokens import END, ByteTexts, LoadedTexts, WordTexts
from sfumato.models.settings import Bytes, MelSpectrogram, MelTokens, MuLaw, PatchTokens, Tokenizer, Words
from sfumato.records import prompt

BYTES = ByteTexts(Bytes(longest=400))
WORDS = WordTexts(Words(words=("left", "the left", " lung", "left lung", "сердце"), longest=400))
anything = st.text(max_size=60).filter(lambda text: text == text.encode("utf-8", "ignore").decode())


# ---- texts ----


@pytest.mark.parametrize("codec", [BYTES, WORDS], ids=["bytes", "words"])
@settings(deadline=None, max_examples=40)
@given(text=anything)
def test_every_text_comes_back(codec, text):
    encoded, present = codec.encode([prompt(text=text)])
    assert present.tolist() == [True]
    assert codec.decode(encoded) == [text]


@pytest.mark.parametrize("codec", [BYTES, WORDS], ids=["bytes", "words"])
@settings(deadline=None, max_examples=40)
@given(tokens=st.lists(st.integers(-3, 300), max_size=40))
def test_whatever_was_drawn_is_a_text(codec, tokens):
    (text,) = codec.decode(torch.tensor([tokens], dtype=torch.int64))
    text.encode("utf-8")


def test_what_is_no_character_is_replaced_and_the_end_ends():
    assert BYTES.decode(torch.tensor([[*"né".encode()[:-1], END, *b"more"]])) == ["n\ufffd"]


def test_the_longest_piece_comes_first_and_the_rest_is_spelt():
    (tokens,) = WORDS.tokens(["the left lung, left?"])
    assert [WORDS.text([token]) for token in tokens] == ["the left", " lung", ",", " ", "left", "?"]
    assert tokens[2:4] == [ord(","), ord(" ")]
    (tokens,) = WORDS.tokens(["left lungs"])
    assert [WORDS.text([token]) for token in tokens] == ["left lung", "s"]


def test_a_missing_text_is_padding_and_an_empty_one_is_an_end():
    encoded, present = BYTES.encode([prompt(), prompt(text="")])
    assert present.tolist() == [False, True]
    assert (encoded[0] == BYTES.vocabulary).all()
    assert encoded[0].equal(BYTES.blank(1)[0])
    assert encoded[1, 0] == END
    assert (encoded[1, 1:] == BYTES.vocabulary).all()
    assert BYTES.decode(encoded) == ["", ""]


def test_a_long_text_is_cut_and_has_no_end():
    encoded, _ = ByteTexts(Bytes(longest=4)).encode([prompt(text="abcdef"), prompt(text="abc")])
    assert encoded.tolist() == [[97, 98, 99, 100], [97, 98, 99, END]]


@pytest.mark.parametrize("words", [(), ("a",), ("ab", "ab"), ("",)])
def test_a_list_of_no_use_is_refused(words):
    with pytest.raises(UsageError, match=r"words = .* · must be some, each once"):
        Words(words=words)


TEXTS = ["the heart is not enlarged", "the left lung", "no effusion, heart enlarged", "左肺 и сердце"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(text_tokens.fit(TEXTS, vocabulary=300, public=True), encoding="utf-8")
    return path


def test_a_tokenizer_from_the_disk_gives_back_every_text(folder):
    codec = LoadedTexts(Tokenizer(path=str(folder), public=True, longest=80))
    texts = [*TEXTS, "something that was never seen: ¿qué?", ""]
    encoded, _ = codec.encode([prompt(text=text) for text in texts])
    assert codec.decode(encoded) == texts
    assert codec.vocabulary == 301
    assert max(map(len, codec.tokens(TEXTS[:3]))) < 14  # pieces, not bytes
    assert codec.sha256 == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    LoadedTexts(Tokenizer(path=str(folder / "tokenizer.json"), public=True, sha256=codec.sha256))


def test_a_tokenizer_that_is_another_or_none_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"sha256 = 00 · .* has "):
        LoadedTexts(Tokenizer(path=str(folder), public=True, sha256="00"))
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"must be a tokenizer\.json, or a folder with one"):
            LoadedTexts(Tokenizer(path=str(path), public=True))


def test_a_private_vocabulary_is_refused(folder):
    with pytest.raises(UsageError, match=r"public = false · the vocabulary of .* shows what it was fitted to"):
        Tokenizer(path=str(folder))
    with pytest.raises(PrivacyRefused, match="a vocabulary fitted to private texts") as caught:
        text_tokens.fit(TEXTS, vocabulary=300, public=False)
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match="every byte must be in it"):
        text_tokens.fit(TEXTS, vocabulary=200, public=True)


@pytest.mark.parametrize("kind", ["bytes", "words", "tokenizer"])
def test_what_is_exported_cuts_texts_as_the_codec_does(kind, folder):
    from tokenizers import Tokenizer as Loaded

    loaded = LoadedTexts(Tokenizer(path=str(folder), public=True))
    codec = {"bytes": BYTES, "words": WORDS, "tokenizer": loaded}[kind]
    exported = Loaded.from_str(codec.exported(["<image:0>", "<bos>"]))
    texts = ["the left lung, left?", "сердце: left lungs\n\t", "naïve – 左", "", "<end> is a word here?"][:4]
    for text, tokens in zip(texts, codec.tokens(texts), strict=True):
        assert exported.encode(text, add_special_tokens=False).ids == tokens
        assert exported.decode(tokens) == text
    names = [text_tokens.END_WORD, "<image:0>", "<bos>"]
    assert [exported.token_to_id(name) for name in names] == [codec.end, codec.vocabulary, codec.vocabulary + 1]
    json.loads(codec.exported([]))


# ---- numbers on a lattice ----


@settings(deadline=None, max_examples=40)
@given(
    levels=st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=3),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tokens_are_in_their_ranges_and_numbers_off_by_half_a_step_at_most(levels, blocks, seed):
    told = sum(map(len, levels))
    lattice = Lattice(tuple(map(tuple, levels)), blocks, told + 1)
    values = torch.rand(6, blocks, told + 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tokens = lattice.encode(values)
    assert tokens.shape == (6, blocks * len(levels))
    for place, (first, last) in enumerate(lattice.ranges):
        assert ((tokens[:, place] >= first) & (tokens[:, place] < last)).all()
    back = lattice.decode(tokens)
    steps = torch.tensor([1.0 / count for group in levels for count in group])
    assert ((back - values)[:, :, :told].abs() <= steps + 1e-6).all()
    assert not back[:, :, told].any()
    assert lattice.encode(back).equal(tokens)
    of_tokens = lattice.coordinates()[tokens]  # what is said of each token is what it stands for
    told_by = of_tokens[:, :, len(levels) :].reshape(6, blocks, len(levels), -1).sum(2)
    torch.testing.assert_close(told_by, back)


def test_what_is_beyond_the_range_is_an_end_and_a_foreign_token_the_nearest():
    lattice = Lattice(((4,), (2, 3)), 1, 3)
    assert lattice.vocabulary == 10
    assert lattice.encode(torch.tensor([[[9.0, -9.0, 0.0]], [[-9.0, 9.0, 9.0]]])).tolist() == [[3, 5], [0, 9]]
    assert lattice.decode(torch.tensor([[9, 0]])).equal(lattice.decode(torch.tensor([[3, 4]])))


# ---- pictures ----


def gradient(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    colour = [128 + 80 * np.sin(2 * (rng.normal() * x + rng.normal() * y) + c) for c in range(channels)]
    return np.stack(colour, 2).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 8, 1), (16, 16, 3)])
def test_a_smooth_picture_comes_back_nearly(shape):
    codec = PictureTokens(PatchTokens(levels=(16, 7, 7), colour_levels=9), shape)
    pictures = [gradient(*shape, seed) for seed in range(5)]
    encoded, present = codec.encode([*(prompt(image=picture) for picture in pictures), prompt()])
    assert present.tolist() == [True] * 5 + [False]
    assert encoded.shape == (6, *codec.shape)
    assert encoded[5].equal(codec.blank(1)[0])
    assert encoded[:5].max() < codec.vocabulary
    decoded = codec.decode(encoded[:5])
    assert all(picture.shape == shape and picture.dtype == np.uint8 for picture in decoded)
    error = np.stack(decoded).astype(float) - np.stack(pictures)
    assert np.abs(error).mean() < 12
    again, _ = codec.encode([prompt(image=picture) for picture in decoded])
    assert (again == encoded[:5]).float().mean() > 0.9  # but for clipping and rounding


@pytest.mark.parametrize("channels", [1, 3])
def test_an_even_picture_is_told_by_its_level(channels):
    """Of a patch of one grey level every detail is the middle one, and the mean is right to half a step of 256 / 8."""
    codec = PictureTokens(PatchTokens(), (4, 4, channels))
    for level in (0, 15, 100, 255):
        picture = np.full((4, 4, channels), level, np.uint8)
        encoded, _ = codec.encode([prompt(image=picture)])
        assert len(codec.ranges) == (1 if channels == 1 else 2)
        (back,) = codec.decode(encoded)
        assert np.abs(back.astype(int) - level).max() <= 16
        assert back.std() == 0


def test_the_phantom_clinics_films_are_64_tokens_of_200():
    from sfumato.data.clinic import Clinic

    films = list(Clinic(patients=30, public=True))
    codec = PictureTokens(PatchTokens(), (32, 32, 1))
    encoded, _ = codec.encode(films)
    assert (codec.shape, codec.vocabulary) == ((64,), 200)
    error = np.stack(codec.decode(encoded)).astype(float) - np.stack([film.image for film in films])
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 20.5  # decibels


def test_a_picture_that_patches_do_not_tile_is_refused():
    with pytest.raises(UsageError, match=r"patch = 4 · must divide the picture's sides, 6 and 8"):
        PictureTokens(PatchTokens(), (6, 8, 1))
    with pytest.raises(DataError, match=r"image\.shape"):
        PictureTokens(PatchTokens(), (8, 8, 1)).encode([prompt(image=np.zeros((4, 4, 1), np.uint8))])
    with pytest.raises(UsageError, match="levels"):
        PictureTokens(PatchTokens(patch=1, levels=(4, 4)), (4, 4, 1)).encode([])


def test_neighbours_on_the_film_are_neighbours_in_what_is_said_of_places():
    codec = PictureTokens(PatchTokens(), (12, 8, 1))
    places = codec.places()
    assert places.shape == (6, 3 + 2 + 1)
    alike = places @ places.T
    assert alike[0].tolist() == [3, 2, 2, 1, 2, 1]  # itself; its row; its column


# ---- sounds ----


def test_a_sound_comes_back_nearly_and_quiet_ones_better():
    codec = MuLawCodec(MuLaw(), 400, 4000)
    loud = np.sin(np.arange(400) / 5).astype(np.float32)
    sounds = [loud, loud * 0.01, loud[:100]]
    encoded, present = codec.encode([*(prompt(audio=s, sample_rate=4000) for s in sounds), prompt()])
    assert present.tolist() == [True, True, True, False]
    assert encoded[:3].max() < codec.vocabulary == 256
    back = codec.decode(encoded[:3])
    assert back[0].dtype == np.float32
    errors = [np.abs(back[0] - sounds[0]).max(), np.abs(back[1] - sounds[1]).max()]
    assert errors[0] < 0.025
    assert errors[1] < 0.0006
    assert np.abs(back[2][100:]).max() < 1e-4  # silence
    assert codec.encode([prompt(audio=back[0], sample_rate=4000)])[0][0].equal(encoded[0])


@pytest.mark.parametrize("change", [{"sample_rate": 8000}, {"audio": np.full(4, np.nan, np.float32)}])
def test_a_sound_of_another_kind_is_refused(change):
    record = replace(prompt(audio=np.zeros(4, np.float32), sample_rate=4000), **change)
    with pytest.raises(DataError, match="record prompt: audio"):
        MuLawCodec(MuLaw(), 4, 4000).encode([record])


def test_a_spectrogram_comes_back_by_its_outline():
    """A tone of a low and of a high pitch: each frame's loudness to half a step, and the bands' order of loudness kept."""
    codec = MelTokenCodec(MelTokens(levels=((16, 9), (9, 9))), 4000, 4000)
    time = np.arange(4000) / 4000
    sounds = [np.sin(2 * np.pi * hertz * time).astype(np.float32) * 0.5 for hertz in (150, 1200)]
    encoded, present = codec.encode([*(prompt(audio=sound, sample_rate=4000) for sound in sounds), prompt()])
    bands, frames = codec.continuous.shape
    assert present.tolist() == [True, True, False]
    assert encoded.shape == (3, 2 * frames)
    assert encoded[2].equal(codec.blank(1)[0])
    assert encoded[:2].max() < codec.vocabulary == 16 * 9 + 81
    told = codec.continuous.encode([prompt(audio=sound, sample_rate=4000) for sound in sounds])[0]
    again = codec.lattice.decode(encoded[:2]) * codec._range
    true = told.reshape(2, bands, frames).mean(1)
    assert (again[:, :, 0] - true).abs().max() <= 1 / 16 + 1e-5
    made = codec.decode(encoded[:2])
    assert all(sound.shape == (4000,) and np.abs(sound).max() <= 1 for sound in made)
    middle = [np.abs(np.fft.rfft(sound)) @ np.arange(2001) / np.abs(np.fft.rfft(sound)).sum() for sound in made]
    assert middle[0] < 0.75 * middle[1]


def test_tokens_say_what_is_kept_of_a_spectrogram():
    with pytest.raises(UsageError, match=r"model.audio.mel.kept = \(4, 4\)"):
        MelTokens(mel=MelSpectrogram(kept=(4, 4)))


# ---- the phantom clinic's words ----


def test_the_phrase_book_spells_a_history_in_few_pieces():
    """45 tokens on average, 60 at most, and no letter of an English history alone but in numbers."""
    from sfumato.data import histories
    from sfumato.data.clinic import Clinic

    codec = WordTexts(Words(words=histories.pieces("en"), longest=60))
    found = list(Clinic(patients=60, public=True))
    tokens = codec.tokens([record.text or "" for record in found])
    assert np.mean([len(row) for row in tokens]) < 50
    assert max(map(len, tokens)) < 60
    assert codec.decode(codec.encode(found)[0]) == [record.text for record in found]
    alone = {chr(token) for row in tokens for token in row if token < 256}
    assert not {letter for letter in alone if letter.isalpha()} - {"A", "a"}
    for language in ("ru", "zh"):
        assert len(histories.pieces(language)) > 100
