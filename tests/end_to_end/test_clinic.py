"""``sfumato train clinic`` at toy size, in processes of its own: its answer, its exit codes, Ctrl-C, and kill -9.

The processes are forked from one that has loaded torch, so that ten of them cost little more than one.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sfumato.privacy.ledger import show
from sfumato.privacy.plan_json import plan_from_dict

STEPS = 48
TINY = [
    "data.units=150", "data.public_units=8", "data.image_size=16",
    "model.image.kept=6", "model.text.buckets=64", "model.text.width=8", "model.backbone.width=16", "model.backbone.depth=1",
    "model.sampling.steps=2", "privacy.epsilon=null", "privacy.noise_multiplier=20",
    f"training.steps={STEPS}", "training.expected_batch_size=20", "training.log_every=1",
    "training.picture_every_seconds=3600", "evaluation.twin=false", "evaluation.judge_seconds=1", "audit.draws=1",
    "performance.threads=1",
]  # fmt: skip
TRAIN = ["train", "clinic", *[part for value in TINY for part in ("--set", value)]]


def _main(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """The console script, with its output in files."""
    os.environ.update(environment)
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that forks had it switched off
    sys.argv = ["sfumato", *arguments]
    from sfumato.cli.main import main

    main()


@dataclass
class Run:
    """A command line in a process of its own."""

    process: Any
    folder: Path

    def said(self, words: str) -> "Run":
        """Waits until it has said so."""
        deadline = time.monotonic() + 120
        while words not in self.err:
            assert self.process.is_alive(), self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.005)
        return self

    def ended(self) -> "Run":
        self.process.join(120)
        assert self.process.exitcode is not None, "it hangs: " + self.err
        return self

    def kill(self) -> None:
        """kill -9; a process that has ended by itself must have ended well."""
        self.process.kill()
        self.process.join()
        assert self.code in (-signal.SIGKILL, 0), self.err

    def press_ctrl_c(self) -> "Run":
        os.kill(self.process.pid, signal.SIGINT)
        return self.ended()

    @property
    def code(self) -> int:
        return self.process.exitcode

    @property
    def err(self) -> str:
        path = self.folder / "err"
        return path.read_text() if path.exists() else ""

    @property
    def answer(self) -> dict[str, Any]:
        return json.loads((self.folder / "out").read_text().splitlines()[-1])


class Machine:
    """A user's own machine: account, key and runs are in its folder."""

    def __init__(self, home: Path, context: Any) -> None:
        self.home = home
        self._context = context
        self._started = 0

    def start(self, *arguments: str) -> Run:
        self._started += 1
        folder = self.home / f"process-{self._started}"
        folder.mkdir()
        environment = {f"XDG_{name}_HOME": str(self.home / name.lower()) for name in ("DATA", "CONFIG", "CACHE")}
        process = self._context.Process(target=_main, args=([*arguments, "--json"], str(folder), environment))
        process.start()
        return Run(process, folder)

    def train(self, *arguments: str) -> Run:
        return self.start(*TRAIN, "--out", str(self.home / "runs"), *arguments)

    @property
    def last(self) -> Path:
        return (self.home / "runs" / "clinic" / "last").resolve()

    def charged(self) -> int:
        ledger = self.last / "ledger.db"
        return show(ledger)["steps"] if ledger.exists() else 0

    def computed(self) -> int:
        """The last step that was certainly computed: its figures are written after it."""
        metrics = self.last / "metrics.jsonl"
        steps = [0]
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            with contextlib.suppress(ValueError):  # cut short by the kill
                steps.append(json.loads(line)["step"])
        return max(steps)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    ours = ["cli.train", "workflow", "training.loop", "training.watch", "models.model", "data.prepare", "data.clinic"]
    theirs = [
        "torch._dynamo",
        "dp_accounting.pld",
        "dp_accounting.rdp",
        "safetensors.torch",
        "scipy.stats",
        "PIL.Image",
    ]
    context.set_forkserver_preload([*theirs, *[f"sfumato.{name}" for name in ours]])
    return context


@pytest.fixture
def machine(tmp_path, context) -> Machine:
    return Machine(tmp_path, context)


def test_train_answers_in_json_and_its_bundle_is_accepted(machine):
    ended = machine.train().ended()
    assert ended.code == 0, ended.err
    answer = ended.answer
    assert answer.keys() >= {"run", "epsilon", "delta", "steps", "seconds", "quality", "bundle"}
    assert (answer["steps"], answer["stopped"]) == (STEPS, "steps")
    assert f"step {STEPS}/{STEPS}" in ended.err  # progress goes to standard error
    assert len((ended.folder / "out").read_text().splitlines()) == 1
    verified = machine.start("verify", answer["bundle"]).ended()
    assert verified.code == 0, verified.answer
    assert verified.answer["valid"]
    assert verified.answer["epsilon"] == pytest.approx(answer["epsilon"])
    changed = Path(answer["bundle"], "quality.json")
    changed.write_bytes(changed.read_bytes() + b" ")
    assert machine.start("verify", answer["bundle"]).ended().code == 4


