"""The public loss while training: lines, the best weights, a fall that is said once."""

import json

import numpy as np
import pytest
import torch

from sfumato.data.clinic import FACTS, Clinic
from sfumato.evaluation import report, watching
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.evaluation.watching import QualityWatch, history, note
from sfumato.models import model as models
from sfumato.models.settings import Cosine, Diffusion, HashedWords, Mlp, ModelSettings, Sampling

TINY = ModelSettings(
    image=Cosine(kept=6),
    text=HashedWords(buckets=64, width=8),
    backbone=Mlp(width=16, depth=1),
    objective=Diffusion(noise_multiplicity=1),
    sampling=Sampling(steps=2),
)


@pytest.fixture(scope="module")
def public():
    return list(Clinic(patients=60, public=True))


@pytest.fixture
def model():
    return models.build(TINY, picture_shape=(32, 32, 1))


@pytest.fixture
def watch(tmp_path, public, model):
    """watch(): a watcher of a run in tmp_path, and what it said."""
    said = []

    def make(**changes):
        settings = EvaluationSettings(**{name: changes.pop(name) for name in list(changes) if name == "watch_seconds"})
        return QualityWatch(
            tmp_path, model, public, tuple(FACTS), settings, said.append, **{"private": True, **changes}
        ), said

    return make


def spoil(model):
    """Worse: every weight moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def test_a_line_a_look_and_the_best_weights_are_kept(watch, model, tmp_path):
    quality, said = watch()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(model)
    quality.picture(10, model)
    bad = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(good)
    torch.manual_seed(123)
    chance = torch.get_rng_state()
    quality.picture(20, model)
    assert torch.equal(chance, torch.get_rng_state())  # the training's own chance is as it was
    model.load_state_dict(bad)
    quality.picture(30, model)
    looks = history(tmp_path)
    assert [(look["step"], look["best"]) for look in looks] == [(10, True), (20, True), (30, False)]
    assert looks[0]["public_loss"] == pytest.approx(looks[2]["public_loss"])
    assert looks[0]["public_loss"] > looks[1]["public_loss"]
    assert {look["covered_by"] for look in looks} == {"post-processing"}
    best = tmp_path / "checkpoints" / "best"
    assert best.is_symlink() and best.resolve().name == "best-000020"
    assert [p.name for p in (tmp_path / "checkpoints").glob("best-*")] == ["best-000020"]
    kept = models.load(best).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in good.items())
    assert len(said) == 1 and "rose from" in said[0] and "training.learning_rate" in said[0]
    assert looks[2]["note"] in said[0] and "lowest at step 20" in note(looks) and "best" in note(looks)
    quality.picture(40, model)
    assert len(said) == 1  # once, until it is better again


def test_a_rise_within_chance_is_not_said(watch, model, tmp_path, monkeypatch):
    """Paired differences of standard error 1: 4 of them are needed; the false alarm is 3e-5 a look."""
    quality, said = watch()
    base = np.full(100, 10.0)
    losses = iter([base, base + 3.5 * np.where(np.arange(100) % 2, 1, -0.8), base + np.linspace(0.9, 1.1, 100)])
    monkeypatch.setattr(quality, "_losses", lambda model: next(losses))
    quality.picture(1, model)
    quality.picture(2, model)
    assert said == []
    quality.picture(3, model)
    assert len(said) == 1


def test_a_loss_that_is_no_number_is_said_and_never_best(watch, model, tmp_path):
    quality, said = watch(private=False)
    with torch.no_grad():
        model.denoiser.get_parameter(next(name for name, _ in model.denoiser.named_parameters())).fill_(float("nan"))
    quality.picture(10, model)
    assert "no number" in said[0]
    assert history(tmp_path)[0]["public_loss"] is None
    assert history(tmp_path)[0]["covered_by"] == "internal"
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_a_resumed_training_knows_the_best_of_before(watch, model, tmp_path):
    first, _ = watch()
    first.picture(10, model)
    second, said = watch()
    spoil(model)
    second.picture(20, model)
    assert [look["best"] for look in history(tmp_path)] == [True, False]
    assert len(said) == 1


def test_only_the_half_that_is_not_measured_is_looked_at(watch, public, tmp_path, model):
    quality, _ = watch()
    learnt, measured = report.halves(public, 0)
    assert set(quality._table.unit_names) <= {r.unit for r in learnt}
    assert not set(quality._table.unit_names) & {r.unit for r in measured}


def test_facts_are_watched_where_asked(watch, model, tmp_path):
    quality, said = watch(watch_seconds=600.0)
    quality.picture(10, model)
    look = history(tmp_path)[0]
    assert look["direction"] == "text→image" and abs(look["kappa_mean"]) < 0.5
    assert look["kappa_low"] <= look["kappa_mean"] <= look["kappa_high"]
    quality._highest = (0.95, 0.9)
    quality.picture(20, model)
    assert any("agrees less with what was asked" in line for line in said)


def test_a_torn_line_is_left_out_and_nothing_public_is_nothing_watched(tmp_path, model):
    (tmp_path / watching.FILE).write_text(json.dumps({"step": 1, "public_loss": 2.0}) + '\n{"st')
    assert [look["step"] for look in history(tmp_path)] == [1]
    QualityWatch(tmp_path / "x", model, [], (), EvaluationSettings(), print, private=True).picture(1, model)
    assert not (tmp_path / "x").exists()
    assert note([]) == "" and history(tmp_path / "x") == []


def test_where_whole_sites_are_noised_the_advice_is_about_sites(watch, model):
    quality, said = watch(of_sites=True)
    quality.picture(1, model)
    spoil(model)
    quality.picture(2, model)
    assert len(said) == 1 and "record_level" in said[0] and "learning_rate" not in said[0]
