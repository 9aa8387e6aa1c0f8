"""``sfumato generate`` in all directions, of a model that makes something known."""

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import generating
from sfumato.errors import DataError, UsageError
from sfumato.models.generative import Direction
from sfumato.models.shapes import Shapes
from sfumato.records import generated
from sfumato.training.samples import write_wav

RATE = 800


class Model:
    """Says what it was told."""

    directions = (
        Direction(("text",), ("image",)),
        Direction(("image", "text"), ("audio",)),
        Direction(("audio",), ("text", "image")),
        Direction((), ("text",)),
    )
    shapes = Shapes(picture=(8, 8, 1), samples=400, sample_rate=RATE)

    def __init__(self):
        self.told = []

    def sample(self, given, wanted, *, seed):
        self.told += given
        values = {"text": f"seed {seed}", "image": np.full((8, 8, 1), seed, np.uint8), "audio": np.full(400, 0.5)}
        return [generated(row, {name: values[name] for name in wanted}, RATE) for row in range(len(given))]


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sfumato.json").write_text("{}")
    found = Model()
    monkeypatch.setattr("sfumato.models.model.load", lambda folder: found)
    return found


@pytest.fixture
def files(tmp_path):
    Image.fromarray(np.full((20, 16, 3), 200, np.uint8)).save(tmp_path / "a.png")
    write_wav(tmp_path / "a.wav", np.sin(np.arange(1600) * 0.02), 1600)
    return tmp_path


def names(answer):
    return [Path(file).name for file in answer["files"]]


def test_a_picture_of_a_text_by_default(model, tmp_path):
    answer = generating.generate(tmp_path, texts=["a", "b"], count=2, out=tmp_path / "out", seed=9)
    assert names(answer) == ["000-000.png", "000-001.png", "001-000.png", "001-001.png"]
    assert (answer["direction"], answer["watermarked"], answer["texts"]) == ("text→image", False, ["a", "a", "b", "b"])
    assert np.asarray(Image.open(answer["files"][0])).max() == 9


def test_a_picture_is_told_as_the_model_takes_it_beside_a_text(model, files):
    answer = generating.generate(files, texts=["a"], images=[files / "a.png"], out=files / "out")
    assert (names(answer), answer["direction"]) == (["000-000.wav"], "text+image→audio")
    assert model.told[0].image.shape == (8, 8, 1) and model.told[0].text == "a"
    with wave.open(answer["files"][0]) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 400)


def test_a_sound_is_resampled_cut_and_told(model, files):
    answer = generating.generate(files, audios=[files / "a.wav"], want=["text"], out=files / "out", seed=4)
    assert names(answer) == ["000-000.txt"]
    assert Path(answer["files"][0]).read_text() == "seed 4\n" and answer["made"] == ["seed 4"]
    told = model.told[0]
    assert (told.sample_rate, told.audio.shape) == (RATE, (400,))
    expected = np.sin(np.arange(400) * 0.04)  # every second sample of the file
    assert np.abs(told.audio - expected)[20:-20].max() < 0.02
    joint = generating.generate(files, audios=[files / "a.wav"], out=files / "joint")
    assert sorted(names(joint)) == ["000-000.png", "000-000.txt"]


def test_nothing_is_told_where_a_model_needs_nothing(model, tmp_path):
    assert generating.generate(tmp_path, count=3, out=tmp_path / "out")["direction"] == "nothing→text"


def test_the_best_weights_of_a_run_can_be_named(model, tmp_path):
    assert generating.model_folder(tmp_path) == (tmp_path / "model").resolve()
    assert generating.model_folder(tmp_path / "model") == (tmp_path / "model").resolve()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"texts": ["a"], "count": 0}, "count = 0"),
        ({"texts": ["a"], "want": ["video"]}, "want = video · must be one of text, image, audio"),
        ({"texts": ["a"], "want": ["text"]}, r"direction = text→text · this model knows text→image"),
        ({"texts": ["a", "b", "c"], "images": ["x", "y"]}, "told = 3 of text, 2 of image · must be equally many"),
    ],
)
def test_what_does_not_fit_is_refused(model, files, asked, words):
    with pytest.raises(UsageError, match=words):
        generating.generate(files, out=files / "out", **asked)
    assert not (files / "out").exists()


def test_what_the_model_does_not_know_and_broken_files_are_refused(model, files, monkeypatch):
    with pytest.raises(UsageError, match="direction = text\\+audio→anything"):
        generating.generate(files, texts=["a"], audios=[files / "a.wav"], out=files / "out")
    (files / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        generating.generate(files, images=[files / "broken.png"], out=files / "out")
    with pytest.raises(DataError, match="does not exist"):
        generating.generate(files, audios=[files / "none.wav"], out=files / "out")
    monkeypatch.setattr(Model, "directions", Model.directions[:2])
    with pytest.raises(UsageError, match="told = nothing"):
        generating.generate(files, out=files / "out")
    monkeypatch.setattr(Model, "shapes", Shapes(samples=400, sample_rate=RATE))
    with pytest.raises(UsageError, match="this model has no pictures"):
        generating.generate(files, images=[files / "a.png"], out=files / "out")
