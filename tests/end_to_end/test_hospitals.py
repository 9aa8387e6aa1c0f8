"""The case: four hospitals, one without sounds, one with few patients, one that may send anything."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.federation.conftest import Tiny, charging, work_for

from sfumato import warming, workflow
from sfumato.data.clinic import HOSPITALS, Clinic
from sfumato.errors import DataError
from sfumato.federation import simulate
from sfumato.federation.mechanism_settings import Mean, TrimmedMean
from sfumato.federation.sites import Site
from sfumato.privacy.ledger import show
from sfumato.privacy.plan import DpSgd
from sfumato.records import UnitTable

SMALL = [
    "data.units=240",
    "data.public_units=120",
    "federation.populations=[140,110,120,130]",
    "model.warm_start.records=60",
    "model.warm_start.steps=2",
    "model.warm_start.release.steps=2",
    "model.warm_start.release.texts_at_once=32",
    "training.expected_batch_size=24",
    "model.backbone.width=8",
    "evaluation.judge_seconds=1",
    "evaluation.watch_seconds=1",
    "evaluation.samples=40",
]


@pytest.fixture(scope="module")
def records():
    return list(Clinic(patients=1_000, seed=1, audio=True, sites=HOSPITALS))


def test_the_lung_clinic_has_no_sounds_and_its_histories_say_nothing_of_them(records):
    for record in records:
        silent = record.metadata["site"] == "lung"
        assert (record.audio is None) == (record.sample_rate is None) == silent
        assert ("murmur" in record.metadata) != silent
        heard = any(word in record.text.lower() for word in ("murmur", "wheez", "beats"))
        assert not (silent and heard)
    assert any("murmur" in record.text.lower() for record in records if record.audio is not None)


def test_the_hospitals_differ_in_size_and_in_what_they_see(records):
    units = {
        site.name: len({r.unit for r in records if r.metadata["site"] == site.name}) for site in HOSPITALS
    }  # shares .42, .28, .27, .03 of 1,000: six standard deviations on either side
    assert 326 < units["city"] < 514 and 0 < units["district"] < 63
    share = {
        site.name: sum(r.metadata["facts"]["kind"] == "cavity" for r in records if r.metadata["site"] == site.name)
        / sum(r.metadata["site"] == site.name for r in records)
        for site in HOSPITALS
    }
    assert share["lung"] > share["heart"] + 0.25


def test_three_sites_are_as_they_were_and_silence_must_be_allowed(tmp_path, monkeypatch):
    first, again = list(Clinic(patients=30)), list(Clinic(patients=30))
    assert [r.text for r in first] == [r.text for r in again] and {r.metadata["site"] for r in first} == {"A", "B", "C"}
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DataError):
        workflow.federate("hospitals", assignments=[*SMALL, "data.may_lack=false"], out=tmp_path, rounds=1)


def test_the_recipe_trains_what_each_hospital_holds_and_reports_every_round(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    answer = workflow.federate(
        "hospitals", assignments=[*SMALL, "federation.local_steps=2"], out=tmp_path / "runs", rounds=2
    )
    run = Path(answer["run"])
    report = json.loads((run / "reports" / "federation.json").read_text())
    assert [site["name"] for site in report["sites"]] == ["city", "district", "heart", "lung"]
    assert "rounds_detail" not in report
    opening, *rounds = report["rounds"]
    assert (opening["round"], opening["sites"], opening["left_out"]) == (0, ["city", "district", "heart", "lung"], [])
    assert opening["quality"]["public_loss"] > 0 and list((run / "samples").glob("step-000000*"))
    assert answer["rounds"] == 2
    pictures, sounds = (part.maker.dimension for part in warming.parts(workflow.resolve("hospitals", SMALL)))
    assert opening["bytes_up"] == 8 * (4 * pictures + 3 * sounds) and opening["bytes_down"] == 0  # no sounds at one
    for number, round_ in enumerate(rounds, start=1):
        assert (round_["round"], round_["discarded"], round_["left_out"]) == (number, "", [])
        assert round_["bytes_up"] == round_["bytes_down"] > 0
        assert round_["quality"]["public_loss"] > 0 and "kappa_mean" in round_["quality"]
        assert set(round_["epsilons"]) == {"city", "district", "heart", "lung"}
        assert round_["epsilon"] == max(round_["epsilons"].values())
    first, last = rounds
    assert all(0 < opening["epsilons"][name] < first["epsilons"][name] for name in first["epsilons"])
    assert all(0 < first["epsilons"][name] < last["epsilons"][name] for name in first["epsilons"])
    for site in report["sites"]:
        assert last["epsilons"][site["name"]] == pytest.approx(site["epsilon"], rel=1e-9)
    page = (run / "reports" / "report.html").read_text()
    assert "by each site, of its own records" in page and "60 records were drawn from it" in page
    for path in sorted(run.glob("sites/*/ledger.db")):
        assert sorted(event["count"] for event in show(path)["events"]) == [1, 4]
    assert "2 rounds, and before them a release by every site, round 0" in page
    assert "Round by round" in page and "Quality, privacy and cost of a federation" in page

    recipe = workflow.federated("hospitals", [*SMALL, "federation.local_steps=2"], rounds=2)
    from sfumato import building

    model = building.build(recipe)
    whole = sum(p.numel() for p in model.parameters())
    heard = sum(p.numel() for name, p in model.named_parameters() if ".audio." in name)
    assert 0 < heard < whole
    assert last["bytes_up"] == 4 * (4 * whole - heard)  # float32; the lung clinic sends no part of a sound


@pytest.mark.parametrize("factor", [-5.0, 100.0, -1e6])
def test_a_trimmed_mean_keeps_a_hostile_hospital_out_and_a_mean_does_not(factor, tmp_path):
    """Honest ones send 1, 2 and 3 a step; in every coordinate the result must lie between two of them."""

    def sites(folder):
        plan = DpSgd(population=20, expected_batch_size=4, steps=2, noise_multiplier=3.0, delta=1e-4)
        return [
            Site(
                name=name,
                table=UnitTable({"x": torch.full((20, 2), value)}, [f"{name}-{i}" for i in range(20)]),
                plan=plan,
                ledger=tmp_path / folder / name / "ledger.db",
            )
            for name, value in {"a": 1.0, "b": 2.0, "c": 3.0, "d": 2.0}.items()
        ]

    def moved(aggregation, folder):
        members = sites(folder)
        work = work_for(members, Tiny, charging, rounds=1, aggregation=aggregation)
        honest = simulate.exchange_here(members, work)

        def hostile(asked):
            replies = dict(honest(asked))
            sent = {name: factor * tensor for name, tensor in replies["d"].tensors.items()}
            replies["d"] = replace(replies["d"], tensors=sent)
            return replies

        result = simulate.simulate(members, work, run="r", exchange=hostile)
        return result.state["line.weight"] - torch.tensor([[0.5, -0.5]])

    trimmed = moved(TrimmedMean(trimmed=1), "trimmed")
    assert bool(((trimmed >= 2.0) & (trimmed <= 6.0)).all())  # two steps of 1 to 3
    mean = moved(Mean(), "mean")
    assert not bool(((mean >= 2.0) & (mean <= 6.0)).any())
