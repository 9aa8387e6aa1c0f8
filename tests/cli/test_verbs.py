"""Each verb hands over what was typed, prints what came back, and gives a no its exit code."""

import json
from pathlib import Path

import pytest

from sfumato.cli.progress import to_stderr
from sfumato.errors import PrivacyRefused

FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6, "extractor": "judge", "baseline": {"real held-out": 0.9}}
REASON = {"code": "epsilon", "message": "epsilon = 20 · at most 10", "next": "Train with less."}
TRAINED = {
    "run": "runs/clinic/v1", "epsilon": 8.0, "delta": 1e-6, "steps": 3, "seconds": 1.5, "quality": {"side": FIGURE},
    "bundle": "runs/clinic/v1/bundle",
}  # fmt: skip


def test_plan_hands_over_what_was_asked(workflow, sfu):
    workflow.answers["plan"] = {
        "noise_multiplier": 16.92,
        "epsilon": 1.0,
        "delta": 1e-5,
        "accountants": {"pld": 1.0},
        "refusals": [],
    }
    ran = sfu(
        "plan", "--population", "60000", "--expected-batch-size", "4096", "--steps", "4394", "--epsilon", "1",
        "--delta", "1e-5", "--json",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.json == workflow.answers["plan"]
    assert workflow.asked == [
        (
            "plan",
            (None,),
            {
                "assignments": [], "population": 60000, "expected_batch_size": 4096, "steps": 4394, "epsilon": 1.0,
                "delta": 1e-5, "accountant": "pld",
            },
        )
    ]  # fmt: skip


def test_plan_in_words_shows_noise_and_warnings(workflow, sfu):
    workflow.answers["plan"] = {"noise_multiplier": 16.92, "epsilon": 1.0, "warnings": [REASON], "refusals": []}
    ran = sfu("plan", "clinic")
    assert "16.92" in ran.out
    assert REASON["next"] in ran.out


@pytest.mark.parametrize(
    "answer", [{"refusals": [REASON]}, PrivacyRefused("no", refusals=[REASON])], ids=["told", "raised"]
)
def test_a_refused_plan_is_exit_3_with_its_refusals(answer, workflow, sfu):
    workflow.answers["plan"] = answer
    ran = sfu("plan", "clinic", "--json")
    assert ran.code == 3
    assert ran.json["refusals"] == [REASON]
    ran = sfu("plan", "clinic")
    assert ran.code == 3
    assert REASON["message"] in ran.out + ran.err
    assert REASON["next"] in ran.out + ran.err


def test_train_hands_over_and_prints(workflow, sfu):
    workflow.answers["train"] = TRAINED
    ran = sfu(
        "train", "clinic", "--set", "data.units=3000", "--set", "privacy.epsilon=4", "--out", "elsewhere", "--resume"
    )
    assert ran.code == 0
    ((_, positional, named),) = workflow.asked
    assert positional == ("clinic",)
    assert named == {
        "assignments": ["data.units=3000", "privacy.epsilon=4"], "out": Path("elsewhere"), "resume": True, "progress": to_stderr,
    }  # fmt: skip
    assert "runs/clinic/v1/bundle" in ran.out
    assert "real held-out 0.9" in ran.out


def test_the_number_of_processes_is_a_value_of_the_recipe(workflow, sfu):
    workflow.answers["train"] = TRAINED
    assert sfu("train", "clinic", "--set", "data.units=3000", "--processes", "4").code == 0
    ((_, _, named),) = workflow.asked
    assert named["assignments"] == ["data.units=3000", "performance.processes=4"]


def test_a_small_sample_first_is_a_value_of_the_recipe(workflow, sfu):
    workflow.answers["train"] = TRAINED
    assert sfu("train", "clinic", "--limit-units", "200").code == 0
    _, _, named = workflow.asked[-1]
    assert named["assignments"] == ["data.limit_units=200"]


def test_a_training_that_stopped_at_its_budget_is_done(workflow, sfu):
    workflow.answers["train"] = {**TRAINED, "stopped": "budget"}
    ran = sfu("train", "clinic", "--json")
    assert ran.code == 0
    assert ran.json["stopped"] == "budget"


def test_a_training_that_was_interrupted_says_how_to_go_on(workflow, sfu):
    workflow.answers["train"] = {"run": "runs/clinic/v1", "stopped": "interrupted", "epsilon": 3.0}
    assert sfu("train", "clinic", "--json").code == 130
    assert "--resume" in sfu("train", "clinic").out


def test_a_run_without_privacy_says_so(workflow, sfu):
    workflow.answers["train"] = {**TRAINED, "epsilon": None, "bundle": None, "reasons": [REASON]}
    ran = sfu("train", "emoji")
    assert "not private" in ran.out
    assert REASON["message"] in ran.out


def test_federate(workflow, sfu):
    site = {"name": "north", "epsilon": 4.2, "rounds": 3, "refused": False}
    workflow.answers["federate"] = {
        "run": "runs/x/v1",
        "rounds": 3,
        "sites": [site],
        "bytes_up": 10,
        "bytes_down": 20,
        "quality": {},
    }
    ran = sfu("federate", "clinic", "--sites", "3", "--rounds", "3", "--json")
    assert ran.json["sites"] == [site]
    ((_, _, named),) = workflow.asked
    assert (named["sites"], named["rounds"], named["engine"]) == (3, 3, "simulation")
    assert "north" in sfu("federate", "clinic").out
    workflow.answers["federate"]["discarded"] = [1]
    assert "3 · discarded: 1" in sfu("federate", "clinic").out
    assert sfu("federate", "clinic", "--engine", "deployment").code == 0
    assert workflow.asked[-1][2]["engine"] == "deployment"
    assert sfu("federate", "clinic", "--engine", "carrier-pigeons").code == 2


def test_federate_server_site_and_status_are_verbs_of_their_own_and_any_other_word_is_a_recipe(workflow, sfu):
    site = {"name": "north", "epsilon": 4.2, "rounds": 3, "refused": 0}
    workflow.answers["federate_server"] = workflow.answers["federate"] = {"run": "r/v1", "rounds": 3, "sites": [site]}
    ran = sfu(
        "federate", "server", "clinic", "--site", "north=n.pub", "--site", "south=s=1.pub", "--port", "1", "--json"
    )
    assert ran.json["sites"] == [site]
    named = workflow.asked[-1][2]
    assert named["sites"] == {"north": Path("n.pub"), "south": Path("s=1.pub")} and named["port"] == 1
    assert (named["bind"], named["hosts"], named["resume"]) == ("127.0.0.1", ["127.0.0.1"], False)
    for wrong in ("north", "=n.pub", "north="):
        assert sfu("federate", "server", "clinic", "--site", wrong).code == 2
    assert sfu("federate", "server", "clinic").code == 2  # no site

    key = {
        "key": "f/site.key",
        "public_key": "f/site.key.pub",
        "line": "ecdsa-sha2-nistp384 AAAA",
        "identity": "0a" * 32,
    }
    workflow.answers["federate_site"] = key
    assert sfu("federate", "site", "--json").json == key
    assert f"identity    {'0a' * 32}" in sfu("federate", "site").out
    workflow.answers["federate_site"] = {"folder": "f", "round": 2}
    assert "f" in sfu("federate", "site", "--policy", "p.yaml", "--server", "h:1", "--share", "1/2").out
    assert workflow.asked[-1][2]["share"] == "1/2"

    workflow.answers["federate_status"] = {"folder": "f", "pid": 3, "at": 0.0, "running": False, "sites": ["a", "b"]}
    assert "a, b" in sfu("federate", "status", "f").out
    assert sfu("federate", "status", "--json").json["running"] is False

    sfu("federate", "./site")
    assert workflow.asked[-1][0] == "federate" and workflow.asked[-1][1] == ("./site",)


def test_generate(workflow, sfu):
    workflow.answers["generate"] = {"files": ["generated/0.png"], "model": "runs/x/v1", "watermarked": False}
    ran = sfu(
        "generate", "runs/x/last", "--text", "a seven", "--text", "a two", "--count", "2", "--seed", "7", "--json"
    )
    assert ran.json["files"] == ["generated/0.png"]
    ((_, positional, named),) = workflow.asked
    assert positional == (Path("runs/x/last"),)
    nothing = {"images": [], "audios": [], "want": []}
    assert named == {"texts": ["a seven", "a two"], "count": 2, "out": Path("generated"), "seed": 7, **nothing}
    assert "generated/0.png" in sfu("generate", "runs/x/last", "--text", "a").out


def test_evaluate_audit_report_and_runs(workflow, sfu):
    attack = {
        "name": "loss", "auc": 0.51, "tpr_at_fpr": {"0.01": 0.01}, "epsilon_lower_bound": 0.0, "confidence": 0.95, "blind_baseline": 0.5,
    }  # fmt: skip
    workflow.answers = {
        "evaluate": {"quality": {"side": FIGURE}},
        "audit": {"verdict": "CONSISTENT", "because": "0 <= 8", "attacks": [attack], "conformance": []},
        "report": {"html": "a/report.html", "json": "a/report.json"},
        "runs": {"runs": [{"run": "runs/x/v1", "epsilon": None, "steps": 3, "state": "done"}]},
    }
    for arguments, shown in [
        (("evaluate", "r"), "side"),
        (("audit", "r"), "CONSISTENT"),
        (("report", "r", "--public"), "a/report.html"),
        (("runs",), "runs/x/v1"),
    ]:
        assert shown in sfu(*arguments).out
        assert sfu(*arguments, "--json").json == workflow.answers[arguments[0]]
    assert ("report", (Path("r"),), {"public": True}) in workflow.asked


LOOP = str(Path(__file__).parent.parent / "auditing" / "adapters" / "loop.py")


def test_audit_of_a_trainer_gives_24_rows_and_writes_a_report(sfu, tmp_path):
    ran = sfu("audit", "trainer", f"{LOOP}:trainer", "--seed", "1", "--out", str(tmp_path / "report"), "--json")
    assert ran.code == 0
    assert ran.json["verdict"] == "INCONCLUSIVE"  # not every call is given
    assert [row["row"] for row in ran.json["conformance"]] == list(range(1, 25))
    assert {row["verdict"] for row in ran.json["conformance"]} == {"CONSISTENT", "INCONCLUSIVE"}
    assert all(row["check"] and row["because"] for row in ran.json["conformance"])
    assert ran.json["attacks"] == []
    assert "row 24 of 24" in ran.err
    assert (
        (tmp_path / "report" / "conformance.md").read_text().startswith("# Conformance of a plain loop: INCONCLUSIVE")
    )
    written = json.loads((tmp_path / "report" / "conformance.json").read_text())
    assert written["conformance"] == ran.json["conformance"]


def test_audit_of_a_wrong_trainer_is_exit_4(sfu, tmp_path):
    museum = Path(LOOP).parent.parent / "museum"
    ran = sfu("audit", "trainer", f"{museum / 'clip_of_the_mean.py'}:wrong", "--seed", "1")
    assert ran.code == 4
    assert "the claim is false: row 1, 4, 17." in ran.out
    assert "the aggregate is clipped, not the example" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trainer",), "needs MODULE:FUNCTION"),
        (("trainer", "nothing"), "must be MODULE:FUNCTION"),
        (("runs/x/last", "m:f"), "is for `audit trainer` only"),
        (("runs/x/last", "--seed", "1"), "is for `audit trainer` only"),
        (("runs/x/last", "--out", "d"), "is for `audit trainer` only"),
    ],
)
def test_audit_that_is_neither_is_wrong_use(arguments, said, workflow, sfu):
    ran = sfu("audit", *arguments, "--json")
    assert ran.code == 2
    assert said in ran.json["error"]["message"]
    assert workflow.asked == []


