"""The verbs as functions: plans, one run from recipe to report, what a resume finds, and a federation. All at toy size."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sfumato import workflow
from sfumato.errors import DataError, LedgerError, PrivacyRefused, UsageError
from sfumato.privacy.ledger import show
from sfumato.release import verify
from sfumato.training import folder as folders

STEPS = 6
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "clinic", "units": 120, "public_units": 8, "image_size": 16},
    "model": {
        "image": {"kind": "cosine", "kept": 6},
        "text": {"kind": "hashed_words", "buckets": 64, "width": 8},
        "backbone": {"kind": "mlp", "width": 16, "depth": 1},
        "sampling": {"steps": 2},
    },
    "privacy": {"unit": "person", "records_per_unit": 2, "epsilon": None, "noise_multiplier": 20.0},
    "training": {"steps": STEPS, "expected_batch_size": 20, "log_every": 1},
    "evaluation": {"samples": 20, "judge_seconds": 1},
    "audit": {"members": 20, "draws": 1},
    "performance": {"threads": 1},
}


def recipe_file(folder: Path, **sections: Any) -> str:
    """TINY with some sections changed, as a file."""
    values = {**TINY, **{k: {**TINY.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A user's own machine: account and key are here and nowhere else."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CONFIG", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        yield home


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """An account that no other test writes to."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "own-data"))
    return tmp_path / "own-data"


