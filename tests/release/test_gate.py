"""Every reason not to release a run is found, and all of them at once."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfumato.privacy.plan import NotPrivate
from sfumato.release import gate
from sfumato.release.settings import ReleaseSettings


def codes(run: Path, **settings: Any) -> list[str]:
    approved, reasons = gate.check(run, ReleaseSettings(**settings))
    assert approved is (not reasons)
    assert all(set(reason) == {"code", "message", "next"} and all(reason.values()) for reason in reasons)
    return [reason["code"] for reason in reasons]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_complete_run_is_approved(run: Path) -> None:
    assert codes(run) == []


def test_a_run_without_privacy_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    plan = NotPrivate(population=30_000, expected_batch_size=2_048.0, steps=800, unit="person", records_per_unit=4)
    assert codes(make_run(tmp_path / "run", plan=plan)) == ["not_for_release", "not_private"]


def test_the_policys_epsilon_is_a_limit(run: Path) -> None:
    assert codes(run, max_epsilon=7.0) == ["epsilon_above_policy"]
    assert codes(run, max_epsilon=7.9992) == []


@pytest.mark.parametrize("name", ["privacy", "quality", "audit", "cost"])
def test_a_missing_report_is_refused_unless_it_is_not_asked_for(name: str, run: Path) -> None:
    (run / "reports" / f"{name}.json").unlink()
    assert codes(run) == [f"no_{name}_report"]
    expected = [] if name in ("quality", "audit") else [f"no_{name}_report"]
    assert codes(run, require_quality=False, require_audit=False) == expected


@pytest.mark.parametrize("verdict", ["VIOLATION", None, "FINE"])
def test_a_violation_is_refused_even_where_no_audit_is_asked_for(verdict: Any, run: Path) -> None:
    edit(run / "reports/audit.json", verdict=verdict)
    assert codes(run, require_audit=False) == ["audit_violation"]


def test_an_inconclusive_audit_does_not_refuse(run: Path) -> None:
    edit(run / "reports/audit.json", verdict="INCONCLUSIVE")
    assert codes(run) == []


def test_the_marker_of_a_test_run_is_refused(run: Path) -> None:
    edit(run / "reports/privacy.json", not_for_release="the noise came from a seed")
    assert codes(run) == ["not_for_release"]


def test_a_claim_below_what_the_ledger_spent_is_refused(run: Path) -> None:
    edit(run / "reports/privacy.json", epsilon=7.0)
    assert codes(run) == ["ledger_above_claim"]


def test_a_run_that_passed_its_budget_is_refused(run: Path) -> None:
    mechanism = json.loads((run / "reports/privacy.json").read_text())["mechanism"]
    edit(run / "reports/privacy.json", mechanism={**mechanism, "target_epsilon": 6.0})
    assert codes(run) == ["ledger_above_plan"]


def test_a_changed_or_missing_ledger_is_refused(run: Path) -> None:
    connection = sqlite3.connect(run / "ledger.db")
    connection.execute("""UPDATE entries SET body = replace(body, '"count":800', '"count":8')""")
    connection.commit()
    connection.close()
    assert codes(run) == ["ledger_invalid"]
    (run / "ledger.db").unlink()
    assert codes(run) == ["no_ledger"]
    (run / "ledger.db").write_bytes(b"not a database")
    assert len(codes(run)) == 1


def test_another_delta_than_the_ledgers_is_refused(run: Path) -> None:
    edit(run / "reports/privacy.json", delta=1e-5)
    assert codes(run) == ["ledger_delta"]


def test_a_tensor_that_nobody_accounts_for_is_refused_by_name(run: Path) -> None:
    save_file({"buckets": np.arange(16), "running_mean": np.zeros(3)}, run / "model/text.safetensors")
    approved, reasons = gate.check(run, ReleaseSettings())
    assert not approved
    assert [reason["code"] for reason in reasons] == ["taint_incomplete"]
    assert "running_mean" in reasons[0]["message"]
    (run / "taint.json").unlink()
    assert codes(run) == ["taint_incomplete"]


def test_a_file_that_runs_code_when_loaded_and_a_link_are_refused(run: Path) -> None:
    (run / "model/optimizer.pt").write_bytes(b"")
    assert codes(run) == ["unsafe_file"]
    (run / "model/optimizer.pt").unlink()
    (run / "model/link.json").symlink_to(run / "data_card.json")
    assert codes(run) == ["unsafe_file"]


def test_a_federated_run_without_its_sites_and_a_foreign_folder_are_refused_with_all_reasons(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    assert codes(make_run(tmp_path / "run", federation=True)) == ["no_sites"]
    (tmp_path / "empty").mkdir()
    assert codes(tmp_path / "empty") == [
        "no_recipe",
        "no_privacy_report",
        "no_cost_report",
        "no_quality_report",
        "no_audit_report",
        "no_model",
    ]


def test_a_report_that_cannot_be_read_is_a_reason_not_a_crash(run: Path) -> None:
    (run / "reports/privacy.json").write_text("{")
    assert codes(run) == ["usage"]