def test_refusals_have_their_exit_codes(machine):
    refused = machine.train("--set", "data.units=50").ended()
    assert refused.code == 3
    assert "too_few_units" in [refusal["code"] for refusal in refused.answer["refusals"]]
    wrong = machine.train("--set", "training.stepz=3").ended()
    assert (wrong.code, wrong.answer["error"]["code"]) == (2, "unknown_key")
    (machine.home / "runs").write_text("no folder")
    outside = machine.train().ended()
    assert outside.code == 5
    assert outside.answer["error"]["next"]


def test_ctrl_c_is_exit_130_and_a_resume_ends_at_exactly_the_plan(machine):
    ended = machine.train().said("step 1/").press_ctrl_c()
    assert ended.code == 130
    assert ended.answer["stopped"] == "interrupted"
    assert 1 <= ended.answer["steps"] == machine.charged() < STEPS
    assert ended.answer["epsilon"] > 0
    resumed = machine.train("--resume").ended()
    assert resumed.code == 0, resumed.err
    assert resumed.answer["steps"] == machine.charged() == STEPS  # a clean stop wastes nothing
    shown = show(machine.last / "ledger.db")
    assert resumed.answer["epsilon"] == pytest.approx(shown["epsilon"], abs=1e-9)
    assert (shown["uncommitted"], shown["attempts"]) == (0, 2)
    assert machine.start("verify", resumed.answer["bundle"]).ended().code == 0


def test_a_second_process_cannot_resume_a_run_that_goes_on(machine):
    endless = ["--set", "training.steps=100000", "--set", "privacy.noise_multiplier=500"]
    first = machine.train(*endless).said("step 1/")
    second = machine.train(*endless, "--resume").ended()
    assert (second.code, second.answer["error"]["code"]) == (3, "ledger_busy")
    assert str(first.process.pid) in second.answer["error"]["message"]
    assert first.press_ctrl_c().code == 130


def charged_in_account(machine: Machine) -> int:
    (account,) = machine.home.rglob("account.db")
    (charged,) = [sum(event["count"] for event in run["events"]) for run in show(account)["runs"]]
    return charged


def kills(machine: Machine, moments: list[float], steps: int = STEPS) -> None:
    """Kills a training and each resume of it, so many seconds after it began, or began to train; then lets it end."""
    planned_steps = ["--set", f"training.steps={steps}"]
    computed = wasted = 0
    for number, moment in enumerate(moments):
        run = machine.train(*planned_steps, *(["--resume"] if number else []))
        match number % 3:
            case 0:  # within the steps, the first kill certainly
                run.said("step 1/" if number == 0 else "writing to")
            case 1:  # about where the ledger is opened
                run.said("plan:")
        run.process.join(moment)
        run.kill()
        computed = max(computed, machine.computed())
        assert computed <= machine.charged() <= steps
        wasted = charged_in_account(machine) - taken(machine)  # a kill between account and ledger: the account is ahead
    ended = machine.train(*planned_steps, "--resume").ended()
    assert ended.code == 0, ended.err
    shown = show(machine.last / "ledger.db")
    assert shown["steps"] == steps
    assert 2 <= shown["attempts"] <= len(moments) + 1
    assert ended.answer["steps"] == taken(machine) == steps - wasted  # what the kills wasted came off, and no more
    planned = plan_from_dict(json.loads((machine.last / "plan.json").read_text())).epsilon()
    assert ended.answer["epsilon"] == pytest.approx(shown["epsilon"], abs=1e-9) == pytest.approx(planned, abs=1e-9)
    assert machine.start("verify", ended.answer["bundle"]).ended().code == 0
    assert charged_in_account(machine) == steps


def taken(machine: Machine) -> int:
    """Steps in the weights of the last checkpoint."""
    state = machine.last / "checkpoints" / "last" / "state.json"
    return json.loads(state.read_text())["step"] if state.exists() else 0


def test_kill_9_at_three_moments_hides_nothing(machine):
    chance = random.Random(0)
    kills(machine, [chance.uniform(0, 0.5) for _ in range(3)])


@pytest.mark.slow
def test_kill_9_at_twenty_moments_hides_nothing(machine):
    chance = random.Random(1)
    kills(machine, [chance.uniform(0, 0.8) for _ in range(20)], steps=800)
