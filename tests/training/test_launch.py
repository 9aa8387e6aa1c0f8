"""Several processes of one machine train one run: what they leave, and how they end, however they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import oracles
from tests.models.conftest import SHAPE, TINY, records
from tests.test_workflow import recipe_file
from tests.training.conftest import OPEN, PLAN, UNITS, Runs, Watch

from sfumato.errors import OutsideError
from sfumato.models import model as models
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.processes import Processes
from sfumato.training import launch, loop
from sfumato.training.settings import PerformanceSettings, TrainingSettings


def attempt(runs: Runs, processes: int, plan=PLAN, at=None, **training):
    """One attempt at the run in ``runs``; ``at`` says what happens after which step."""
    watch = Watch(at)
    runs.model = model = models.build(TINY, picture_shape=SHAPE)
    table = model.encode(records([1] * UNITS))
    settings = TrainingSettings(
        steps=8, log_every=1, warmup_steps=2, **{"checkpoint_every_seconds": 3600.0, **training}
    )
    performance = PerformanceSettings(processes=processes, threads=1)
    if plan is OPEN:
        return loop.train(model, table, plan, settings, performance, checkpoints=runs.checkpoints), watch
    with Ledger.open(runs.ledger_path, run="tiny/v1", plan=plan) as ledger:
        trained = loop.train(
            model, table, plan, settings, performance, checkpoints=runs.checkpoints, ledger=ledger, watchers=[watch]
        )
    return trained, watch


def children() -> list[int]:
    """Processes that this one has started and that still live."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if "sys.stdin.buffer" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_ctrl_c_ends_all_processes_after_the_same_step_and_one_alone_goes_on(runs):
    seen = []

    def interrupt() -> None:
        seen.extend(children())
        os.kill(os.getpid(), signal.SIGINT)

    trained, watch = attempt(runs, 2, at={3: interrupt})
    assert (trained.stopped, trained.step, trained.charged, trained.processes) == ("interrupted", 3, 3, 2)
    assert len(seen) == 1 and children() == []
    assert trained.others_processor_seconds > 0 and trained.others_peak_bytes > 0
    assert [line["step"] for line in watch.lines] == [1, 2, 3]
    weights = oracles.vector(runs.model)
    trained, watch = attempt(runs, 1)
    assert (trained.stopped, trained.step, trained.charged, trained.processes) == ("steps", 8, 8, 1)
    assert [line["step"] for line in watch.lines] == [4, 5, 6, 7, 8]
    assert not oracles.vector(runs.model).equal(weights)
    shown = show(runs.ledger_path)
    assert (shown["steps"], shown["uncommitted"], shown["attempts"]) == (8, 0, 2)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_four_and_losses_are_of_all(runs):
    trained, _ = attempt(runs, 1, at={3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    units = trained.units_seen
    trained, watch = attempt(runs, 4)
    assert (trained.stopped, trained.step, trained.charged, trained.processes) == ("steps", 8, 8, 4)
    rate = watch.lines[-1]["examples_per_second"]
    assert trained.units_seen - units == pytest.approx(
        rate * (watch.lines[-1]["seconds"] - watch.lines[0]["seconds"]), rel=1
    )
    assert 10 < trained.units_seen - units < 110  # 50 are expected of 5 steps; beyond these bounds once in 10^9 runs


@pytest.mark.slow
def test_the_twin_without_privacy_trains_in_two_processes_too(runs):
    trained, _ = attempt(runs, 2, plan=OPEN)
    assert (trained.stopped, trained.step, trained.processes) == ("steps", 8, 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_can_be_resumed(runs):
    with pytest.raises(OutsideError, match=r"process 1 · was ended by signal SIGKILL") as caught:
        attempt(runs, 2, at={3: lambda: os.kill(children()[0], signal.SIGKILL)}, checkpoint_every_seconds=0.0)
    assert caught.value.code == "process_ended"
    assert children() == []
    charged = runs.spent
    assert charged in (3, 4)  # the death is noticed when the next step is drawn, which is charged by then
    trained, _ = attempt(runs, 2)
    assert (trained.stopped, trained.charged, trained.step) == ("steps", 8, 8 - (charged - 3))


@pytest.mark.slow
def test_a_process_that_fails_by_itself_is_named_with_what_it_said():
    with pytest.raises(OutsideError, match=r"process 1 · ended with code 1: ValueError: nobody expects this"):
        with launch.together(2, fails, threads=1) as processes:
            processes.anyone(False)
    assert children() == []


def fails() -> None:
    with launch.together(2, fails, threads=1) as processes:
        assert processes.rank == 1
        raise ValueError("nobody expects this")


def test_one_process_starts_nobody():
    with launch.together(1, fails, threads=None) as processes:
        assert isinstance(processes, Processes) and not processes.together
    assert children() == []


# ------------------------------------------------------------------------------------------------------ the command line


def command(folder: Path, *more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {f"XDG_{name}_HOME": str(folder / name) for name in ("DATA", "CONFIG", "CACHE")}
    code = "from sfumato.cli.main import main; main()"
    arguments = ["train", str(folder / "recipe.yaml"), "--out", str(folder / "runs"), "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=folder, text=True, stdout=-1, stderr=-1
    )


def wait_for(what, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def lines(folder: Path) -> int:
    metrics = folder / "runs" / "tiny" / "last" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def helpers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_the_command_is_killed_interrupted_and_resumed_in_other_numbers(tmp_path):
    recipe_file(tmp_path, training={"steps": 60}, evaluation={"twin": False})

    first = command(tmp_path, "--processes", "3")
    wait_for(lambda: lines(tmp_path) > 3)
    helpers = helpers_of(first.pid)
    assert len(helpers) == 2
    first.kill()
    first.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), 20.0)  # none outlives process 0

    before = lines(tmp_path)
    second = command(tmp_path, "--processes", "2", "--resume")
    wait_for(lambda: lines(tmp_path) > before + 2)
    second.send_signal(signal.SIGINT)
    answer, said = second.communicate(timeout=60)
    assert second.returncode == 130, said
    assert json.loads(answer.splitlines()[-1])["stopped"] == "interrupted"

    third = command(tmp_path, "--processes", "2", "--resume")
    answer, said = third.communicate(timeout=240)
    assert third.returncode == 0, said
    run = Path(json.loads(answer.splitlines()[-1])["run"])
    assert show(run / "ledger.db")["steps"] == 60
    cost = json.loads((run / "reports" / "cost.json").read_text())
    assert cost["processes"] == 2 and "2 processes" in cost["machine"]
    assert "2 processes" in (run / "reports" / "report.html").read_text()


SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset
import sfumato

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = nn.Linear(5, 2)
dataset = list(torch.randn(1_000, 5, generator=torch.Generator().manual_seed(0)))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine = sfumato.DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.1)
engine.attach(optimizer)

for batch in engine.batches(dataset, expected_batch_size=100, steps=10):
    losses = model(batch).square().sum(1)
    losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()

print(f"{dist.get_rank()}: {engine.get_epsilon(delta=1e-5)} {model.weight.sum().item()}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_engines_example_runs_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    ran = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    first, second = sorted(line for line in ran.stdout.splitlines() if ": " in line)
    assert first[:2] == "0:" and second[:2] == "1:"
    assert first[2:] == second[2:]  # one epsilon, one model
