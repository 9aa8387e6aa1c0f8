"""The main job at toy size, as a person would type it: train, look, release, verify; then what must be refused."""

import json
import shutil
from pathlib import Path

import pytest

from sfumato.cli.main import run

SMALL = [
    "data.units=400", "data.public_units=200", "training.steps=6", "training.expected_batch_size=40",
    "model.backbone.width=32", "model.backbone.depth=1", "model.text.width=16", "model.text.buckets=64",
    "evaluation.judge_seconds=2", "evaluation.samples=40", "evaluation.twin=false", "audit.members=60", "audit.draws=2",
]  # fmt: skip


def _sfumato(capsys, *arguments):
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's own machine: account, key and runs are here and nowhere else."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CONFIG", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def trained(home):
    assert run(["train", "clinic", *[part for value in SMALL for part in ("--set", value)]]) == 0
    return home / "runs" / "clinic" / "last"


def test_a_training_leaves_everything_that_is_documented(trained, capsys):
    for name in (
        "recipe.yaml", "resolved.yaml", "plan.json", "ledger.db", "data_card.json", "metrics.jsonl", "model", "checkpoints",
        "samples/final.png", "reports/privacy.json", "reports/quality.json", "reports/audit.json", "reports/cost.json",
        "reports/report.html", "bundle/manifest.json", "bundle/signature.json",
    ):  # fmt: skip
        assert (trained / name).exists(), name
    code, listed = _sfumato(capsys, "runs")
    assert code == 0
    assert [item["state"] for item in listed["runs"]] == ["released"]


def test_the_ledger_holds_every_step_and_the_account_too(trained, home, capsys):
    code, shown = _sfumato(capsys, "ledger", "verify", str(trained))
    assert code == 0
    assert sum(event["count"] for event in shown["events"]) == 6
    assert shown["epsilon"] <= 8.0
    (account,) = home.rglob("account.db")
    code, shown = _sfumato(capsys, "ledger", "show", str(account))
    assert code == 0
    assert sum(event["count"] for event in shown["events"]) == 6


def test_a_stranger_accepts_the_bundle_and_not_a_changed_one(trained, home, capsys, tmp_path):
    code, answer = _sfumato(
        capsys, "verify", str(trained / "bundle"), "--key", str(home / "config/sfumato/signing-key.pub.pem")
    )
    assert code == 0
    assert answer["valid"]
    assert answer["epsilon"] == json.loads((trained / "reports/privacy.json").read_text())["epsilon"]
    copy = tmp_path / "bundle"
    shutil.copytree(trained / "bundle", copy)
    card = copy / "README.md"
    card.write_bytes(card.read_bytes()[:-1] + b"!")
    code, answer = _sfumato(capsys, "verify", str(copy))
    assert code == 4
    assert not answer["valid"]


def test_a_stranger_who_does_not_know_the_signer_refuses(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _sfumato(capsys, "verify", str(trained / "bundle"))[0] == 4


@pytest.mark.parametrize("source", ["", "bundle"])
def test_pictures_come_from_the_run_and_from_the_bundle(source, trained, capsys, tmp_path):
    code, answer = _sfumato(
        capsys, "generate", str(trained / source), "--text", "a small nodule", "--count", "2", "--out", str(tmp_path)
    )
    assert code == 0
    assert len(answer["files"]) == 2
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in answer["files"])


def test_the_public_report_is_written_beside_the_internal_one(trained, capsys):
    code, answer = _sfumato(capsys, "report", str(trained), "--public")
    assert code == 0
    assert Path(answer["html"]).is_file()
    assert Path(answer["html"]) != (trained / "reports/report.html").resolve()


def test_the_gate_follows_the_policy(trained, capsys, tmp_path):
    (tmp_path / "strict.yaml").write_text("max_epsilon: 1\n")
    code, answer = _sfumato(capsys, "release", str(trained), "--policy", str(tmp_path / "strict.yaml"))
    assert code == 3
    assert answer["approved"] is False
    assert all({"code", "message", "next"} <= set(reason) for reason in answer["reasons"])
    (tmp_path / "wrong.yaml").write_text("max_epsilom: 1\n")
    assert _sfumato(capsys, "release", str(trained), "--policy", str(tmp_path / "wrong.yaml"))[0] == 2


def test_what_cannot_work_is_refused_before_anything_is_spent(home, capsys):
    code, answer = _sfumato(capsys, "train", "clinic", "--set", "data.units=50")
    assert code == 3
    assert {refusal["code"] for refusal in answer["refusals"]} >= {"too_few_units"}
    assert _sfumato(capsys, "train", "clinic", "--set", "privacy.epsilom=4")[0] == 2
    assert _sfumato(capsys, "train", "no-such-recipe")[0] == 2
    assert _sfumato(capsys, "evaluate", "runs/nowhere")[0] == 2
