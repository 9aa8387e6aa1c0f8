"""A release before the first step, from recipe to verified bundle at toy size; killed at every boundary; paid for once."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.end_to_end.test_releases import AXES, TINY, rebuilt
from tests.test_workflow import Interrupt

from sfumato import measuring, stages, warm_parts, warming, workflow
from sfumato.cli.plan import _words
from sfumato.errors import BudgetExhausted, LedgerError, UsageError
from sfumato.privacy.ledger import show
from sfumato.privacy.plan_json import plan_from_dict
from sfumato.privacy.warm_planning import warmed
from sfumato.release import keys, verify

STEPS = 5
RELEASES: dict[str, dict[str, Any]] = {
    "class moments": {
        "kind": "class_moments",
        "image": {"kind": "cosine", "kept": 4},
        "classes": [{"name": "left", "more": ["left"]}, {"name": "right", "more": ["right"]}],
    },
    "mean embedding": {
        "kind": "mean_embedding",
        "image": {"kind": "cosine", "kept": 3},
        "text": {"kind": "terms", "axes": AXES},
        "backbone": {"kind": "mlp", "width": 16, "depth": 1},
        "steps": 4,
    },
}


def recipe_file(folder: Path, name: str = "class moments", **privacy: Any) -> str:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    values["model"]["warm_start"] = {
        "release": RELEASES[name], "records": 40, "steps": 4, "records_at_once": 20,
    }  # fmt: skip
    values["privacy"] |= {"warm_start": {"share": 0.1}, **privacy}
    path = folder / "recipe.yaml"
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
        monkeypatch.setattr(module, name, lambda *args, **rest: None)
    monkeypatch.setattr(stages, "release", lambda *args: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        set_home(folder / "home", patch)
        recipe = recipe_file(folder)
        lines = Interrupt()
        yield recipe, workflow.train(recipe, out=folder / "runs", progress=lines), keys.own(), lines.lines


def counts(run: Path | str) -> list[int]:
    return sorted(event["count"] for event in show(Path(run) / "ledger.db")["events"])


def read(run: Path | str, name: str) -> Any:
    return json.loads((Path(run) / name).read_text())


def test_one_epsilon_for_both_and_everybody_says_so(finished):
    recipe, answer, _, lines = finished
    planned = workflow.plan(recipe)
    assert 7.99 < planned["epsilon"] <= 8.0 and answer["epsilon"] == pytest.approx(planned["epsilon"], abs=1e-9)
    words = _words(planned)
    assert "before the steps: warm start" in words and f"{planned['warm_start']['noise_multiplier']:.4g}" in words
    assert any("a release to start from for epsilon" in line for line in lines)
    run = Path(answer["run"])
    assert counts(run) == [1, STEPS] and (answer["stopped"], answer["reasons"]) == ("steps", [])
    claim = read(run, "reports/privacy.json")
    release, steps = claim["mechanism"]["stages"]
    assert (release["name"], steps["name"], steps["steps_spent"]) == ("mean_embedding", "dp_sgd", STEPS)
    assert any("charged before the first step, with 0.1 of the guarantee" in line for line in claim["boundary"])
    assert any("texts, not the pictures, of half of the public units" in line for line in claim["boundary"])
    logged = [json.loads(line)["epsilon"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    alone = warmed(plan_from_dict(read(run, "plan.json")))
    assert alone is not None and logged[0] > alone.epsilon() and logged[-1] == pytest.approx(answer["epsilon"])
    public = workflow.report(run, public=True)
    trajectory = read(Path(public["json"]).parent, Path(public["json"]).name)["trajectory"]
    assert trajectory[0] == [0, pytest.approx(alone.epsilon(), abs=1e-3)]
    html = Path(public["html"]).read_text()
    assert "mean_embedding" in html and "40 records were drawn from it" in html
    assert "40 records were drawn from it" in Path(answer["bundle"], "README.md").read_text()


def test_a_stranger_recomputes_it_and_a_lie_is_refused(finished, tmp_path):
    _, answer, key, _ = finished
    result = verify.verify_with(Path(answer["bundle"]), {key.public.id: key.public})
    assert result["valid"], [check for check in result["checks"] if not check["ok"]]
    claim = read(answer["run"], "reports/privacy.json")
    alone = claim["mechanism"]["stages"][1]
    for number, changes in enumerate(
        ({"mechanism": alone}, {"mechanism__stages__0__noise_multiplier": 99.0}, {"epsilon": 4.0})
    ):
        lied = rebuilt(Path(answer["run"]), tmp_path / str(number), key, **changes)
        assert not lied["valid"], changes


def test_the_private_steps_begin_at_the_weights_that_the_release_made(tmp_path, monkeypatch, trains_only):
    """And those are not the random ones."""
    from sfumato.training import loop

    begun: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    true = loop.train

    def weights(model) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def seen(model, table, plan, settings, performance, **rest):
        before = weights(model)
        result = true(model, table, plan, settings, performance, **rest)
        begun.append((type(plan).__name__, before, weights(model)))
        return result

    monkeypatch.setattr(loop, "train", seen)
    workflow.train(recipe_file(tmp_path), out=tmp_path / "runs")
    (_, random, warm), (kind, start, _) = begun[:2]
    assert kind == "DpSgd" and torch.equal(start, warm) and not torch.equal(warm, random)


@pytest.mark.parametrize("name", ["mean embedding", "class moments"])
def test_ctrl_c_and_resume_at_each_of_its_trainings(tmp_path, name, trains_only):
    recipe, train = recipe_file(tmp_path, name), partial(workflow.train, out=tmp_path / "runs")
    begun = train(recipe, progress=Interrupt(at="warm start, model: step 1/"))
    assert begun["stopped"] == "interrupted" and counts(begun["run"]) == [1]
    released = (Path(begun["run"]) / "released" / "warm_start.safetensors").read_bytes()
    if name == "mean embedding":
        assert (Path(begun["run"]) / "warm" / "generator").is_dir()
    again = train(recipe, resume=True, progress=Interrupt(at="· epsilon "))
    ended = train(recipe, resume=True)
    assert ended["run"] == again["run"] == begun["run"] and ended["stopped"] == "steps"
    assert counts(ended["run"]) == [1, STEPS]
    assert (Path(ended["run"]) / "released" / "warm_start.safetensors").read_bytes() == released


_KILLED = """
import os, signal, sys
from sfumato import starting, warm_parts, warming, workflow

