"""`sfumato federate --engine deployment` as a user starts it, and as it is killed. Real processes; each takes a minute."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'sfumato[federation]'")

import psutil

from sfumato.errors import UsageError
from sfumato.federation.processes import status
from sfumato.privacy.ledger import show

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "clinic", "units": 330, "public_units": 8, "image_size": 16},
    "model": {
        "image": {"kind": "cosine", "kept": 6},
        "text": {"kind": "hashed_words", "buckets": 64, "width": 8},
        "backbone": {"kind": "mlp", "width": 16, "depth": 1},
        "sampling": {"steps": 2},
    },
    "privacy": {"unit": "person", "records_per_unit": 2, "epsilon": None, "noise_multiplier": 20.0},
    "training": {"expected_batch_size": 20},
    "evaluation": {"samples": 20, "judge_seconds": 1},
    "federation": {"sites": 2, "rounds": 3, "local_steps": 2},
    "performance": {"threads": 1},
}
COMMAND = "from sfumato.cli.main import main; main()"


class Started:
    """A command line in a process of its own, in ``folder``, and the processes that it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        home = {f"XDG_{name}_HOME": str(folder / "home" / name.lower()) for name in ("DATA", "CONFIG", "CACHE")}
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        with self.output.open("w") as output, (folder / "progress").open("a") as progress:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments, "--json"],
                cwd=folder,
                stdout=output,
                stderr=progress,
                env={**os.environ, **home, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            )

    def family(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def answer(self, seconds: float = 400.0) -> dict[str, Any]:
        self.process.wait(seconds)
        return json.loads(self.output.read_text().splitlines()[-1])


@pytest.fixture
def started(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    running: list[Started] = []

    def start(*arguments: str) -> Started:
        running.append(Started(tmp_path, *arguments))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def wait_until(what, seconds=240.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)
    return found


def in_round(folder: Path, number: int) -> bool:
    """Sites are being asked for this round."""
    said = status(folder / "server") if folder.exists() else None
    return said is not None and said.get("round") == number


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_a_server_that_is_killed_in_a_round_leaves_nothing_behind_and_resumes_with_every_event_charged_once(
    started, tmp_path, how
):
    first = started("federate", "recipe.yaml", "--engine", "deployment")
    run = tmp_path / "runs" / "tiny-federated" / "v1"
    wait_until(lambda: in_round(run, 2))
    family = first.family()
    assert len(family) == 5  # SuperLink, two sites, two SuperNodes
    os.kill(first.process.pid, how)
    first.process.wait(120)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in family), 30)

    second = started("federate", "recipe.yaml", "--engine", "deployment", "--resume")
    answer = second.answer()
    assert (second.process.returncode, Path(answer["run"]), answer["rounds"]) == (0, run.resolve(), 3)
    report = json.loads((run / "reports" / "federation.json").read_text())
    assert [bool(round["discarded"]) for round in report["rounds"]] == [False, True, False]
    for number, site in enumerate(answer["sites"], start=1):
        spent = show(run / "sites" / f"site-{number}" / "ledger.db")
        # rounds 1 and 3 whole; of round 2 what was begun before it was killed
        assert 4 <= spent["steps"] <= 6 and spent["valid"]
        assert site["epsilon"] == pytest.approx(spent["epsilon"]) and site["rounds"] == 2
    assert not [pid for pid in family if psutil.pid_exists(pid)]


@pytest.mark.slow
def test_ctrl_c_ends_it_after_the_round_and_all_its_processes_with_it(started, tmp_path):
    first = started("federate", "recipe.yaml", "--engine", "deployment")
    run = tmp_path / "runs" / "tiny-federated" / "v1"
    wait_until(lambda: in_round(run, 1))
    family = first.family()
    os.kill(first.process.pid, signal.SIGINT)
    answer = first.answer()
    assert (first.process.returncode, answer["stopped"]) == (130, "interrupted")
    assert not any(psutil.pid_exists(pid) for pid in family)
    said = status(run / "server")
    assert said is not None and not said["running"] and said["bytes_up"] > answer["bytes_up"] > 0


@pytest.mark.slow
def test_server_and_sites_by_their_own_verbs_as_administrators_start_them(started, tmp_path):
    from sfumato.federation.processes import free_port

    port = str(free_port())
    (tmp_path / "policy.yaml").write_text("max_epsilon: 8\nallowed_mechanisms: [record_level]\n")
    (tmp_path / "strict.yaml").write_text("max_rounds: 1\n")
    for site in ("north", "south"):
        assert "line" in started("federate", "site", "--folder", site).answer()
    server = started(
        "federate", "server", "recipe.yaml", "--site", "north=north/site.key.pub", "--site", "south=south/site.key.pub",
        "--folder", "server", "--port", port,
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "server" / "keys" / "authority.pem").exists())
    sites = [
        started(
            "federate", "site", "--policy", policy, "--folder", site, "--server", f"127.0.0.1:{port}",
            "--authority", "server/keys/authority.pem", "--share", share,
        )
        for site, policy, share in (("north", "policy.yaml", "1/2"), ("south", "strict.yaml", "2/2"))
    ]  # fmt: skip
    answer = server.answer()
    assert server.process.returncode == 0
    assert [(site["name"], site["rounds"], site["refused"]) for site in answer["sites"]] == [
        ("north", 3, 0),
        ("south", 1, 2),
    ]
    report = json.loads((tmp_path / answer["run"] / "reports" / "federation.json").read_text())
    assert {out["code"] for round in report["rounds"] for out in round["left_out"]} == {"rounds_limit"}
    for site, spent in zip(answer["sites"], (6, 2), strict=True):
        book = show(tmp_path / site["name"] / "runs" / "tiny-federated" / "v1" / "ledger.db")
        assert book["steps"] == spent and site["epsilon"] == pytest.approx(
            book["epsilon"], rel=1e-9
        )  # by the ledger that it gave
    claim = json.loads((tmp_path / answer["run"] / "reports" / "privacy.json").read_text())
    assert [row["ledger"] for row in claim["sites"]] == ["ledgers/site-1.jsonl", "ledgers/site-2.jsonl"]
    assert all(row["key"] is not None for row in claim["sites"])
    family = [pid for site in sites for pid in [site.process.pid, *site.family()]]
    for site in sites:
        os.kill(site.process.pid, signal.SIGTERM)
        site.process.wait(30)
    assert not any(psutil.pid_exists(pid) for pid in family)


def test_a_site_whose_records_are_not_there_says_so_before_it_asks(tmp_path):
    from sfumato import workflow

    for name in ("policy.yaml", "authority.pem"):
        (tmp_path / name).write_text("max_epsilon: 8\n")
    with pytest.raises(UsageError, match="gone · is not there"):
        workflow.federate_site(
            policy=tmp_path / "policy.yaml",
            data=tmp_path / "gone",
            server="127.0.0.1:9443",
            authority=tmp_path / "authority.pem",
            folder=tmp_path / "site",
        )
    assert not (tmp_path / "site").exists()
