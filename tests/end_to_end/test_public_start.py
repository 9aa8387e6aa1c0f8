"""A run that begins at public weights, from recipe to verified bundle at toy size; killed at every boundary; refused where it lies."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tests.end_to_end.test_releases import rebuilt
from tests.test_workflow import Interrupt

from sfumato import building, measuring, pretraining, stages, workflow
from sfumato.data import prepare
from sfumato.errors import DataError, UsageError
from sfumato.evaluation import features
from sfumato.privacy.ledger import show
from sfumato.release import keys, verify

STEPS, PUBLIC_STEPS = 5, 4
TRAINED = ["denoiser.outward", "text_encoder.*.bias"]
WORDS = ("cat", "dog", "house", "tree", "sun", "moon", "car", "boat")
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "image": {"kind": "cosine", "kept": 4},
        "text": {"kind": "hashed_words", "buckets": 32, "width": 8},
        "backbone": {"kind": "mlp", "width": 16, "depth": 1},
        "sampling": {"steps": 2},
    },
    "privacy": {"unit": "record", "epsilon": None, "noise_multiplier": 2.0},
    "training": {"steps": STEPS, "expected_batch_size": 40, "log_every": 1},
    "evaluation": {"samples": 30, "judge_seconds": 1},
    "audit": {"members": 30, "draws": 1},
    "release": {"require_audit": False},
    "performance": {"threads": 1},
}


def records(folder: Path, names: list[str], *, seed: int) -> Path:
    """Pictures of noise with captions and names of concepts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"{name}, {rng.integers(100)}", "label": name})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def recipe_file(home: Path, *, trained: list[str] | None = None, **sections: Any) -> str:
    """Private records of many names, and public ones, of which every other is named as one of the private set's."""
    if not (home / "mine").exists():
        records(home / "mine", [f"{WORDS[i % 8]} {i}" for i in range(160)], seed=1)
        records(home / "others", [f"{'CAT' if i % 2 else 'cow'} {8 * i}" for i in range(40)], seed=2)
    data = {"source": "folder", "image_size": 16}
    values = {
        **TINY,
        "data": {**data, "path": str(home / "mine"), "public_units": 60},
        "public_start": {
            "data": {**data, "path": str(home / "others"), "public_units": 0},
            "steps": PUBLIC_STEPS,
            "records_at_once": 16,
            "trained": TRAINED if trained is None else trained,
        },
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def set_home(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "CONFIG", "CACHE"):
        patch.setenv(f"XDG_{name}_HOME", str(folder / name.lower()))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    set_home(tmp_path / "home", monkeypatch)


@pytest.fixture
def trains_only(monkeypatch):
    """Nothing is measured, attacked or released after the training: that is not what these tests are about."""
    for module, name in ((measuring, "evaluate"), (measuring, "audit"), (stages, "render")):
        monkeypatch.setattr(module, name, lambda *args, **rest: {})
    monkeypatch.setattr(stages, "release", lambda *args: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        set_home(folder / "home", patch)
        for extractor in ("image_extractor", "text_extractor"):  # networks of half a minute, where they are installed
            patch.setattr(features, extractor, lambda: None)
        recipe = recipe_file(folder, evaluation={"twin": True})
        lines = Interrupt()
        yield recipe, workflow.train(recipe, out=folder / "runs", progress=lines), keys.own(), lines.lines


def read(run: Path | str, name: str) -> Any:
    return json.loads((Path(run) / name).read_text())


def steps_charged(run: Path | str) -> list[int]:
    return [event["count"] for event in show(Path(run) / "ledger.db")["events"]]


def test_it_costs_nothing_and_the_claim_names_what_it_was_trained_on(finished):
    recipe, answer, _, lines = finished
    run = Path(answer["run"])
    assert (answer["stopped"], answer["reasons"], steps_charged(run)) == ("steps", [], [STEPS])
    assert answer["epsilon"] == pytest.approx(workflow.plan(recipe)["epsilon"], abs=1e-9) and answer["epsilon"] > 0
    card = read(run, "public/card.json")
    assert card["name"] == "others" and card["records"] == 40 - sum(card["left_out"].values())
    assert any(line.startswith("public start, training: step") and line.endswith("· public") for line in lines)
    boundary = read(run, "reports/privacy.json")["boundary"]
    (named,) = [line for line in boundary if line.startswith("Declared public: the weights")]
    assert "others (a folder or file of the user)" in named and card["sha256"] in named
    assert f"{card['records']} records" in named and str(PUBLIC_STEPS) in named
    assert any(f"{card['left_out']['named as a measured concept']} named as a measured concept" in s for s in boundary)
    assert any("the training of the weights named below" in s for s in boundary)
    assert not any("every weight" in s or "encoder is trained inside" in s for s in boundary)
    assert any("(denoiser.outward, text_encoder.*.bias)" in s for s in boundary)
    assert "Declared public: the weights" in Path(answer["bundle"], "README.md").read_text()
    assert (run / "samples" / "step-000000.png").is_file()


def test_only_what_is_named_left_the_public_weights_and_the_taint_says_which(finished):
    _, answer, _, _ = finished
    run = Path(answer["run"])
    start = load_file(run / "public" / "model.safetensors")
    taint = read(run, "taint.json")["tensors"]
    seen = {"dp-sgd": 0, "public": 0}
    for file, tensors in taint.items():
        for name, value in load_file(run / "model" / file).items():
            same = torch.equal(value, start[f"{Path(file).parent.name}.{name}"])
            seen[tensors[name]] += 1
            assert same == (tensors[name] == "public"), (file, name)
    assert seen == {"dp-sgd": 4, "public": 10}
    numbers = read(run, "reports/cost.json")["parameters"]
    assert numbers == workflow.plan(finished[0])["parameters"] == 16 * 16 + 16 + 8 + 8


def test_the_report_has_the_public_start_alone_beside_every_figure_and_the_bundle_keeps_it(finished):
    _, answer, _, _ = finished
    figures = read(answer["run"], "reports/quality.json")["figures"]
    assert figures and all({"public start alone", "non-private twin"} < set(figure["baseline"]) for figure in figures)
    distance = next(figure for figure in figures if figure["name"] == "Fréchet distance")
    assert distance["baseline"]["public start alone"] != distance["value"]
    kept = read(answer["bundle"], "quality.json")["figures"]
    assert [f["baseline"]["public start alone"] for f in kept] == [f["baseline"]["public start alone"] for f in figures]
    assert not any("non-private twin" in figure["baseline"] for figure in kept)
    notes = " ".join(read(answer["run"], "reports/quality.json")["notes"])
    assert "Better than the public start alone: " in notes
    html = Path(answer["html"]).read_text()
    assert "Public start</th>" in html


def test_a_stranger_recomputes_it_sees_no_path_and_refuses_a_claim_that_hides_it(finished, tmp_path):
    _, answer, key, _ = finished
    result = verify.verify_with(Path(answer["bundle"]), {key.public.id: key.public})
    assert result["valid"], [check for check in result["checks"] if not check["ok"]]
    recipe = read(answer["bundle"], "provenance.json")["recipe"]
    assert recipe["public_start"]["data"]["path"] == recipe["data"]["path"] == "(local)"
    claim = read(answer["run"], "reports/privacy.json")
    hidden = [line for line in claim["boundary"] if not line.startswith("Declared public: the weights")]
    lied = rebuilt(Path(answer["run"]), tmp_path / "lied", key, boundary=hidden)
    assert not lied["valid"]
    assert [check["name"] for check in lied["checks"] if not check["ok"]] == ["plan"]


def test_nothing_that_is_measured_is_learnt_from_and_the_private_steps_begin_at_the_public_weights(
    tmp_path, monkeypatch, trains_only
):
    from sfumato.training import loop

    begun: list[dict[str, Any]] = []
    true = loop.train

    def weights(model: Any) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def seen(model, table, plan, settings, performance, **rest):
        open_ = sum(p.requires_grad for p in model.parameters())
        before = weights(model)
        result = true(model, table, plan, settings, performance, **rest)
        begun.append({"units": set(table.unit_names), "open": open_, "before": before, "after": weights(model)})
        return result

    monkeypatch.setattr(loop, "train", seen)
    recipe = recipe_file(tmp_path)
    workflow.train(recipe, out=tmp_path / "runs")
    first, second = begun
    assert torch.equal(second["before"], first["after"]) and not torch.equal(first["before"], first["after"])
    assert (first["open"], second["open"]) == (14, 4)
    wanted = workflow.resolve(recipe)
    labels = {str(r.metadata["label"]).casefold() for r in stages.load(wanted).public}
    assert wanted.public_start is not None
    learnt = prepare.load(wanted.public_start.data, unit="record", private=False).private
    named = {r.unit for r in learnt if str(r.metadata["label"]).casefold() in labels}
    assert named and not named & first["units"] and first["units"] | named == {r.unit for r in learnt}


def test_without_names_everything_is_trained_and_said_to_be(tmp_path, trains_only):
    answer = workflow.train(recipe_file(tmp_path, trained=[]), out=tmp_path / "runs")
    taint = read(answer["run"], "taint.json")["tensors"]
    assert {origin for tensors in taint.values() for origin in tensors.values()} == {"dp-sgd"}
    boundary = read(answer["run"], "reports/privacy.json")["boundary"]
    assert any("every weight of the model" in s for s in boundary)
    assert any(s.startswith("Declared public: the weights that the private steps began at") for s in boundary)


# ---- what stops, goes on ----


def test_ctrl_c_and_resume_in_both_trainings(tmp_path, trains_only):
    recipe, out = recipe_file(tmp_path), tmp_path / "runs"
    begun = workflow.train(recipe, out=out, progress=Interrupt(at="public start, training: step 1/"))
    assert begun["stopped"] == "interrupted" and steps_charged(begun["run"]) == []
    assert (Path(begun["run"]) / "public" / "training" / "last").exists()
    again = workflow.train(recipe, out=out, resume=True, progress=Interrupt(at="· epsilon "))
    shutil.rmtree(tmp_path / "others")  # once the private steps have a checkpoint nothing of it is read
    shutil.rmtree(Path(begun["run"]) / "public" / "training")
    (Path(begun["run"]) / "public" / "model.safetensors").unlink()
    lines = Interrupt()
    ended = workflow.train(recipe, out=out, resume=True, progress=lines)
    assert ended["run"] == again["run"] == begun["run"] and ended["stopped"] == "steps"
    assert steps_charged(ended["run"]) == [STEPS] and not any("public start" in line for line in lines.lines)


_KILLED = """
import os, signal, sys
from sfumato import pretraining, starting, workflow

def dies(*args, **rest):
    os.kill(os.getpid(), signal.SIGKILL)

at, recipe, out = sys.argv[1:]
if at == "card":
    starting.Start.train = dies
elif at == "learnt":
    starting.Start.save = dies
elif at == "saved":
    true = pretraining.begin
    def killed(*args, **rest):
        true(*args, **rest)
        dies()
    pretraining.begin = killed
workflow.train(recipe, out=out)
"""


@pytest.mark.parametrize(
    "at", ["learnt", pytest.param("card", marks=pytest.mark.slow), pytest.param("saved", marks=pytest.mark.slow)]
)
def test_a_kill_at_each_boundary_charges_nothing_twice(tmp_path, at, trains_only):
    recipe = recipe_file(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, at, recipe, str(tmp_path / "runs")], env=dict(os.environ), capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    run = (tmp_path / "runs" / "tiny" / "last").resolve()
    assert steps_charged(run) == [] and (run / "public" / "card.json").is_file()
    assert (run / "public" / "model.safetensors").is_file() == (at == "saved")
    saved = (run / "public" / "model.safetensors").read_bytes() if at == "saved" else None
    answer = workflow.train(recipe, out=tmp_path / "runs", resume=True)
    assert Path(answer["run"]).resolve() == run and steps_charged(run) == [STEPS]
    if saved is not None:
        assert (run / "public" / "model.safetensors").read_bytes() == saved


def test_other_public_records_than_it_began_with_are_refused_on_resume(tmp_path, trains_only):
    recipe, out = recipe_file(tmp_path), tmp_path / "runs"
    workflow.train(recipe, out=out, progress=Interrupt(at="public start, training: step 1/"))
    shutil.rmtree(tmp_path / "others")
    records(tmp_path / "others", ["cow 1", "cow 2"], seed=9)
    with pytest.raises(DataError, match=r"others than .* began with"):
        workflow.train(recipe, out=out, resume=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"source": "clinic", "path": None}, "public_start": {"data": {"source": "clinic", "public_units": 0}}},
         "source = clinic · is the set that is to be protected"),
        ({"public_start": {"data": {"source": "mnist", "image_size": 28, "public_units": 0}}},
         "image_size = 28 · must be that of data, 16"),
        ({"public_start": {"data": {"source": "mnist", "image_size": 16}}}, "public_units = 6000 · all of these records are public"),
        ({"privacy": {"mechanism": "mean_embedding"}}, "what is released once is not trained in steps"),
        ({"privacy": {"epsilon": 8.0, "noise_multiplier": None, "warm_start": {"share": 0.1}},
          "model": {"warm_start": {"release": {"kind": "class_moments", "classes": [{"name": "cat", "more": ["cat"]}]}}}},
         "a run begins at one of them"),
        ({"public_start": {"steps": 0}}, "steps = 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_together_is_refused_by_name(tmp_path, sections, words):
    with pytest.raises(UsageError, match=words) as caught:
        workflow.resolve(recipe_file(tmp_path, **sections))
    assert caught.value.next


def test_public_records_that_lie_among_the_private_ones_are_refused(tmp_path):
    within = tmp_path / "mine" / "part"
    for place in (tmp_path / "mine", within, tmp_path, tmp_path / "link"):
        recipe = recipe_file(tmp_path)
        if place.name == "link" and not place.exists():
            place.symlink_to(tmp_path / "mine")
        recipe = recipe_file(
            tmp_path,
            public_start={"data": {"source": "folder", "path": str(place), "public_units": 0, "image_size": 16}},
        )
        for verb in (workflow.plan, workflow.train):
            with pytest.raises(UsageError, match="the records that are to be protected"):
                verb(recipe)


def test_a_built_in_set_under_another_name_is_found_in_the_cache(tmp_path, monkeypatch):
    """The private emoji, given again as a folder of the user's own."""
    from sfumato.data.fetch import EXAMPLES, cache_home

    place = cache_home() / "data" / f"emoji-{EXAMPLES['emoji'].version}"
    wanted = workflow.resolve(
        recipe_file(
            tmp_path,
            data={"source": "emoji", "path": None},
            public_start={
                "data": {"source": "folder", "path": str(place / "flat"), "public_units": 0, "image_size": 16}
            },
        )
    )
    with pytest.raises(UsageError, match="the records that are to be protected"):
        pretraining.refuse(wanted)


def test_a_name_of_no_parameter_is_refused_before_there_is_a_run(tmp_path):
    with pytest.raises(UsageError, match="trained = nowhere · names no trained parameter"):
        workflow.train(recipe_file(tmp_path, trained=["nowhere"]), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_where_all_public_records_are_measured_ones_nothing_begins(tmp_path, trains_only):
    recipe = recipe_file(tmp_path)
    shutil.rmtree(tmp_path / "others")
    measured = [str(r.metadata["label"]) for r in stages.load(workflow.resolve(recipe)).public]
    records(tmp_path / "others", measured[:5], seed=3)
    with pytest.raises(DataError, match="all are of concepts that the quality is measured on"):
        workflow.train(recipe, out=tmp_path / "runs")
    assert steps_charged(tmp_path / "runs" / "tiny" / "v1") == []


# -- a federation --


def federated(home: Path, **federation: Any) -> str:
    """Two sites, by a column of 8 values; the steps hardly move the weights, so that it is seen where they begin."""
    if not (home / "mine").exists():
        records(home / "mine", [WORDS[i % 8] for i in range(280)], seed=1)
        records(home / "others", [f"cow {i}" for i in range(20)], seed=2)
    return recipe_file(
        home,
        trained=[],
        data={"site_column": "label"},
        training={"learning_rate": 1e-12, "warmup_steps": 0},
        federation={"sites": 2, "rounds": 2, "local_steps": 3, **federation},
    )


def test_every_site_begins_at_what_the_server_learnt_from_public_records_and_is_charged_its_own_steps(
    tmp_path, trains_only
):
    answer = workflow.federate(federated(tmp_path), out=tmp_path / "runs")
    run = Path(answer["run"])
    start = load_file(run / "public" / "model.safetensors")
    fresh = building.build(workflow.resolve(federated(tmp_path))).state_dict()
    moved = sum(not torch.equal(value, fresh[name]) for name, value in start.items())
    assert moved == len([name for name in fresh if not name.startswith("codecs")]) > 5
    seen = 0
    for file in sorted((run / "model").glob("*/*.safetensors")):
        for name, value in load_file(file).items():
            torch.testing.assert_close(value, start[f"{file.parent.name}.{name}"], rtol=0, atol=1e-9)
            seen += 1
    assert seen == len(start)
    assert [site["name"] for site in answer["sites"]] == ["boat + cat + house + sun", "car + dog + moon + tree"]
    for number in (1, 2):
        spent = show(run / "sites" / f"site-{number}" / "ledger.db")
        assert sum(event["count"] for event in spent["events"]) == 6
    boundary = read(run, "reports/privacy.json")["boundary"]
    assert [s for s in boundary if s.startswith("Declared public: the weights that the private steps began at")]


def test_a_federation_that_is_interrupted_in_its_public_training_spends_nothing_and_is_resumed(tmp_path, trains_only):
    recipe = federated(tmp_path)
    stopped = workflow.federate(recipe, out=tmp_path / "runs", progress=Interrupt("public start, training: step 1"))
    assert (stopped["stopped"], stopped["rounds"], stopped["sites"]) == ("interrupted", 0, [])
    assert not list(Path(stopped["run"]).glob("sites/*/ledger.db"))
    answer = workflow.federate(recipe, out=tmp_path / "runs", resume=True)
    assert (answer["run"], answer["rounds"]) == (stopped["run"], 2) and answer.get("stopped") is None


@pytest.mark.parametrize(
    ("trained", "federation", "name"),
    [
        (TRAINED, {}, "public_start.trained"),
        ([], {"home": ["denoiser.outward"]}, "federation.home"),
        ([], {"holds": {"north": ["denoiser"]}}, "federation.holds"),
    ],
)
def test_a_federation_refuses_public_weights_that_a_site_would_not_be_sent(tmp_path, trained, federation, name):
    recipe = recipe_file(tmp_path, trained=trained, federation={"sites": 2, **federation})
    with pytest.raises(UsageError, match=f"{name} = .* would begin as it was built, not at the public weights"):
        workflow.federate(recipe, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