def test_a_refused_release_is_exit_3_with_reasons(workflow, sfu):
    workflow.answers["release"] = {"bundle": None, "approved": False, "reasons": [REASON]}
    ran = sfu("release", "runs/x/last", "--policy", "p.yaml", "--json")
    assert ran.code == 3
    assert ran.json["reasons"] == [REASON]
    assert workflow.asked == [("release", (Path("runs/x/last"),), {"policy": Path("p.yaml")})]
    workflow.answers["release"] = {"bundle": "b", "approved": True, "reasons": []}
    assert sfu("release", "runs/x/last").code == 0


def test_verify_of_what_is_no_bundle_fails_with_a_code(tmp_path, sfu):
    assert sfu("verify", str(tmp_path / "missing"), "--json").code == 2
    (tmp_path / "bundle").mkdir()
    ran = sfu("verify", str(tmp_path / "bundle"), "--json")
    assert ran.code == 4
    assert ran.json["valid"] is False
    assert any(not check["ok"] for check in ran.json["checks"])
    assert "NOT VALID\nnext: Do not use this bundle" in sfu("verify", str(tmp_path / "bundle")).out


def test_ledger_show_and_verify_of_a_real_ledger(tmp_path, sfu):
    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.plan import DpSgd

    plan = DpSgd(population=10_000, expected_batch_size=100, steps=50, noise_multiplier=1.0, delta=1e-5)
    with Ledger.open(tmp_path / "ledger.db", run="x", plan=plan) as ledger:
        for step in range(3):
            ledger.commit(ledger.reserve(plan.event(1), step))
    shown = sfu("ledger", "show", str(tmp_path), "--json")
    assert shown.code == 0
    assert shown.json["events"][0]["count"] == 3
    assert shown.json["epsilon"] > 0
    assert sfu("ledger", "verify", str(tmp_path / "ledger.db")).code == 0


