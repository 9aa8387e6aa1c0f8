"""A run's folder: never overwritten, and each of its files whole or not there."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from sfumato.errors import OutsideError, UsageError
from sfumato.training import folder
from sfumato.training.folder import RunFolder


def begun(run: RunFolder) -> RunFolder:
    run.write_text("resolved.yaml", "name: x\n")
    return run


def test_every_run_gets_a_folder_of_its_own(tmp_path):
    first, second = folder.fresh(tmp_path, "clinic"), folder.fresh(tmp_path, "clinic")
    assert (first.path.name, second.path.name) == ("v1", "v2")
    assert (first.name, second.name) == ("clinic/v1", "clinic/v2")
    assert os.readlink(tmp_path / "clinic" / "last") == "v2"


def test_a_number_that_was_used_is_not_used_again_while_a_later_one_is_there(tmp_path):
    for _ in range(3):
        folder.fresh(tmp_path, "x")
    (tmp_path / "x" / "v2").rmdir()
    (tmp_path / "x" / "vacation").mkdir()
    assert folder.fresh(tmp_path, "x").path.name == "v4"


def test_runs_that_begin_at_once_do_not_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = [f.result().path.name for f in [pool.submit(folder.fresh, tmp_path, "x") for _ in range(16)]]
    assert sorted(made) == sorted(f"v{i}" for i in range(1, 17))
    assert (tmp_path / "x" / "last").is_dir()


def test_a_place_that_cannot_be_written_to_is_an_outside_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError, match=r"out = .* · cannot be written to") as caught:
        folder.fresh(tmp_path / "file", "x")
    assert "--out" in caught.value.next


def test_a_run_is_found_by_its_folder_and_by_the_link(tmp_path):
    run = begun(folder.fresh(tmp_path, "x"))
    assert folder.existing(run.path) == folder.existing(tmp_path / "x" / "last") == run


@pytest.mark.parametrize("place", ["x/last", "x/v1", "nowhere"])
def test_what_is_no_run_is_refused_by_name(tmp_path, place):
    folder.fresh(tmp_path, "x")  # a folder whose run never began
    with pytest.raises(UsageError, match=r"run = .* · is not a run's folder"):
        folder.existing(tmp_path / place)


def test_runs_are_listed_oldest_first_and_only_those_that_began(tmp_path):
    runs = [begun(folder.fresh(tmp_path, name)) for name in ("b", "a", "b")]
    folder.fresh(tmp_path, "a")
    for age, run in enumerate(reversed(runs)):
        os.utime(run.path / "resolved.yaml", (1e9 - age, 1e9 - age))
    assert folder.listed(tmp_path) == runs
    assert folder.listed(tmp_path / "nowhere") == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = folder.fresh(tmp_path, "x")
    run.write_json("reports/cost.json", {"seconds": 1.5, "name": "да"})
    assert run.read_json("reports/cost.json") == {"seconds": 1.5, "name": "да"}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutsideError, match=r"cost.json · could not be written") as caught:
            run.write_json("reports/cost.json", {"seconds": 2.5})
    assert caught.value.exit_code == 5
    assert run.read_json("reports/cost.json")["seconds"] == 1.5
    assert [path.name for path in (run.path / "reports").iterdir()] == ["cost.json"]


def test_a_figure_that_json_does_not_have_is_our_mistake_and_writes_nothing(tmp_path):
    run = folder.fresh(tmp_path, "x")
    with pytest.raises(ValueError):
        run.write_json("reports/cost.json", {"seconds": float("nan")})
    assert not (run.path / "reports").exists()


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_an_unreadable_file_of_a_run_is_told_by_name(tmp_path, content):
    run = folder.fresh(tmp_path, "x")
    if content is not None:
        (run.path / "plan.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"has no readable plan.json"):
        run.read_json("plan.json")


def test_a_training_is_finished_once_its_claim_is_written(tmp_path):
    run = begun(folder.fresh(tmp_path, "x"))
    run.write_json("reports/cost.json", {})
    assert (run.begun, run.finished) == (True, False)
    run.write_json("reports/privacy.json", {})
    assert run.finished