class Interrupt:
    """A progress that presses Ctrl-C at the first line that contains ``at``; it remembers all lines."""

    def __init__(self, at: str = "\0") -> None:
        self.at = at
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if self.at in line:
            self.at = "\0"
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, home):
    """One finished run: (its recipe, the folder of runs, what train answered). Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_file(folder)
    return recipe, folder / "runs", workflow.train(recipe, out=folder / "runs")


# ---- recipes ----


def test_a_named_recipe_and_a_file_are_resolved_with_changes(tmp_path):
    named = workflow.resolve("clinic", ["privacy.epsilon=4", "data.units=3000"])
    assert (named.name, named.privacy.epsilon, named.data.units) == ("clinic", 4, 3000)
    own = workflow.resolve(recipe_file(tmp_path), ["name=other", "model.backbone={kind: mlp, width: 8}"])
    assert (own.name, own.training.steps, own.model.backbone.width) == ("other", STEPS, 8)


def test_a_file_in_this_folder_comes_before_a_named_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(recipe_file(tmp_path), "clinic")
    assert workflow.resolve("clinic").name == "tiny"


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("klinic", [], "recipe = klinic · is neither a file nor one of clinic"),
        ("missing.yaml", [], "recipe = missing.yaml · a readable YAML file"),
        ("clinic", ["training.stepz=3"], "training.stepz · is not a key"),
        ("clinic", ["privacy.epsilon=-1"], "epsilon = -1"),
        ("clinic", ["privacy.epsilon"], "must be path=value"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(recipe, changes, words):
    with pytest.raises(UsageError, match=words) as caught:
        workflow.resolve(recipe, changes)
    assert caught.value.next


# ---- plans ----


@pytest.mark.parametrize(("epsilon", "sigma", "within"), [(1.0, 16.92, 0.05), (10.0, 2.380, 0.01)])
def test_plan_without_a_recipe_gives_the_published_noise(epsilon, sigma, within):
    answer = workflow.plan(population=60_000, expected_batch_size=4096, steps=4394, epsilon=epsilon, delta=1e-5)
    assert answer["noise_multiplier"] == pytest.approx(sigma, abs=within)
    assert answer["epsilon"] == answer["accountants"]["pld"] <= epsilon
    assert answer["accountants"]["pld"] <= answer["accountants"]["rdp"]
    assert (answer["steps"], answer["delta"], answer["refusals"]) == (4394, 1e-5, [])
    assert answer["sampling_rate"] == pytest.approx(4096 / 60_000)
    assert (answer["unit"], answer["adjacency"]) == ("record", "add_or_remove")
    json.dumps(answer, allow_nan=False)


def test_plan_without_a_recipe_says_what_is_missing():
    with pytest.raises(UsageError, match="--population, --steps, --epsilon · must be given"):
        workflow.plan(expected_batch_size=10)
    with pytest.raises(UsageError, match="accountant = guess"):
        workflow.plan("clinic", accountant="guess")


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ({"population": 50, "expected_batch_size": 60}, {"too_few_units", "batch_larger_than_population"}),
        ({"delta": 0.01}, {"delta_too_large"}),
        ({"steps": 0}, {"no_steps"}),
        ({"expected_batch_size": 0}, {"empty_batch"}),
        ({"epsilon": 1_000.0}, {"epsilon_too_large"}),
    ],
)
@pytest.mark.parametrize("recipe", [None, "clinic"])
def test_a_plan_that_cannot_work_has_refusals_and_no_noise(recipe, asked, codes):
    sizes = {"population": 1_000, "expected_batch_size": 100, "steps": 10, "epsilon": 8.0, **asked}
    answer = workflow.plan(recipe, **sizes)
    assert {refusal["code"] for refusal in answer["refusals"]} >= codes
    assert all(refusal["message"] and refusal["next"] for refusal in answer["refusals"])
    assert answer["noise_multiplier"] is None


def test_the_plan_of_the_clinic_reads_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(workflow.stages, "load", lambda recipe: pytest.fail("the data was read"))
    answer = workflow.plan(recipe_file(tmp_path))
    assert (answer["population"], answer["unit"], answer["records_per_unit"]) == (120, "person", 2)
    assert answer["parameters"] > 0
    assert workflow.plan(recipe_file(tmp_path), population=500)["population"] == 500


def test_a_run_without_privacy_has_no_epsilon_to_plan(tmp_path):
    answer = workflow.plan(recipe_file(tmp_path, privacy={"mechanism": "none"}))
    assert (answer["epsilon"], answer["noise_multiplier"], answer["refusals"]) == (None, None, [])
    assert [warning["code"] for warning in answer["warnings"]] == ["not_private"]


PARTS = [
    {"name": "text", "modules": ["text_encoder"], "max_grad_norm": 0.3, "share": 0.2},
    {"name": "picture", "modules": ["denoiser"], "max_grad_norm": 0.4, "share": 0.8},
]


def test_the_plan_of_a_recipe_with_parts_says_the_noise_of_each(tmp_path):
    answer = workflow.plan(recipe_file(tmp_path, privacy={"parts": PARTS}))
    assert answer["noise_multiplier"] == 20.0 and answer["max_grad_norm"] == 0.5
    assert [part["noise_multiplier"] for part in answer["parts"]] == pytest.approx([20 / 0.2**0.5, 20 / 0.8**0.5])
    assert workflow.plan(recipe_file(tmp_path))["parts"] == []
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{**PARTS[0], "share": None}], r"denoiser\..*is trainable, and in no part"),
        ([PARTS[0], {**PARTS[1], "modules": ["denoizer"]}], r"denoiser\..*is trainable, and in no part"),
        ([*PARTS[:1], {**PARTS[1], "modules": ["", "vision"]}], "modules = 'vision' of part picture · names nothing"),
        ([{**PARTS[0], "modulez": 1}], "privacy.parts.0.modulez · is not a key"),
    ],
)
def test_parts_that_are_not_those_of_the_model_are_refused_before_anything_is_planned(tmp_path, parts, words):
    with pytest.raises(UsageError, match=words):
        workflow.plan(recipe_file(tmp_path, privacy={"parts": parts}))


def test_a_run_with_parts_is_released_and_verified(tmp_path, own_home):
    recipe = recipe_file(tmp_path, privacy={"parts": PARTS, "clipping": "per_layer"})
    answer = workflow.train(recipe, out=tmp_path / "runs")
    assert answer["reasons"] == []
    result = verify.verify(answer["bundle"])
    assert result["valid"], result
    claim = json.loads(Path(answer["bundle"], "privacy.json").read_text())
    assert (claim["mechanism"]["clipping"], len(claim["mechanism"]["parts"])) == ("per_layer", 2)


# ---- one run ----


def test_a_run_answers_with_what_is_documented(finished):
    _, out, answer = finished
    assert answer.keys() >= {"run", "epsilon", "delta", "steps", "seconds", "quality", "bundle"}
    run = Path(answer["run"])
    assert run == out / "tiny" / "v1"
    assert (answer["steps"], answer["stopped"], answer["reasons"]) == (STEPS, "steps", [])
    assert show(run / "ledger.db")["steps"] == STEPS
    assert answer["epsilon"] == pytest.approx(show(run / "ledger.db")["epsilon"])
    assert Path(answer["bundle"], "manifest.json").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    json.dumps(answer, allow_nan=False)


def test_a_second_run_is_v2_and_names_the_first(finished):
    recipe, out, first = finished
    second = workflow.train(recipe, out=out)
    assert Path(second["run"]).name == "v2"
    assert (out / "tiny" / "last").resolve() == Path(second["run"])
    composed = json.loads(Path(second["run"], "reports", "privacy.json").read_text())["composed_with"]
    assert ("tiny/v1", first["epsilon"]) in [(run["run"], pytest.approx(run["epsilon"])) for run in composed]


def test_resume_where_no_run_is_begins_one_and_says_so(tmp_path, own_home):
    progress = Interrupt("step 2/")
    answer = workflow.train(recipe_file(tmp_path), out=tmp_path / "runs", resume=True, progress=progress)
    assert any("there is no run to resume" in line and "a new one begins" in line for line in progress.lines)
    assert Path(answer["run"]).name == "v1"


def test_an_interrupted_run_answers_with_what_was_spent_and_its_resume_spends_the_plan(tmp_path, own_home):
    recipe, out = recipe_file(tmp_path), tmp_path / "runs"
    answer = workflow.train(recipe, out=out, progress=Interrupt("step 1/"))
    assert (answer["stopped"], answer["bundle"]) == ("interrupted", None)
    spent = answer["steps"]
    assert 1 <= spent < STEPS
    assert answer["epsilon"] == pytest.approx(show(Path(answer["run"], "ledger.db"))["epsilon"])
    assert [run["state"] for run in workflow.runs(out)["runs"]] == ["unfinished"]
    again = workflow.train(recipe, out=out, resume=True)
    assert (again["run"], again["stopped"], again["steps"]) == (answer["run"], "steps", STEPS)
    plan = json.loads(Path(again["run"], "plan.json").read_text())
    assert plan["steps"] == show(Path(again["run"], "ledger.db"))["steps"] == STEPS
    assert again["epsilon"] > answer["epsilon"]
    lines = [json.loads(line)["step"] for line in Path(again["run"], "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))


def copy_of(finished, tmp_path) -> tuple[str, Path, Path]:
    """A run of its own to spoil: the recipe, the folder of runs, the run. Its account stays where it was."""
    recipe, out, _ = finished
    shutil.copytree(out / "tiny" / "v1", tmp_path / "runs" / "tiny" / "v1", symlinks=True)
    (tmp_path / "runs" / "tiny" / "last").symlink_to("v1")
    return recipe, tmp_path / "runs", tmp_path / "runs" / "tiny" / "v1"


def test_a_resume_of_a_finished_run_trains_and_spends_nothing(finished, tmp_path, monkeypatch):
    from sfumato.training import loop

    recipe, out, run = copy_of(finished, tmp_path)
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("it trained again"))
    before = (run / "ledger.db").read_bytes()
    progress = Interrupt()
    answer = workflow.train(recipe, out=out, resume=True, progress=progress)
    assert any("finished already" in line for line in progress.lines)
    assert (run / "ledger.db").read_bytes() == before
    assert answer["epsilon"] == finished[2]["epsilon"]
    assert Path(answer["bundle"]) == run / "bundle"


def test_a_run_killed_between_its_model_and_its_claim_is_finished_by_a_resume(finished, tmp_path):
    recipe, out, run = copy_of(finished, tmp_path)
    weights = {path: path.read_bytes() for path in (run / "model").rglob("*.safetensors")}
    shutil.rmtree(run / "reports")
    shutil.rmtree(run / "bundle")
    for path in weights:
        path.write_bytes(path.read_bytes()[:100])  # killed within the saving of the model, even
    answer = workflow.train(recipe, out=out, resume=True)
    assert answer["epsilon"] == pytest.approx(finished[2]["epsilon"], abs=1e-9)
    assert show(run / "ledger.db")["steps"] == answer["steps"] == STEPS
    assert all(path.read_bytes() == content for path, content in weights.items())
    assert answer["bundle"] is not None


def test_a_resume_with_another_recipe_is_refused_and_says_where(finished, tmp_path):
    recipe, out, _ = copy_of(finished, tmp_path)
    with pytest.raises(UsageError, match=r"different: training\) · a run keeps its recipe") as caught:
        workflow.train(recipe, assignments=["training.steps=7"], out=out, resume=True)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="different: privacy"):
        workflow.train(recipe, assignments=["privacy.noise_multiplier=1.0"], out=out, resume=True)


def test_a_resume_may_change_what_cannot_change_the_guarantee(finished, tmp_path):
    recipe, out, run = copy_of(finished, tmp_path)
    answer = workflow.train(recipe, assignments=["performance.max_physical_batch_size=5"], out=out, resume=True)
    assert Path(answer["run"]) == run


def unfinished(finished, tmp_path) -> tuple[str, Path, Path]:
    recipe, out, run = copy_of(finished, tmp_path)
    (run / "reports" / "privacy.json").unlink()
    return recipe, out, run


def test_a_resume_beside_the_running_one_is_refused_and_disturbs_nothing(tmp_path, own_home):
    recipe, out, refusals = recipe_file(tmp_path), tmp_path / "runs", []

    def meddle(line: str) -> None:
        if "step 1/" in line:
            with pytest.raises(LedgerError, match="is being written by run 'tiny/v1'") as caught:
                workflow.train(recipe, out=out, resume=True)
            refusals.append((caught.value.exit_code, caught.value.code))

    answer = workflow.train(recipe, out=out, progress=meddle)
    assert refusals == [(3, "ledger_busy")]
    assert (answer["steps"], show(Path(answer["run"], "ledger.db"))["attempts"]) == (STEPS, 1)
    assert len(Path(answer["run"], "metrics.jsonl").read_text().splitlines()) == STEPS


def test_a_run_whose_account_is_gone_is_refused_and_no_new_account_is_made(finished, tmp_path, own_home):
    recipe, out, _ = unfinished(finished, tmp_path)
    with pytest.raises(LedgerError, match=r"account = .* · does not exist") as caught:
        workflow.train(recipe, out=out, resume=True)
    assert caught.value.exit_code == 3
    assert not list(own_home.rglob("account.db"))


def test_a_run_whose_ledger_is_gone_is_refused_and_no_new_ledger_is_made(finished, tmp_path):
    recipe, out, run = unfinished(finished, tmp_path)
    (run / "ledger.db").unlink()
    shutil.rmtree(run / "checkpoints")  # not even a checkpoint tells that it had begun
    with pytest.raises(LedgerError, match=r"ledger = .* · does not exist"):
        workflow.train(recipe, out=out, resume=True)
    assert not (run / "ledger.db").exists()


def test_a_folder_that_no_ledger_was_made_in_is_not_resumed(tmp_path, own_home, monkeypatch):
    """Killed at the very beginning: nothing was spent, and the next run is a new one."""
    recipe, out = recipe_file(tmp_path), tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(workflow.stages, "mark_begun", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            workflow.train(recipe, out=out)
    assert workflow.runs(out) == {"runs": []}
    assert Path(workflow.train(recipe, out=out, resume=True)["run"]).name == "v2"


# ---- other data ----


def pictures(folder: Path, count: int) -> Path:
    """Coloured squares with captions, and no facts known of them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
    with (folder / "metadata.jsonl").open("w") as file:
        for i in range(count):
            name = list(colours)[i % 3]
            picture = np.full((16, 16, 3), colours[name], np.uint8) ^ rng.integers(0, 16, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{i:03d}.png")
            file.write(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {name} square number {i}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("squares") / "data", 60)


def own(squares: Path, public: int, **privacy: Any) -> dict[str, Any]:
    data = {"source": "folder", "path": str(squares), "public_units": public, "channels": 3}
    privacy = {"unit": "record", "records_per_unit": 1, **privacy}
    return {"name": "own", "data": data, "privacy": privacy, "training": {"expected_batch_size": 8}}


def test_a_run_without_privacy_on_own_pictures_is_measured_and_never_bundled(squares, tmp_path, monkeypatch):
    from sfumato.evaluation import pairing

    monkeypatch.setattr(
        pairing, "train", partial(pairing.train, pretrained=False)
    )  # the large extractors are slow to load
    answer = workflow.train(recipe_file(tmp_path, **own(squares, 44, mechanism="none")), out=tmp_path / "runs")
    assert (answer["epsilon"], answer["bundle"], answer["steps"]) == (None, None, STEPS)
    names = set(answer["quality"])
    assert "Fréchet distance" in names
    assert any("R@1" in name for name in names)
    assert {figure["covered_by"] for figure in answer["quality"].values()} == {"internal"}
    refused = workflow.release(answer["run"])
    assert (refused["approved"], refused["bundle"]) == (False, None)
    assert "not_private" in [reason["code"] for reason in refused["reasons"]]
    assert not Path(answer["run"], "bundle").exists()
    assert not list(squares.rglob("account.db"))  # nothing was spent on these data


def test_too_few_records_for_privacy_are_refused_before_a_folder_is_made(squares, tmp_path):
    recipe = recipe_file(tmp_path, **own(squares, 10))
    with pytest.raises(PrivacyRefused) as caught:
        workflow.train(recipe, out=tmp_path / "runs")
    assert [refusal["code"] for refusal in caught.value.refusals] == ["too_few_units"]
    assert not (tmp_path / "runs").exists()


def test_a_resume_on_other_data_is_refused(tmp_path):
    data = pictures(tmp_path / "data", 20)
    recipe = recipe_file(tmp_path, **own(data, 4, mechanism="none"))
    workflow.train(recipe, out=tmp_path / "runs", progress=Interrupt("step 1/"))
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    (data / "metadata.jsonl").write_text("".join(lines[:-1]))
    (data / "019.png").unlink()
    with pytest.raises(DataError, match=r"units 16, now 15; records 16, now 15\) · a run keeps its data"):
        workflow.train(recipe, out=tmp_path / "runs", resume=True)


# ---- after training ----


def test_ctrl_c_in_the_twin_ends_the_run_and_a_resume_goes_on_there(tmp_path, own_home):
    recipe = recipe_file(tmp_path, evaluation={"twin": True})
    with pytest.raises(KeyboardInterrupt):
        workflow.train(recipe, out=tmp_path / "runs", progress=Interrupt("not private"))
    run = folders.existing(tmp_path / "runs" / "tiny" / "last")
    assert run.finished
    assert not run.report("quality").is_file()  # half a twin is no baseline
    answer = workflow.train(recipe, out=tmp_path / "runs", resume=True)
    assert show(run.ledger)["steps"] == STEPS
    assert run.report("quality").is_file()
    assert answer["bundle"] is not None


def test_the_control_of_the_audit_fits_the_data_and_is_caught(tmp_path, own_home):
    """A model without noise, on all 120 patients there are. Its AUC was .94 to .95, with a standard error of about .02:
    that its lower bound falls to one half is a matter of ten standard errors."""
    recipe = recipe_file(
        tmp_path,
        data={"public_units": 60},
        evaluation={"judge_seconds": 0.1},
        audit={"members": 60, "draws": 8},
        model={
            "image": {"kind": "cosine", "kept": 12},
            "text": {"kind": "hashed_words", "buckets": 512, "width": 64},
            "backbone": {"kind": "mlp", "width": 256, "depth": 2},
        },
    )
    answer = workflow.train(recipe, out=tmp_path / "runs")
    audit = json.loads(Path(answer["run"], "reports", "audit.json").read_text())
    assert (audit["positive_control"]["members"], audit["attacks"][0]["members"]) == (120, 60)
    assert audit["positive_control"]["auc_low"] > 0.5
    assert audit["verdict"] == "CONSISTENT"
    again = workflow.audit(answer["run"])
    assert (again["verdict"], again["conformance"]) == (audit["verdict"], [])


def test_generate_writes_every_picture_that_was_asked_for(finished, tmp_path):
    answer = workflow.generate(finished[2]["run"], texts=["left", "right"], count=2, out=tmp_path / "drawn", seed=3)
    assert [Path(file).name for file in answer["files"]] == ["000-000.png", "000-001.png", "001-000.png", "001-001.png"]
    with Image.open(answer["files"][0]) as image:
        assert image.width == image.height >= 96
    assert answer["watermarked"] is False
    again = workflow.generate(finished[2]["bundle"], texts=["left", "right"], count=2, out=tmp_path / "again", seed=3)
    assert [Path(f).read_bytes() for f in again["files"]] == [Path(f).read_bytes() for f in answer["files"]]


def test_what_generate_cannot_do_is_refused(finished, tmp_path):
    with pytest.raises(UsageError, match="told = nothing · this model knows text→image"):
        workflow.generate(finished[2]["run"], texts=[], out=tmp_path)
    with pytest.raises(UsageError, match="count = 0 · must be at least 1"):
        workflow.generate(finished[2]["run"], texts=["a"], count=0, out=tmp_path)
    with pytest.raises(UsageError, match="has no folder model/"):
        workflow.generate(tmp_path, texts=["a"], out=tmp_path)


def test_reports_are_written_again_on_request(finished, tmp_path):
    _, _, run = copy_of(finished, tmp_path)
    for public in (False, True):
        answer = workflow.report(run, public=public)
        assert all(Path(path).is_file() for path in answer.values())
    (run / "reports" / "quality.json").unlink()
    assert workflow.evaluate(run)["quality"] == {}  # eight public patients are too few to measure
    notes = json.loads((run / "reports" / "quality.json").read_text())["notes"]
    assert any("too few" in note for note in notes)
    assert any("is few for" in note for note in notes)  # and so are the private ones, for this epsilon


def test_a_policy_can_say_no(finished, tmp_path):
    _, _, run = copy_of(finished, tmp_path)
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_epsilon: 0.01\n")
    answer = workflow.release(run, policy=policy)
    assert (answer["approved"], [reason["code"] for reason in answer["reasons"]]) == (False, ["epsilon_above_policy"])
    assert workflow.release(run)["approved"]


def test_an_unfinished_run_is_told_to_be_resumed(finished, tmp_path):
    _, _, run = unfinished(finished, tmp_path)
    for verb in (workflow.evaluate, workflow.audit, workflow.release):
        with pytest.raises(UsageError, match="its training is not finished") as caught:
            verb(run)
        assert "sfumato train ... --resume" in caught.value.next
    (Path(run) / "server").mkdir()  # as a federation has one
    with pytest.raises(UsageError) as caught:
        workflow.audit(run)
    assert "sfumato federate ... --resume" in caught.value.next


def test_runs_are_listed_with_their_state(finished):
    listed = workflow.runs(finished[1])["runs"]
    assert (listed[0]["run"], listed[0]["state"], listed[0]["steps"]) == (finished[2]["run"], "released", STEPS)


# ---- a federation ----

FEDERATED = {
    "data": {"units": 330},
    "federation": {"sites": 2, "rounds": 2, "local_steps": 2},
    "privacy": {"unit": "person", "records_per_unit": 2, "epsilon": None, "noise_multiplier": 20.0},
}


def test_a_federation_charges_each_site_and_its_bundle_has_every_ledger(tmp_path, own_home):
    progress = Interrupt()
    answer = workflow.federate(recipe_file(tmp_path, **FEDERATED), out=tmp_path / "runs", progress=progress)
    assert answer.keys() >= {"run", "rounds", "sites", "bytes_up", "bytes_down", "quality"}
    run = Path(answer["run"])
    assert run == tmp_path / "runs" / "tiny-federated" / "v1"
    assert (answer["rounds"], len(answer["sites"])) == (2, 2)
    assert sum(site["units"] for site in answer["sites"]) == 330
    for number, site in enumerate(answer["sites"], start=1):
        shown = show(run / "sites" / f"site-{number}" / "ledger.db")
        assert (shown["steps"], site["rounds"], site["refused"]) == (4, 2, 0)
        assert site["epsilon"] == pytest.approx(shown["epsilon"])
    claim = json.loads((run / "reports" / "privacy.json").read_text())
    assert claim["epsilon"] == pytest.approx(max(site["epsilon"] for site in answer["sites"]))
    assert claim["trust_model"].startswith("local")
    assert answer["bytes_up"] == answer["bytes_down"] > 0
    cost = json.loads((run / "reports" / "cost.json").read_text())
    assert (cost["steps"], cost["bytes_sent"]) == (8, answer["bytes_up"] + answer["bytes_down"])
    assert len(list(own_home.rglob("account-site-*.db"))) == 2
    (tmp_path / "policy.yaml").write_text("require_audit: false\nmax_epsilon: 100\n")
    assert "no_audit_report" in [reason["code"] for reason in workflow.release(run)["reasons"]]
    released = workflow.release(run, policy=tmp_path / "policy.yaml")
    assert released["reasons"] == [] and len(list((run / "bundle" / "ledgers").iterdir())) == 2
    result = verify.verify(run / "bundle")
    assert result["valid"] and result["epsilon"] == pytest.approx(claim["epsilon"])
    assert Path(workflow.generate(run, texts=["left"], out=tmp_path / "drawn")["files"][0]).is_file()
    json.dumps(answer, allow_nan=False)


def test_a_federation_whose_server_sees_sums_only(tmp_path, own_home):
    """Distributed noise by secure aggregation, from the recipe to the claim; every simulated site has a key of its own."""
    federation = {
        **FEDERATED["federation"],
        "sites": 3,
        "weights": "equal",
        "mechanism": {"kind": "distributed", "noise_multiplier": 4.0, "bits": 24, "dropouts": 1},
    }
    privacy = {"mechanism": "none", "epsilon": None, "noise_multiplier": None}
    recipe = recipe_file(tmp_path, **{**FEDERATED, "federation": federation, "privacy": privacy})
    answer = workflow.federate(recipe, out=tmp_path / "runs")
    run = Path(answer["run"])
    report = json.loads((run / "reports" / "federation.json").read_text())
    assert [(r["discarded"], r["left_out"], len(r["sites"])) for r in report["rounds"]] == [("", [], 3)] * 2
    claim = json.loads((run / "reports" / "privacy.json").read_text())
    assert claim["trust_model"].startswith("distributed") and claim["epsilon"] > 0
    assert len(list(own_home.rglob("identity-site-*/signing-key.pem"))) == 3


def test_a_federation_with_two_guarantees_states_both(tmp_path, own_home):
    mechanism = {"kind": "local_and_global", "noise_multiplier": 8.0, "server_noise_multiplier": 6.0}
    federation = {**FEDERATED["federation"], "mechanism": mechanism}
    privacy = {"mechanism": "none", "epsilon": None, "noise_multiplier": None}
    recipe = recipe_file(tmp_path, **{**FEDERATED, "federation": federation, "privacy": privacy})
    run = Path(workflow.federate(recipe, out=tmp_path / "runs")["run"])
    claim = json.loads((run / "reports" / "privacy.json").read_text())
    readers = show(run / "server" / "ledger.db")["epsilon"]
    assert 0 < readers < claim["epsilon"] == pytest.approx(show(run / "sites" / "site-1" / "ledger.db")["epsilon"])
    assert any(f"if the server is trusted: ({readers:.4g}, 1e-05)" in sentence for sentence in claim["boundary"])


def test_a_federation_of_nobody_is_refused_with_every_sites_reason(tmp_path, own_home):
    recipe = recipe_file(tmp_path, **{**FEDERATED, "privacy": {"mechanism": "none"}})
    with pytest.raises(PrivacyRefused, match="none of them took part") as caught:
        workflow.federate(recipe, out=tmp_path / "runs", rounds=1)
    assert [refusal["code"] for refusal in caught.value.refusals] == ["not_private"] * 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"engine": "post"}, "engine = post"), ({"sites": 0}, "sites = 0"), ({"rounds": 0}, "rounds = 0")],
)
def test_what_a_federation_cannot_be_is_refused(tmp_path, asked, words):
    with pytest.raises(UsageError, match=words):
        workflow.federate(recipe_file(tmp_path, **FEDERATED), out=tmp_path / "runs", **asked)


