"""``privacy.max_grad_norm: auto``: one run from its recipe to a bundle that a stranger verifies, and what a stop leaves."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.test_workflow import STEPS, Interrupt, recipe_file

from sfumato import workflow
from sfumato.errors import LedgerError, UsageError, VerificationFailed
from sfumato.privacy.clip_estimate import with_estimated_bound
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.plan import Composition, Estimate
from sfumato.privacy.plan_json import plan_from_dict
from sfumato.privacy.settings import ClipEstimateSettings, PrivacySettings
from sfumato.release import verify
from sfumato.release.claims import check_estimates
from sfumato.training.bound import found_bound

AUTO: dict[str, Any] = {
    "epsilon": 6.0, "noise_multiplier": None, "max_grad_norm": "auto", "clip_estimate": {"share": 0.1, "quantile": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CONFIG", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        yield home


@pytest.fixture(scope="module")
def finished(tmp_path_factory, home) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("auto")
    return workflow.train(recipe_file(folder, privacy=AUTO), out=folder / "runs")


def read(run: str, name: str) -> Any:
    return json.loads((Path(run) / name).read_text())


def test_the_run_spends_one_epsilon_on_both_and_says_so(finished):
    run, claim = finished["run"], read(finished["run"], "reports/privacy.json")
    plan = plan_from_dict(read(run, "plan.json"))
    assert isinstance(plan, Composition)
    assert 5.99 < finished["epsilon"] == claim["epsilon"] <= 6.0
    estimate, steps = claim["mechanism"]["stages"]
    assert (estimate["name"], steps["name"], steps["steps_spent"]) == ("estimate", "dp_sgd", STEPS)
    assert steps["max_grad_norm"] == "estimated" and any("private estimate" in line for line in claim["boundary"])
    (found,) = claim["estimates"]
    assert found == read(run, "estimates.json") and found["covered_by"] == "charged"
    assert found["low"] <= found["value"] <= found["high"] and found["std"] == estimate["noise_std"]
    spent = show(Path(run) / "ledger.db")
    assert sorted(event["count"] for event in spent["events"]) == [1, STEPS]
    assert spent["epsilon"] == claim["epsilon"]


def test_the_log_and_the_page_count_the_estimate_from_the_beginning(finished):
    run = Path(finished["run"])
    logged = [json.loads(line)["epsilon"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0.59 < logged[0] and logged[-1] == pytest.approx(finished["epsilon"])
    public = workflow.report(run, public=True)
    trajectory = json.loads(Path(public["json"]).read_text())["trajectory"]
    assert trajectory[0][0] == 0 and 0.59 < trajectory[0][1] <= 0.6
    assert trajectory[-1] == [STEPS, pytest.approx(finished["epsilon"])]
    html = Path(public["html"]).read_text()
    assert "Estimated and paid for" in html and "norms of the gradients" in html and "dp_sgd" in html


def test_a_stranger_recomputes_it(finished):
    result = verify.verify(Path(finished["bundle"]))
    assert result["valid"], [check for check in result["checks"] if not check["ok"]]
    assert result["epsilon"] == pytest.approx(finished["epsilon"], abs=1e-6)
    card = (Path(finished["bundle"]) / "README.md").read_text()
    assert re.search(r"max_grad_norm: .?estimated", card)


def test_a_resume_takes_the_bound_that_was_paid_for_and_pays_no_second(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "own-data"))
    file, train = recipe_file(tmp_path, privacy=AUTO), partial(workflow.train, out=tmp_path / "runs")
    stopped = train(file, progress=Interrupt(at="step 1/"))
    assert stopped["stopped"] == "interrupted"
    before = read(stopped["run"], "estimates.json")
    ended = train(file, resume=True)
    assert ended["stopped"] == "steps" and read(ended["run"], "estimates.json") == before
    assert sorted(event["count"] for event in show(Path(ended["run"]) / "ledger.db")["events"]) == [1, STEPS]


def test_an_answer_that_was_paid_for_and_lost_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "own-data"))
    file, train = recipe_file(tmp_path, privacy=AUTO), partial(workflow.train, out=tmp_path / "runs")
    stopped = train(file, progress=Interrupt(at="step 1/"))
    (Path(stopped["run"]) / "estimates.json").unlink()
    with pytest.raises(LedgerError, match="was charged, but its answer is not in the run") as refused:
        train(file, resume=True)
    assert refused.value.code == "estimate_lost"


def test_an_answer_that_the_ledger_does_not_know_is_not_taken(tmp_path):
    """The run's folder has one; its ledger was set back to before it was charged."""
    plan = with_estimated_bound(
        epsilon=2.0, share=0.1, quantile=0.5, population=1_000, delta=1e-4, expected_batch_size=50.0, steps=10
    )
    estimate = plan.stages[0]
    assert isinstance(estimate, Estimate)
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        with pytest.raises(LedgerError, match="its event is not in the ledger"):
            found_bound(None, None, estimate, ledger, kept=lambda: {"value": 1.0}, keep=print)  # pyright: ignore
        ledger.reserve(estimate.events()[0], 0)
        assert found_bound(None, None, estimate, ledger, kept=lambda: {"value": 1.0}, keep=print) == {"value": 1.0}  # pyright: ignore


def test_the_plan_says_what_the_estimate_costs(tmp_path):
    asked = workflow.plan(recipe_file(tmp_path, privacy=AUTO))
    assert asked["max_grad_norm"] == "estimated" and 5.99 < asked["epsilon"] <= 6.0
    assert asked["clip_estimate"]["question"]["kind"] == "quantile" and asked["refusals"] == []


def test_a_federation_does_not_estimate_yet(tmp_path):
    with pytest.raises(UsageError, match="max_grad_norm = auto"):
        workflow.federate(recipe_file(tmp_path, privacy=AUTO), sites=2, rounds=1, out=tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"max_grad_norm": "auto", "epsilon": None, "noise_multiplier": 1.0},
        {"max_grad_norm": "auto", "mechanism": "none"},
        {"clip_estimate": ClipEstimateSettings()},
        {"max_grad_norm": 0.0},
    ],
)
def test_settings_that_contradict_themselves_are_refused(values):
    with pytest.raises(UsageError):
        PrivacySettings(**values)


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 1.0}, {"quantile": 0.0}, {"quantile": float("nan")}])
def test_a_share_or_quantile_out_of_range_is_refused(values):
    with pytest.raises(UsageError):
        ClipEstimateSettings(**values)


def test_an_estimate_that_the_plan_does_not_know_is_not_believed():
    plan = with_estimated_bound(
        epsilon=2.0, share=0.1, quantile=0.5, population=1_000, delta=1e-4, expected_batch_size=50.0, steps=10
    )
    estimate = plan.stages[0]
    good = {"of": estimate.name, "name": "value", "value": 1.0, "std": estimate.noise_std, "low": 0.5, "high": 2.0}  # pyright: ignore
    good |= {"confidence": 0.95, "covered_by": "charged"}
    check_estimates([good], plan)
    for wrong in (
        [], [good, good], [{**good, "of": "another"}], [{**good, "std": 0.0}], [{**good, "value": "1"}], [{**good, "more": 1}],
        [{**good, "covered_by": "public"}], [{**good, "low": float("nan")}], "none",
    ):  # fmt: skip
        with pytest.raises(VerificationFailed):
            check_estimates(wrong, plan)