def test_a_changed_ledger_fails_verification(tmp_path, sfu):
    import sqlite3

    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.plan import DpSgd

    plan = DpSgd(population=10_000, expected_batch_size=100, steps=50, noise_multiplier=1.0, delta=1e-5)
    path = tmp_path / "ledger.db"
    with Ledger.open(path, run="x", plan=plan) as ledger:
        ledger.commit(ledger.reserve(plan.event(1), 0))
        ledger.commit(ledger.reserve(plan.event(1), 1))
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM entries WHERE sequence = 2")
    connection.close()
    ran = sfu("ledger", "verify", str(path), "--json")
    assert ran.code == 4
    assert ran.json["valid"] is False


def test_a_ledger_says_who_signed_it_and_an_unknown_signer_fails_verification(tmp_path, sfu, monkeypatch):
    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.plan import DpSgd
    from sfumato.release import keys

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    own, stranger = keys.own(), keys.SigningKey.generate()
    plan = DpSgd(population=10_000, expected_batch_size=100, steps=50, noise_multiplier=1.0, delta=1e-5)
    for name, key in (("own", own), ("stranger", stranger)):
        with Ledger.open(
            tmp_path / f"{name}.db", run=name, plan=plan, account=tmp_path / "account.db", sign=keys.signer(key)
        ) as ledger:
            ledger.commit(ledger.reserve(plan.event(1), 0))
    ran = sfu("ledger", "verify", str(tmp_path / "own.db"), "--json")
    assert (ran.code, ran.json["signer"]) == (0, own.public.id)
    ran = sfu("ledger", "verify", str(tmp_path / "stranger.db"), "--json")
    assert (ran.code, ran.json["valid"]) == (4, False)
    public = tmp_path / "stranger.pem"
    public.write_bytes(stranger.public.pem())
    assert sfu("ledger", "verify", str(tmp_path / "stranger.db"), "--key", str(public)).code == 0
    assert sfu("ledger", "verify", str(tmp_path / "own.db"), "--key", str(public)).code == 4
    shown = sfu("ledger", "show", str(tmp_path / "account.db"), "--json")
    assert [run["run"] for run in shown.json["runs"]] == ["own", "stranger"]
    assert shown.json["epsilon"] > 0 and shown.json["valid"]
    assert "stranger" in sfu("ledger", "show", str(tmp_path / "account.db")).out
    assert sfu("ledger", "show", str(tmp_path / "own.db"), "--json").json["trajectory"][-1][0] == 1