def test_an_interrupted_federation_goes_on_where_it_was(tmp_path, own_home):
    federation = {**FEDERATED["federation"], "rounds": 3}
    recipe = recipe_file(tmp_path, **{**FEDERATED, "federation": federation})
    half = workflow.federate(recipe, out=tmp_path / "runs", progress=Interrupt("round 1/3"))
    assert (half["stopped"], half["rounds"], half["quality"]) == ("interrupted", 1, {})
    with pytest.raises(UsageError, match="another than that of"):
        workflow.federate(recipe, out=tmp_path / "runs", rounds=2, resume=True)
    again = Interrupt()
    whole = workflow.federate(recipe, out=tmp_path / "runs", resume=True, progress=again)
    assert whole["run"] == half["run"] and whole["rounds"] == 3
    assert not any("round 1/3" in line for line in again.lines)
    for number, site in enumerate(whole["sites"], start=1):
        assert (site["rounds"], site["refused"]) == (3, 0)
        assert show(Path(whole["run"]) / "sites" / f"site-{number}" / "ledger.db")["steps"] == 6
    finished = workflow.federate(recipe, out=tmp_path / "runs", resume=True)
    assert finished["sites"] == whole["sites"] and finished["bytes_up"] == whole["bytes_up"]


@pytest.mark.parametrize(
    ("mechanism", "unit", "trust"),
    [
        ({"kind": "update_level", "noise_multiplier": 30.0}, "site", "local"),
        ({"kind": "central", "noise_multiplier": 6.0}, "site", "central"),
    ],
)
def test_a_federation_whose_unit_is_the_site(tmp_path, own_home, mechanism, unit, trust):
    drawn = {"selection": {"kind": "uniform", "rate": 0.999}} if trust == "central" else {}
    sections = {
        **FEDERATED,
        "federation": {**FEDERATED["federation"], "mechanism": mechanism, **drawn},
        "privacy": {"mechanism": "none", "unit": "person", "records_per_unit": 2, "noise_multiplier": None},
    }
    answer = workflow.federate(recipe_file(tmp_path, **sections), out=tmp_path / "runs")
    run = Path(answer["run"])
    claim = json.loads((run / "reports" / "privacy.json").read_text())
    assert (claim["unit"], claim["trust_model"].split(":")[0]) == (unit, trust)
    assert claim["mechanism"]["rounds_spent"] == 2
    assert claim["epsilon"] == pytest.approx(answer["epsilon"])
    book = run / "server" if trust == "central" else run / "sites" / "site-1"
    assert show(book / "ledger.db")["steps"] == 2
    assert (run / "server" / "ledger.db").exists() == (trust == "central")
    cost = json.loads((run / "reports" / "cost.json").read_text())
    telling = [cost[name] for name in ("steps", "bytes_sent", "seconds", "processor_seconds", "units_per_second")]
    assert telling == [None] * 5 if drawn else None not in telling  # they grow with how many were drawn
    page = (run / "reports" / "report.html").read_text()
    assert "Parameters" in page and ("Units a second" in page) == (not drawn)
    wrong = {**sections, "privacy": FEDERATED["privacy"]}
    with pytest.raises(UsageError, match=r"federation\.mechanism says what protects"):
        workflow.federate(recipe_file(tmp_path, **wrong), out=tmp_path / "runs")


