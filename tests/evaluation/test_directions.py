"""Every direction of the clinic, measured of generators whose quality is known."""

import numpy as np
import pytest

from sfumato.data.clinic import FACTS as CLINIC
from sfumato.data.clinic import Clinic
from sfumato.errors import UsageError
from sfumato.evaluation import report
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.generative import Direction
from sfumato.records import MODALITIES, generated

SETTINGS = EvaluationSettings(samples=90, judge_seconds=600)
ALL = (
    Direction(("text",), ("audio",)),
    Direction(("audio",), ("text",)),
    Direction(("image",), ("text",)),
    Direction((), ("image", "text")),
)


class Copier:
    """Finds the real record that it is told a part of, and gives the rest of it: as good as real. ``deaf``: of another."""

    directions = ALL

    def __init__(self, records, deaf=False):
        self.records, self.deaf = records, deaf
        self.told = []

    def sample(self, given, wanted, *, seed):
        rng = np.random.default_rng(seed)
        made = []
        for row, prompt in enumerate(given):
            self.told.append({name for name in MODALITIES if getattr(prompt, name) is not None})
            real = self._found(prompt)
            if self.deaf or real is None:
                real = self.records[rng.integers(len(self.records))]
            made.append(generated(row, {name: getattr(real, name) for name in wanted}, 4000))
        return made

    def _found(self, prompt):
        for real in self.records:
            if prompt.text is not None and prompt.text == real.text:
                return real
            if any(
                getattr(prompt, n) is not None and getattr(prompt, n) is getattr(real, n) for n in ("image", "audio")
            ):
                return real
        return None


@pytest.fixture(scope="module")
def public():
    return list(Clinic(patients=90, audio=True, public=True))


def by_name(quality):
    return {figure.name: figure for figure in quality.figures}


@pytest.fixture(scope="module")
def measured(public):
    model = Copier(public)
    quality = report.evaluate(
        model, public, CLINIC, EvaluationSettings(samples=90, judge_seconds=600, directions=("text->audio", "audio→text")),
        twin=Copier(public, deaf=True),
    )  # fmt: skip
    return model, quality


def test_sounds_are_measured_on_the_waveform_against_what_was_asked(measured):
    figures = by_name(measured[1])
    rate = figures["text→audio: heart rate: correlation"]
    assert rate.value > 0.9 and rate.value == pytest.approx(rate.baseline["real held-out"])
    assert abs(rate.baseline["shuffled captions"]) < 0.4 and rate.low <= rate.value <= rate.high
    error = figures["text→audio: heart rate: mean error"]
    assert error.better == "lower" and error.value < 4 < 10 < error.baseline["shuffled captions"]
    rough = figures["text→audio: kappa: murmur, by energy between the beats"]
    assert rough.value > 0.85 and abs(rough.baseline["shuffled captions"]) < 0.4
    assert {f.direction for f in measured[1].figures} == {"text→audio", "audio→text"}
    distance = figures["text→audio: Fréchet distance"]
    assert distance.value < 3 * distance.baseline["real held-out"] and "spectrograms" in distance.extractor
    useful = figures["text→audio: train on synthetic, accuracy: logistic regression"]
    assert {"real held-out", "chance"} <= set(useful.baseline)


def test_a_deaf_twin_agrees_by_chance(measured):
    figures = by_name(measured[1])
    for name in (
        "text→audio: heart rate: correlation",
        "audio→text: kappa: murmur",
        "audio→text: heart rate: correlation",
    ):
        assert abs(figures[name].baseline["non-private twin"]) < 0.4
        assert figures[name].value > 0.9


def test_texts_are_read_and_compared(measured):
    figures = by_name(measured[1])
    assert figures["audio→text: kappa: wheeze"].value > 0.9
    assert "audio→text: kappa: side" not in figures  # no sound tells the side
    rouge = figures["audio→text: ROUGE-L"]
    assert rouge.value == 1 > 0.7 > rouge.baseline["shuffled conditions"]
    for name in ("bits per byte", "self-similarity", "distinct-2"):
        figure = figures[f"audio→text: {name}"]
        assert figure.value == pytest.approx(figure.baseline["real held-out"])
        assert figure.low <= figure.value <= figure.high


def test_the_model_is_told_the_condition_and_nothing_else(measured):
    assert {frozenset(told) for told in measured[0].told} == {frozenset({"text"}), frozenset({"audio"})}


def test_parts_of_a_joint_sample_are_held_against_each_other(public):
    quality = report.evaluate(
        Copier(public), public, CLINIC,
        EvaluationSettings(samples=60, judge_seconds=600, directions=("nothing→image+text",), usefulness=()),
    )  # fmt: skip
    figures = by_name(quality)
    assert set(figures) == {
        "nothing→image+text: Fréchet distance (image)", "nothing→image+text: bits per byte (text)",
        "nothing→image+text: self-similarity (text)", "nothing→image+text: distinct-2 (text)",
        "nothing→image+text: image and text agree, kappa: mean",
    }  # fmt: skip
    together = figures["nothing→image+text: image and text agree, kappa: mean"]
    assert together.value > together.baseline["shuffled conditions"] + 0.2


def test_directions_are_chosen_by_name_and_unknown_ones_refused():
    assert report.chosen(ALL, ("image -> text", "image→text")) == [ALL[2]]
    assert report.chosen(ALL, ()) == list(ALL)
    with pytest.raises(UsageError, match=r"evaluation.directions = text→image · this model knows text→audio"):
        report.chosen(ALL, ("text→image",))


@pytest.mark.parametrize(
    ("wanted", "made", "words"),
    [
        ("text", {"text": None}, "text = NoneType"),
        ("audio", {"audio": np.zeros(4000, np.float32)}, "audio = float32"),
    ],
)
def test_what_is_not_like_the_public_records_is_refused(public, wanted, made, words):
    class Wrong:
        directions = (Direction(("image",), (wanted,)),)

        def sample(self, given, wanted, *, seed):
            return [generated(row, made, 8000) for row in range(len(given))]

    with pytest.raises(UsageError, match=words):
        report.evaluate(Wrong(), public, CLINIC, SETTINGS)