def dies(*args, **rest):
    os.kill(os.getpid(), signal.SIGKILL)

at, recipe, out = sys.argv[1:]
if at == "released":
    warm_parts.draw = dies
elif at == "learnt":
    true = starting.Start.train
    def killed(*args):
        true(*args)
        dies()
    starting.Start.train = killed
elif at == "begun":
    true = warming.begin
    def killed(*args, **rest):
        true(*args, **rest)
        dies()
    warming.begin = killed
elif at == "charged":
    warm_parts.release = dies
workflow.train(recipe, out=out)
"""


def killed(at: str, recipe: str, out: Path) -> Path:
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, at, recipe, str(out)], env=dict(os.environ), capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    return (out / "tiny" / "last").resolve()


@pytest.mark.parametrize("at", ["released", "learnt", "begun"])
def test_a_kill_after_the_release_charges_nothing_twice(tmp_path, at, trains_only):
    recipe = recipe_file(tmp_path)
    run = killed(at, recipe, tmp_path / "runs")
    assert counts(run) == [1]
    released = (run / "released" / "warm_start.safetensors").read_bytes()
    ended = workflow.train(recipe, out=tmp_path / "runs", resume=True)
    assert Path(ended["run"]).resolve() == run and counts(run) == [1, STEPS]
    assert (run / "released" / "warm_start.safetensors").read_bytes() == released
    assert 7.99 < ended["epsilon"] <= 8.0


def test_a_kill_between_charge_and_release_loses_it_and_the_run_says_so(tmp_path):
    recipe = recipe_file(tmp_path)
    run = killed("charged", recipe, tmp_path / "runs")
    assert counts(run) == [1] and not (run / "released").exists()
    with pytest.raises(BudgetExhausted, match="charged, and not there"):
        workflow.train(recipe, out=tmp_path / "runs", resume=True)
    assert counts(run) == [1]


def test_a_release_that_the_ledger_does_not_know_is_not_taken(finished, tmp_path):
    """The run's folder has it, its ledger is a fresh one: nothing of it was charged there."""
    from sfumato import recipe as recipes
    from sfumato.privacy.ledger import Ledger

    recipe, answer, _, _ = finished
    run = stages.folders.existing(Path(answer["run"]))
    plan = stages.plan_of(run)
    release = warmed(plan)
    assert release is not None
    wanted = recipes.load(recipe)
    with Ledger.open(tmp_path / "ledger.db", run="tiny/v1", plan=plan) as book:
        with pytest.raises(LedgerError):
            warming.begin(run, book, wanted, release, stages.build(wanted), [], ["left side"], print)
        assert book.spent() == []


def test_without_usable_public_texts_it_is_refused_before_anything_is_charged(tmp_path):
    values = yaml.safe_load(Path(recipe_file(tmp_path)).read_text())
    values["model"]["warm_start"]["release"]["classes"] = [{"name": "neither", "more": ["neither"]}]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match="none of these says a class"):
        workflow.train(str(tmp_path / "none.yaml"), out=tmp_path / "runs")
    assert counts(tmp_path / "runs" / "tiny" / "v1") == []


@pytest.mark.slow  # a whole run; the plan of it is in tests/privacy/test_warm_planning.py
def test_a_bound_estimated_at_the_warm_weights_is_one_more_stage(tmp_path):
    recipe = recipe_file(tmp_path, max_grad_norm="auto", clip_estimate={"share": 0.1, "quantile": 0.5})
    answer = workflow.train(recipe, out=tmp_path / "runs")
    assert counts(answer["run"]) == [1, 1, STEPS] and 7.99 < answer["epsilon"] <= 8.0
    assert verify.verify(answer["bundle"])["valid"]


def test_nothing_is_drawn_where_the_private_steps_have_a_checkpoint(tmp_path, monkeypatch, trains_only):
    recipe = recipe_file(tmp_path)
    stopped = workflow.train(recipe, out=tmp_path / "runs", progress=Interrupt(at="· epsilon "))
    assert stopped["stopped"] == "interrupted"
    monkeypatch.setattr(warm_parts, "draw", lambda *args: pytest.fail("drawn again"))
    ended = workflow.train(recipe, out=tmp_path / "runs", resume=True)
    assert ended["stopped"] == "steps" and counts(ended["run"]) == [1, STEPS]
