"""Every way in which a verb can fail has its exit code, and with --json one JSON object on the last line."""

import errno
import json
import math
from pathlib import Path

import click
import pytest

from sfumato import errors
from sfumato.cli.answer import failure_of, print_failure, to_json, wants_json

KNOWN = [
    (errors.UsageError("steps = 0 · must be > 0", next="Give more."), 2, "usage"),
    (errors.DataError("a.png = truncated · a whole image", next="Fetch it again."), 2, "data"),
    (errors.PrivacyRefused("epsilon = 0 · > 0", next="Ask for more."), 3, "refused"),
    (errors.BudgetExhausted("step 9 · would pass the plan"), 3, "budget_exhausted"),
    (errors.LedgerError("ledger.db = busy · one run at a time"), 3, "ledger"),
    (errors.UnsupportedLayer("BatchNorm2d · examples must not meet"), 3, "unsupported_layer"),
    (errors.VerificationFailed("manifest.json · signature"), 4, "verification_failed"),
    (errors.OutsideError("npm = not found · needed"), 5, "outside"),
    (errors.MissingDependency("tensorboard = not installed"), 5, "missing_dependency"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 5, "disk"),
    (OSError(errno.EROFS, "Read-only file system", "runs/x"), 5, "disk"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "disk"),
    (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), 5, "permission"),
    (MemoryError(), 5, "memory"),
    (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), 5, "missing_dependency"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (click.Abort(), 130, "interrupted"),
    (click.UsageError("No such option"), 2, "usage"),
    (ZeroDivisionError("division by zero"), 1, "internal"),
    (ModuleNotFoundError("No module named 'sfumato.gone'", name="sfumato.gone"), 1, "internal"),
]


@pytest.mark.parametrize(("error", "exit_code", "code"), KNOWN, ids=lambda value: type(value).__name__)
def test_every_error_has_its_exit_code_and_says_what_to_do(error, exit_code, code, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure = failure_of(error, ["train", "x"])
    assert (failure.exit_code, failure.code) == (exit_code, code)
    told = json.loads(to_json(failure.as_dict()))
    assert set(told["error"]) == {"code", "message", "next"}
    assert told["error"]["message"]


def test_a_refusal_tells_every_reason():
    refusals = [{"code": "a", "message": "m", "next": "n"}, {"code": "b", "message": "m2", "next": "n2"}]
    told = failure_of(errors.PrivacyRefused("no", refusals=refusals), []).as_dict()
    assert told["refusals"] == refusals
    assert told["reasons"] == refusals


def test_a_refusal_that_says_no_next_step_has_no_empty_line_for_one(capsys):
    refusals = [{"code": "a", "message": "m", "next": ""}, {"code": "b", "message": "m2", "next": "n2"}]
    print_failure(failure_of(errors.PrivacyRefused("no", refusals=refusals), []), as_json=False)
    assert capsys.readouterr().err.splitlines() == ["sfumato: no", "  - m", "  - m2", "    next: n2"]


def test_a_mistake_of_ours_leaves_a_report_to_send(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        failure = failure_of(error, ["train", "clinic"])
    (file,) = tmp_path.iterdir()
    assert str(file) in failure.next
    text = Path(file).read_text()
    assert "train clinic" in text
    assert "Traceback" in text
    assert "division by zero" in text


def test_a_mistake_of_ours_where_nothing_can_be_written_is_told_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    failure = failure_of(ZeroDivisionError("x"), [])
    assert failure.exit_code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_json_is_strict_also_for_infinities():
    line = to_json(
        {"epsilon": math.inf, "low": math.nan, "path": Path("a/b"), "pair": (1, 2.5), "no": None, "yes": True}
    )
    assert json.loads(line) == {"epsilon": None, "low": None, "path": "a/b", "pair": [1, 2.5], "no": None, "yes": True}
    assert "\n" not in line


def test_a_value_that_has_no_form_in_json_is_refused_not_guessed():
    with pytest.raises(TypeError, match="set"):
        to_json({"x": {1, 2}})


def test_json_is_wanted_only_where_it_is_an_option():
    assert wants_json(["plan", "--json"])
    assert not wants_json(["generate", "--", "--json"])
    assert not wants_json([])
