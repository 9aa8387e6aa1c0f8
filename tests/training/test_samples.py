"""What a model makes, written to be looked at and listened to."""

import json
import wave

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import OutsideError
from sfumato.models.generative import Direction
from sfumato.records import Record, generated
from sfumato.training.samples import Samples, one_line, slug, write_grid, write_wav

RATE = 2000
DIRECTIONS = (
    Direction(("text",), ("image",)),
    Direction(("image",), ("text",)),
    Direction(("text",), ("audio",)),
    Direction((), ("image", "text")),
)


class Model:
    """Makes of what it is told: grey as long as the text, a tone, the brightness in words."""

    directions = DIRECTIONS

    def __init__(self):
        self.asked = []

    def sample(self, given, wanted, *, seed):
        self.asked.append(([(r.text, None if r.image is None else int(r.image[0, 0, 0])) for r in given], wanted, seed))
        made = []
        for row, record in enumerate(given):
            values = {
                "image": np.full((4, 4, 1), len(record.text or ""), np.uint8),
                "audio": np.sin(np.arange(RATE // 2) * 0.3).astype(np.float32),
                "text": f"made\n{0 if record.image is None else record.image[0, 0, 0]}",
            }
            made.append(generated(row, {name: values[name] for name in wanted}, RATE))
        return made


def records(count, audio=True):
    return [
        Record(
            id=str(i), unit=str(i // 2), text="x" * (i + 1), image=np.full((4, 4, 1), i, np.uint8),
            audio=np.zeros(RATE // 2, np.float32) if audio else None, sample_rate=RATE if audio else None,
        )
        for i in range(count)
    ]  # fmt: skip


def test_the_same_examples_and_seed_each_time_one_record_a_unit(tmp_path):
    model, samples = Model(), Samples(tmp_path, DIRECTIONS[:1], records(6), seed=7)
    samples.picture(12, model)
    samples.write("final", model)
    told = [("x", None), ("xxx", None), ("xxxxx", None)]  # of each unit the first, and its text alone
    assert model.asked == [(told, ("image",), 7)] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.png", "step-000012.png"]


def test_every_direction_has_its_files(tmp_path):
    samples = Samples(tmp_path, DIRECTIONS, records(4))
    samples.begin()
    samples.write("final", Model())
    names = {p.name for p in tmp_path.iterdir()}
    assert {"final.png", "real.png", "captions.json", "index.json"} <= names
    assert {"final-image-to-text.txt", "real-image-to-text.txt", "given-image-to-text-00.png"} <= names
    assert {"final-text-to-audio.png", "final-text-to-audio-00.wav", "final-text-to-audio-01.wav"} <= names
    assert {"final-nothing-to-image-text-image.png", "final-nothing-to-image-text-text.txt"} <= names
    assert (tmp_path / "final-image-to-text.txt").read_text() == "made 0\nmade 2\n"
    assert json.loads((tmp_path / "captions.json").read_text()) == ["x", "xxx"]
    index = json.loads((tmp_path / "index.json").read_text())
    assert [(entry["direction"], entry["slug"]) for entry in index] == [
        ("text→image", ""), ("image→text", "-image-to-text"), ("text→audio", "-text-to-audio"),
        ("nothing→image+text", "-nothing-to-image-text"),
    ]  # fmt: skip
    assert index[2]["texts"] == ["x", "xxx"] and index[1]["texts"] == []


def test_a_direction_without_public_examples_is_left_out(tmp_path):
    model, samples = Model(), Samples(tmp_path / "samples", DIRECTIONS, records(4, audio=False))
    assert [shown.name for shown in samples.shown] == ["text→image", "image→text", "nothing→image+text"]
    Samples(tmp_path / "samples", DIRECTIONS, []).picture(1, model)
    assert not model.asked
    assert not (tmp_path / "samples").exists()


def test_a_wav_holds_16_bits_and_cuts_what_is_too_loud(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0.0, 0.5, -1.0, 3.0, np.nan]), RATE)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        values = np.frombuffer(file.readframes(5), "<i2")
    assert values.tolist() == [0, 16384, -32767, 32767, 0]
    with pytest.raises(OutsideError, match=r"sound = .* · could not be written"):
        (tmp_path / "file").write_text("")
        write_wav(tmp_path / "file" / "a.wav", np.zeros(3), RATE)


def test_a_line_of_text_stays_one_line():
    assert one_line("a\r\nb\u2028c\x1b[2J ") == "a b c [2J"
    assert slug(("text",), ("image",)) == "" and slug((), ("audio",)) == "-nothing-to-audio"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_picture_in_its_place(tmp_path, channels):
    pictures = np.stack([np.full((4, 5, channels), 40 * i, np.uint8) for i in range(5)])
    write_grid(tmp_path / "grid.png", pictures, columns=3, scale=1)
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image.convert("L"))
    assert grid.shape == (2 * 4 + 2, 3 * 5 + 2 * 2)
    for i in range(5):
        top, left = i // 3 * 6, i % 3 * 7
        assert (grid[top : top + 4, left : left + 5] == 40 * i).all()
    assert not list(tmp_path.glob("*.part"))


def test_small_pictures_are_enlarged(tmp_path):
    write_grid(tmp_path / "grid.png", np.zeros((1, 8, 8, 1), np.uint8), columns=1)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (96, 96)


def test_a_picture_that_cannot_be_written_is_an_outside_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError, match=r"picture = .* · could not be written"):
        write_grid(tmp_path / "file" / "grid.png", np.zeros((1, 8, 8, 1), np.uint8), columns=1)
