"""``doctor`` names what is missing and how to get it, and fails only for what every run needs."""

import shutil

from sfumato.cli import doctor


def test_doctor_passes_where_the_tests_run(sfu):
    ran = sfu("doctor", "--json")
    assert ran.code == 0
    names = [check["name"] for check in ran.json["checks"]]
    assert len(names) == len(set(names))
    assert {
        "python",
        "torch",
        "cores",
        "memory",
        "disk",
        "write access",
        "npm",
        "apt-get",
        "chromium",
        "signing key",
    } <= set(names)
    for check in ran.json["checks"]:
        assert check["ok"] or check["next"], check


def test_a_missing_client_is_named_but_is_no_failure(monkeypatch, sfu):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ran = sfu("doctor", "--json")
    assert ran.code == 0
    (npm,) = [check for check in ran.json["checks"] if check["name"] == "npm"]
    assert not npm["ok"]
    assert "apt-get install npm" in npm["next"]
    assert "npm" in sfu("doctor").out.split("How to get what is missing")[1]


def test_a_missing_package_that_is_needed_is_exit_5(monkeypatch, sfu):
    monkeypatch.setattr(doctor, "PACKAGES", (("not_a_module", "not-a-package"),))
    ran = sfu("doctor", "--json")
    assert ran.code == 5
    assert ran.json["ok"] is False
    assert "pip install not-a-package" in sfu("doctor").out


def test_a_folder_that_cannot_be_written_is_exit_5(monkeypatch, sfu):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert sfu("doctor", "--json").code == 5