def test_a_federation_without_privacy_is_only_where_a_policy_allows_it(tmp_path, own_home):
    policy = tmp_path / "policy.yaml"
    policy.write_text("allow_not_private: true\nmax_rounds: 1\n")
    recipe = recipe_file(tmp_path, **{**FEDERATED, "privacy": {"mechanism": "none", "noise_multiplier": None}})
    answer = workflow.federate(recipe, out=tmp_path / "runs", policy=policy)
    assert answer["epsilon"] is None and [site["rounds"] for site in answer["sites"]] == [1, 1]
    report = json.loads((Path(answer["run"]) / "reports" / "federation.json").read_text())
    assert [out["code"] for out in report["rounds"][1]["left_out"]] == ["rounds_limit"] * 2
    assert report["rounds"][1]["discarded"].startswith("0 of 2 sites")


def test_sites_that_hold_parts_and_rounds_that_end_early(tmp_path, own_home):
    """C trains the text encoder alone; patience 1 with a learning rate that spoils the model ends the rounds."""
    federation = {"sites": 3, "rounds": 5, "local_steps": 2, "patience": 1, "holds": {"C": ["text_encoder"]}}
    recipe = recipe_file(
        tmp_path,
        **{
            **FEDERATED,
            "data": {"units": 480},
            "federation": federation,
            "training": {"learning_rate": 30.0, "optimizer": "sgd"},
        },
    )
    lines = Interrupt()
    answer = workflow.federate(recipe, out=tmp_path / "runs", progress=lines)
    report = json.loads((Path(answer["run"]) / "reports" / "federation.json").read_text())
    assert answer["rounds"] < 5 and "lowest in round" in report["stopped"]
    up = report["rounds"][0]["bytes_up"]
    assert 0 < up < 3 * json.loads((Path(answer["run"]) / "reports" / "cost.json").read_text())["parameters"] * 4
    with pytest.raises(UsageError, match=r"federation\.holds\.nobody"):
        bad = {**FEDERATED, "federation": {**federation, "holds": {"nobody": ["x"]}}}
        workflow.federate(recipe_file(tmp_path, **bad), out=tmp_path / "runs")