def test_a_file_that_is_no_ledger_fails_verification(tmp_path, sfu):
    (tmp_path / "ledger.db").write_bytes(b"nothing of ours" * 100)
    assert sfu("ledger", "verify", str(tmp_path), "--json").code == 4


def test_a_ledger_that_is_not_there_is_wrong_use(tmp_path, sfu):
    assert sfu("ledger", "show", str(tmp_path / "ledger.db"), "--json").code == 2


def test_data_fetch_of_an_unknown_set_is_wrong_use(sfu):
    ran = sfu("data", "fetch", "imagenet", "--json")
    assert ran.code == 2
    assert "imagenet" in ran.json["error"]["message"]


def test_data_check_and_stats_of_a_folder(tmp_path, sfu):
    from PIL import Image

    lines = []
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"grey {i}", "patient": f"p{i // 2}"})
    (tmp_path / "3.png").write_bytes(b"not an image")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    ran = sfu("data", "check", str(tmp_path), "--unit-column", "patient", "--json")
    assert ran.code == 0
    assert ran.json["records"] == 6
    assert any("3.png" in problem["problem"] for problem in ran.json["problems"])
    assert "3.png" in sfu("data", "check", str(tmp_path), "--unit-column", "patient").out
    assert sfu("data", "stats", str(tmp_path), "--unit-column", "patient", "--json").json["units"] == 3
    assert (
        sfu("data", "stats", str(tmp_path), "--unit-column", "patient", "--limit-units", "2", "--json").json["units"]
        == 2
    )


