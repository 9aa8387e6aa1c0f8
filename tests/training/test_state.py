"""Checkpoints: exact, whole or absent, and never without a whole one once there was one."""

import errno
import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import oracles
from tests.training.conftest import PLAN, Runs, Watch
from torch import nn

from sfumato.errors import OutsideError, UsageError
from sfumato.privacy.engine import NotPrivateEngine
from sfumato.privacy.plan import NotPrivate
from sfumato.training import state
from sfumato.training.state import Average, Progress

PLAN_OF_NOTHING = NotPrivate(population=4, expected_batch_size=2, steps=9)


class Parts:
    """What a checkpoint is made of."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(3, 2), nn.Linear(2, 2)
        )  # of names and shapes that sort otherwise than they stand
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.average = Average(self.model, 0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.engine = NotPrivateEngine.from_plan(self.model, PLAN_OF_NOTHING)
        for _ in range(seed):
            self.model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.average.update(self.model, 3)

    def save(self, folder: Path, step: int) -> Path:
        progress = Progress(step=step, seconds=step / 2, units_seen=7 * step)
        return state.save(folder, self.model, self.average, self.optimizer, self.engine, progress)

    def restore(self, folder: Path) -> Progress:
        return state.restore(folder, self.model, self.average, self.optimizer, self.engine)

    def everything(self) -> list[torch.Tensor]:
        moments = [
            value
            for _, values in sorted(self.optimizer.state_dict()["state"].items())
            for _, value in sorted(values.items())
        ]
        return [*self.model.state_dict().values(), *self.average.tensors.values(), *moments]

    def equals(self, other: "Parts") -> bool:
        mine, theirs = self.everything(), other.everything()
        return len(mine) == len(theirs) and all(a.equal(b) for a, b in zip(mine, theirs, strict=True))


class Kill(BaseException):
    """The process is gone: nothing is handled, nothing is tidied up."""


# ---- the average ----


def test_the_average_is_the_recursion_written_out():
    model = nn.Linear(1, 1, bias=False)
    average, slow = Average(model, 0.6), model.weight.item()
    for step, value in enumerate([1.0, -2.0, 5.0, 3.0, 3.5, 8.0, 1.5, -4.0]):
        model.weight.data.fill_(value)
        average.update(model, step)
        decay = min(0.6, (1 + step) / (10 + step))
        slow = decay * slow + (1 - decay) * value
    assert average.tensors["weight"].item() == pytest.approx(slow, rel=1e-6)


def test_swapping_twice_changes_nothing():
    parts = Parts(2)
    weights, averaged = oracles.vector(parts.model), [t.clone() for t in parts.average.tensors.values()]
    parts.average.swap(parts.model)
    assert oracles.vector(parts.model).equal(torch.cat([t.flatten() for t in averaged]).double())
    parts.average.swap(parts.model)
    assert oracles.vector(parts.model).equal(weights)
    assert all(a.equal(b) for a, b in zip(averaged, parts.average.tensors.values(), strict=True))


def test_frozen_weights_are_not_averaged():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(Average(model, 0.9).tensors) == ["weight"]


# ---- there and back ----


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    saved, fresh = Parts(3), Parts(1)
    saved.save(tmp_path, 5)
    assert not fresh.equals(saved)
    assert fresh.restore(tmp_path) == Progress(step=5, seconds=2.5, units_seen=35)
    assert fresh.equals(saved)


def test_after_a_restore_each_tensor_is_averaged_with_itself(tmp_path):
    """A file lists its tensors by name, a model in the order of its layers."""
    saved, fresh = Parts(3), Parts(1)
    saved.save(tmp_path, 5)
    fresh.restore(tmp_path)
    assert list(fresh.average.tensors) == [name for name, _ in fresh.model.named_parameters()]
    for parts in (saved, fresh):
        parts.average.update(parts.model, 6)
    assert fresh.equals(saved)


def test_without_a_checkpoint_a_run_begins_at_its_beginning(tmp_path):
    parts, same = Parts(2), Parts(2)
    assert parts.restore(tmp_path / "none") == Progress()
    assert parts.equals(same)


def test_a_checkpoint_holds_no_chance(runs: Runs):
    """Neither the noise nor the draw, nor anything from which they could be drawn a second time."""
    runs.attempt(replace(PLAN, steps=2))
    held = json.loads((runs.checkpoints / "last" / "state.json").read_text())
    assert set(held) == {"format", "step", "seconds", "units_seen", "engine", "optimizer"}
    assert set(held["engine"]) == {
        "format",
        "steps_started",
        "for_release",
        "events",
        "ledger_sequence",
        "ledger_position",
    }
    assert set(held["engine"]["ledger_position"]) == {"sequence", "head"}
    assert sorted(path.name for path in (runs.checkpoints / "last").iterdir()) == [
        "average.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        Parts(2).save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000003", "step-000004"]
    assert os.readlink(tmp_path / "last") == "step-000004"


# ---- whole or absent ----


@pytest.mark.parametrize("again", [False, True], ids=["next step", "leftover of the same step"])
def test_a_process_that_dies_within_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """Dies at the first, second, ... call to the system, until a save gets through."""
    import safetensors.torch

    old, new = Parts(2), Parts(3)
    outcomes = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        old.save(folder, 4)
        if again:  # an attempt that died between its rename and the link
            new.save(folder, 5)
            state.point_at(folder / "last", "step-000004")
        calls = []

        def counted(real, calls=calls, moment=moment):
            def call(*arguments, **named):
                calls.append(real)
                if len(calls) == moment:
                    raise Kill
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", counted(safetensors.torch.save_file))
            for name in ("fsync", "replace", "rename", "mkdir", "symlink", "rmdir", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                new.save(folder, 5)
                died = False
            except Kill:
                died = True
        back = Parts(1)
        step = back.restore(folder).step
        assert back.equals(new if step == 5 else old), moment
        assert step in (4, 5)
        outcomes.append(step)
        new.save(folder, 6)  # what is left over is in nobody's way
        assert not list(folder.glob(".*"))
        if not died:
            break
    assert outcomes[0] == 4
    assert outcomes[-1] == 5
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 8


def test_saving_where_a_run_stands_already_leaves_no_moment_without_a_checkpoint(tmp_path, monkeypatch):
    """A resumed run that takes no step saves again; the checkpoint it came from must not be taken away first."""
    parts = Parts(2)
    parts.save(tmp_path, 4)
    monkeypatch.setattr(state.shutil, "rmtree", lambda *a, **k: pytest.fail("the only whole checkpoint was removed"))
    assert parts.save(tmp_path, 4) == tmp_path / "step-000004"
    assert Parts(1).restore(tmp_path).step == 4


def test_a_link_to_a_checkpoint_that_is_gone_is_refused(tmp_path):
    """Not taken for a run that has not begun: that would throw away all it has learnt."""
    state.point_at(tmp_path / "last", "step-000009")
    with pytest.raises(UsageError, match=r"checkpoint = .* · cannot be continued"):
        Parts(1).restore(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "average.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("left", [0, 0.5], ids=["empty", "cut"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, name, left):
    Parts(2).save(tmp_path, 4)
    path = tmp_path / "last" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(UsageError, match=r"checkpoint = .* · cannot be continued") as caught:
        Parts(1).restore(tmp_path)
    assert caught.value.exit_code == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Parts(2).save(tmp_path, 4)
    other = Parts(1)
    other.model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="cannot be continued"):
        other.restore(tmp_path)


# ---- a full disk ----


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "safetensors.torch.save_file", "os.rename"])
def test_a_full_disk_is_an_outside_error_and_the_older_checkpoint_stays(tmp_path, monkeypatch, where):
    old = Parts(2)
    old.save(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(OutsideError, match=r"checkpoint = .*step-000005 · could not be written") as caught:
            Parts(3).save(tmp_path, 5)
    assert caught.value.exit_code == 5
    assert "--resume" in caught.value.next
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000004"]
    back = Parts(1)
    assert back.restore(tmp_path).step == 4
    assert back.equals(old)


@pytest.fixture
def small_disk():
    """A disk of 640 KiB, where this user may mount one; not inside pytest's own folder, which it sweeps."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = Path(tempfile.mkdtemp(prefix="small-disk-"))
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    finally:
        place.rmdir()


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return ballast


