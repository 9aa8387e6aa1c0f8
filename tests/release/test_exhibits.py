"""What the report shows of samples of every modality, and what it refuses to put in."""

import json

import numpy as np
import pytest

from sfumato.models.generative import Direction
from sfumato.records import Record, generated
from sfumato.release import exhibits, page
from sfumato.training.samples import Samples, write_wav

DIRECTIONS = (
    Direction(("text",), ("image",)),
    Direction(("text",), ("audio",)),
    Direction(("image",), ("text",)),
)


class Model:
    def sample(self, given, wanted, *, seed):
        values = {
            "image": np.full((8, 8, 1), 90, np.uint8),
            "audio": np.sin(np.arange(800) * 0.2).astype(np.float32),
            "text": "<script>made</script>",
        }
        return [generated(row, {name: values[name] for name in wanted}, 800) for row in range(len(given))]


@pytest.fixture
def run(tmp_path):
    public = [
        Record(
            id=str(i), unit=str(i), text=f"asked {i}", image=np.full((8, 8, 1), 10 * i, np.uint8),
            audio=np.zeros(800, np.float32), sample_rate=800,
        )
        for i in range(4)
    ]  # fmt: skip
    folder = tmp_path / "many" / "v1"
    samples = Samples(folder / "samples", DIRECTIONS, public)
    samples.begin()
    samples.picture(10, Model())
    samples.write("final", Model())
    (folder / "recipe.yaml").write_text("name: many\nprivacy: {mechanism: none}\n")
    return folder


def test_every_direction_is_shown_and_the_page_stands_alone(run):
    html = page.render(run)
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script>" not in html
    assert html.count("data:audio/wav;base64,") == 8  # four made, four real
    assert html.count("&lt;script&gt;made&lt;/script&gt;") == 4
    for words in ("text→audio", "image→text", "asked 3", "as spectrograms", "media-src data:"):
        assert words in html
    values = page.as_json(run)
    assert [entry["direction"] for entry in values["samples"]] == ["text→image", "text→audio", "image→text"]
    assert values["pictures"]["final"] == "final.png" and values["pictures"]["captions"] == [
        f"asked {i}" for i in range(4)
    ]
    assert values["samples"][2]["told"] == [f"given-image-to-text-{i:02d}.png" for i in range(4)]


def test_sounds_beyond_the_bounds_stay_in_the_run(run, monkeypatch):
    write_wav(run / "samples" / "final-text-to-audio-00.wav", np.zeros(exhibits.MAX_SOUND), 800)
    (run / "samples" / "final-text-to-audio-01.wav").write_bytes(b"no sound")
    html = page.render(run)
    assert html.count("data:audio/wav;base64,") == 6
    assert "final-text-to-audio-00.wav" in html and "final-text-to-audio-01.wav" in html  # named
    monkeypatch.setattr(exhibits, "MAX_SOUNDS", 5_000)  # room for two
    assert page.render(run).count("data:audio/wav;base64,") == 2


def test_an_index_cannot_name_files_elsewhere(run):
    index = json.loads((run / "samples" / "index.json").read_text())
    index[1]["slug"] = "/../../../secret"
    (run / "samples" / "index.json").write_text(json.dumps(index))
    assert exhibits.directions(run)[1]["slug"] == "-unknown"
    assert exhibits.directions(run)[1]["parts"][0]["final"] is None


def test_the_public_loss_is_drawn_and_held_back_where_nothing_covers_it(run):
    looks = [{"step": s, "public_loss": 3 - 0.1 * s, "covered_by": "internal"} for s in (1, 2, 3)]
    (run / "quality.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks) + '{"st')
    assert "loss on public records" in page.render(run)
    assert len(page.as_json(run)["looks"]) == 3
    assert page._looks(run, public=True) == []


def test_figures_are_grouped_by_direction():
    def figure(name, direction):
        return {"name": name, "value": 0.5, "direction": direction, "baseline": {"shuffled conditions": 0.1}}

    groups = page._quality_groups(
        {
            "figures": [
                figure("Fréchet distance", "text→image"), figure("kappa: side", "text→image"),
                figure("image→text: bits per byte", "image→text"), figure("image→text: image→text R@1", "image→text"),
                figure("image→text: train on synthetic, accuracy: words", "image→text"),
            ]
        }
    )  # fmt: skip
    assert [(g["title"].split(": ")[0], [f["name"] for f in g["figures"]]) for g in groups] == [
        ("text→image", ["kappa: side"]), ("text→image", ["Fréchet distance"]),
        ("image→text", ["image→text R@1"]), ("image→text", ["bits per byte"]),
        ("image→text", ["train on synthetic, accuracy: words"]),
    ]  # fmt: skip
    assert groups[0]["figures"][0]["shuffled"] == 0.1