def test_sites_with_too_few_units_have_no_plan(tmp_path):
    with pytest.raises(PrivacyRefused) as caught:
        workflow.federate(recipe_file(tmp_path, **FEDERATED), out=tmp_path / "runs", sites=3)
    assert {refusal["code"] for refusal in caught.value.refusals} == {"too_few_units"}


def test_a_run_that_a_limit_of_its_account_has_no_room_for_is_refused_before_it_trains(tmp_path, own_home):
    privacy = {"noise_multiplier": 1.0, "account_epsilon": 1.0}
    with pytest.raises(PrivacyRefused, match="of this plan there is room for") as refused:
        workflow.train(recipe_file(tmp_path, privacy=privacy), out=tmp_path / "runs")
    assert (refused.value.code, refused.value.exit_code) == ("account_limit", 3)
    left = [path.name for path in (tmp_path / "runs" / "tiny" / "v1").iterdir()]
    assert "plan.json" in left and not {"ledger.db", "metrics.jsonl", "resolved.yaml"} & set(left)
    with pytest.raises(UsageError, match="keeps no limit"):
        workflow.train(
            recipe_file(tmp_path, privacy={"mechanism": "none", "noise_multiplier": None, "account_epsilon": 1.0}),
            out=tmp_path / "runs",
        )