def test_data_clear_removes_the_cache_and_not_the_account(tmp_path, sfu):
    cache = tmp_path / ".sfumato" / "cache" / "records-x-y"
    cache.mkdir(parents=True)
    (cache / "records.arrow").write_bytes(b"private")
    (tmp_path / ".sfumato" / "account.db").write_bytes(b"spent")
    ran = sfu("data", "clear", str(tmp_path), "--json")
    assert (ran.code, ran.json["removed"], ran.json["bytes"]) == (0, ["records-x-y"], 7)
    assert not cache.exists()
    assert (tmp_path / ".sfumato" / "account.db").is_file()


def test_the_ledgers_of_a_federation_are_named_where_its_run_is_given(tmp_path, sfu):
    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.plan import DpSgd

    plan = DpSgd(population=1_000, expected_batch_size=50, steps=4, noise_multiplier=1.0, delta=1e-5)
    for site in ("site-2", "site-10"):
        (tmp_path / "sites" / site).mkdir(parents=True)
        Ledger.open(tmp_path / "sites" / site / "ledger.db", run="x", plan=plan).close()
    ran = sfu("ledger", "show", str(tmp_path))
    assert ran.code == 2
    assert "each of its 2 sites has a ledger" in ran.err and f"such as {tmp_path / 'sites' / 'site-2'}" in ran.err
    assert sfu("ledger", "show", str(tmp_path / "sites" / "site-2")).code == 0
    (tmp_path / "server").mkdir()
    Ledger.open(tmp_path / "server" / "ledger.db", run="x", plan=plan).close()
    (tmp_path / "sites").rename(tmp_path / "gone")
    assert "epsilon" in sfu("ledger", "show", str(tmp_path)).out  # of a server that adds the noise