def test_a_really_full_disk_ends_the_run_with_its_ledger_kept(small_disk):
    """Everything of the run is on the disk, the ledger too. It fills up after the third step."""
    runs = Runs(small_disk)
    with pytest.raises(OutsideError) as caught:
        runs.attempt(watchers=[Watch({3: lambda: fill(small_disk)})], checkpoint_every_seconds=0.0)
    assert caught.value.exit_code == 5
    (small_disk / "ballast").unlink()
    assert 3 <= runs.spent <= 4
    assert not list(runs.checkpoints.glob("*/.*"))
    trained = runs.attempt()
    assert (trained.stopped, trained.charged) == ("steps", 8)
    assert 7 <= trained.step <= 8  # what was learnt in the first two steps was not lost


def test_a_full_disk_under_the_checkpoints_alone_keeps_ledger_and_checkpoint(tmp_path, small_disk):
    runs = Runs(tmp_path)
    runs.checkpoints = small_disk / "checkpoints"
    with pytest.raises(OutsideError, match=r"checkpoint = .* · could not be written"):
        runs.attempt(watchers=[Watch({3: lambda: fill(small_disk)})], checkpoint_every_seconds=0.0)
    (small_disk / "ballast").unlink()
    assert runs.spent == 3
    trained = runs.attempt()
    assert (trained.step, trained.charged) == (7, 8)
