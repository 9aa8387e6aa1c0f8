"""The main loop: what it spends, what it learns, what it leaves behind however it ends."""

import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from tests import oracles
from tests.models.conftest import TINY, TINY_UNET, records
from tests.training.conftest import OPEN, PLAN, UNITS, Watch, learning_rate

from sfumato.errors import LedgerError
from sfumato.privacy import accounting
from sfumato.privacy.ledger import Ledger, show
from sfumato.randomness import TestRandom
from sfumato.training import loop
from sfumato.training.settings import TrainingSettings

DOCUMENTED = {"step", "loss", "epsilon", "seconds", "examples_per_second"}  # design page: a run's folder


class Crash(Exception):
    """What nobody expects."""


def failing_losses(after: int):
    """The model's losses, until they raise: after the step was reserved, before it is committed."""

    def spoil(model):
        losses, calls = model.losses, []

        def failing(batch):
            calls.append(batch)
            if len(calls) > after:
                raise Crash
            return losses(batch)

        model.losses = failing

    return spoil


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# ---- an undisturbed run ----


def test_an_undisturbed_run_spends_exactly_its_plan(runs):
    watch = Watch()
    trained = runs.attempt(watchers=[watch])
    assert (trained.stopped, trained.step, trained.charged, trained.for_release) == ("steps", 8, 8, True)
    shown = show(runs.ledger_path)
    assert (shown["steps"], shown["uncommitted"], shown["attempts"]) == (8, 0, 1)
    assert shown["epsilon"] == pytest.approx(PLAN.epsilon(), abs=1e-9)
    assert watch.lines[-1]["epsilon"] == pytest.approx(PLAN.epsilon(), abs=1e-9)


def test_a_batch_in_parts_is_one_step_and_one_charge(runs):
    trained = runs.attempt(max_physical_batch_size=3)
    assert (trained.step, runs.spent) == (8, 8)


@pytest.mark.parametrize("plan", [OPEN, PLAN], ids=["not private", "private"])
def test_every_line_has_the_documented_figures(plan, runs):
    watch = Watch()
    trained = runs.attempt(plan, watchers=[watch])
    assert [line["step"] for line in watch.lines] == list(range(1, 9))
    for line in watch.lines:
        assert line.keys() >= DOCUMENTED
        assert line["loss"] > 0
        assert line["steps"] == 8
        assert line["seconds"] > 0
        assert line["seconds_left"] >= 0
        assert (line["epsilon"] is None) == (plan is OPEN)
    spent = [line["epsilon"] for line in watch.lines if line["epsilon"] is not None]
    assert spent == sorted(spent)
    assert watch.lines[-1]["seconds_left"] == 0
    assert watch.lines[-1]["examples_per_second"] == pytest.approx(
        trained.units_seen / watch.lines[-1]["seconds"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("plan", "share"), [(OPEN, 0.85), (replace(PLAN, noise_multiplier=0.1), 0.95)], ids=["not private", "private"]
)
def test_the_loss_falls_on_a_tiny_set(plan, share, runs):
    """Thirty passes over forty records, on fixed noises before and after; every source of chance has a fixed seed."""
    torch.manual_seed(0)
    losses = []

    def measure(model) -> None:
        table = model.encode(records([1] * UNITS))
        with torch.no_grad():
            rows = model.row_losses(table.batch(range(UNITS), records_per_unit=1), 8, torch.Generator().manual_seed(0))
        losses.append(rows.mean().item())

    trained = runs.attempt(
        replace(plan, steps=120),
        spoil=measure,
        random=TestRandom(0),
        learning_rate=0.02,
        schedule="constant",
        log_every=120,
    )
    measure(runs.model)
    assert losses[1] < share * losses[0]
    assert not trained.for_release  # chance came from a test source


def test_the_learning_rate_follows_its_schedule(runs):
    watch = Watch()
    runs.attempt(OPEN, watchers=[watch], learning_rate=0.1, warmup_steps=3)
    settings = TrainingSettings(steps=8, learning_rate=0.1, warmup_steps=3)
    expected = [learning_rate(settings, step / 8, step) for step in range(8)]
    assert [line["learning_rate"] for line in watch.lines] == pytest.approx(expected)


def test_a_constant_schedule_stays(runs):
    watch = Watch()
    runs.attempt(OPEN, watchers=[watch], learning_rate=0.1, warmup_steps=0, schedule="constant")
    assert [line["learning_rate"] for line in watch.lines] == pytest.approx([0.1] * 8)


def test_what_comes_out_is_the_average_of_the_weights(runs):
    """Slowly: the weights after every step, averaged one number at a time."""
    seen = []
    runs.attempt(OPEN, watchers=[Watch(dict.fromkeys(range(1, 9), lambda: seen.append(oracles.vector(runs.model))))])
    from tests.models.conftest import SHAPE

    from sfumato.models import model as models

    average = oracles.vector(models.build(TINY, picture_shape=SHAPE))
    for step, weights in enumerate(seen):
        decay = min(0.99, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(oracles.vector(runs.model), average, atol=1e-6, rtol=1e-5)
    assert not oracles.vector(runs.model).equal(seen[-1])


def test_pictures_are_of_the_average_and_the_weights_go_on_untouched(runs):
    """Whoever draws gets the averaged weights in the model; what it does to them does not reach those that are trained."""
    seen = {}

    class Spoil(Watch):
        def picture(self, step, model):
            seen["pictured"] = (step, oracles.vector(model))
            for parameter in model.parameters():
                parameter.data.fill_(100.0)

        def figures(self, values):
            seen[values["step"]] = oracles.vector(runs.model)

    runs.attempt(replace(OPEN, steps=11), watchers=[Spoil()], learning_rate=0.05)
    step, drawn = seen["pictured"]
    assert step == 10
    assert (drawn - seen[10]).abs().max() > 1e-3
    assert (seen[11] - seen[10]).abs().max() < 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "dp_adam_bc"])
def test_all_optimizers_train(optimizer, runs):
    before = []
    runs.attempt(PLAN, optimizer=optimizer, spoil=lambda model: before.append(oracles.vector(model)))
    assert not oracles.vector(runs.model).equal(before[0])


# ---- correlated and discrete noise ----


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
def test_an_undisturbed_run_with_correlated_noise_spends_its_cycles(noise, runs):
    """Eight steps of three bands: three cycles."""
    plan, watch = replace(PLAN, bands=3, noise=noise), Watch()
    trained = runs.attempt(plan, watchers=[watch], optimizer="dp_adam_bc")
    assert (trained.stopped, trained.step, trained.charged) == ("steps", 8, 8)
    shown = show(runs.ledger_path)
    assert (shown["steps"], shown["uncommitted"]) == (3, 0)
    assert shown["epsilon"] == pytest.approx(plan.epsilon(), abs=1e-9)
    assert watch.lines[-1]["epsilon"] == pytest.approx(plan.epsilon(), abs=1e-9)


def test_a_crash_within_a_cycle_loses_the_whole_cycle_and_no_more(runs):
    """Interrupted after four steps of three bands: two cycles are spent, the two steps that are left make the third."""
    plan = replace(PLAN, bands=3)
    first = runs.attempt(plan, watchers=[Watch({4: interrupt})])
    assert (first.stopped, first.step, first.charged) == ("interrupted", 4, 6)
    checkpoint = runs.checkpoints / "last" / "state.json"
    assert "noise" not in checkpoint.read_text().replace("noise_multiplier", "")
    second = runs.attempt(plan)
    assert (second.stopped, second.step, second.charged) == ("steps", 6, 8)
    assert show(runs.ledger_path)["epsilon"] == pytest.approx(plan.epsilon(), abs=1e-9)


# ---- batches of nobody ----


@pytest.mark.parametrize("settings", [TINY, TINY_UNET], ids=["mlp", "unet"])
def test_empty_batches_are_steps_of_noise_and_are_charged(settings, runs):
    """At q = 2.5e-8 nobody is drawn in five steps (but once in a million test runs)."""
    plan = replace(PLAN, expected_batch_size=1e-6, steps=5)
    watch, before = Watch(), []
    trained = runs.attempt(plan, watchers=[watch], settings=settings, spoil=lambda m: before.append(oracles.vector(m)))
    assert (trained.step, trained.charged, trained.units_seen) == (5, 5, 0)
    moved = oracles.vector(runs.model) - before[0]
    assert moved.isfinite().all()
    # An entry may come back to the same float32 by luck, at a rate of about 1e-4; without noise none would move.
    assert (moved != 0).double().mean() > 0.99
    assert all(line["loss"] != line["loss"] for line in watch.lines)  # NaN: there was nothing to lose


@pytest.mark.parametrize("settings", [TINY, TINY_UNET], ids=["mlp", "unet"])
def test_without_privacy_an_empty_batch_moves_nothing(settings, runs):
    before = []
    trained = runs.attempt(
        replace(OPEN, expected_batch_size=1e-6), settings=settings, spoil=lambda m: before.append(oracles.vector(m))
    )
    assert (trained.step, trained.units_seen) == (8, 0)
    torch.testing.assert_close(oracles.vector(runs.model), before[0], atol=1e-7, rtol=0)


# ---- ended early, and resumed ----


def test_an_interrupt_ends_cleanly_and_a_resume_spends_exactly_the_plan(runs):
    trained = runs.attempt(watchers=[Watch({3: interrupt})])
    assert (trained.stopped, trained.step, trained.charged) == ("interrupted", 3, 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    watch = Watch()
    trained = runs.attempt(watchers=[watch])
    assert (trained.stopped, trained.step, trained.charged) == ("steps", 8, 8)
    assert [line["step"] for line in watch.lines] == [4, 5, 6, 7, 8]
    with Ledger.open(runs.ledger_path, run="tiny/v1") as ledger:
        assert accounting.epsilon(ledger.spent(), PLAN.delta) == pytest.approx(PLAN.epsilon(), abs=1e-9)


def test_a_run_without_privacy_resumes_too(runs):
    assert runs.attempt(OPEN, watchers=[Watch({5: interrupt})]).step == 5
    trained = runs.attempt(OPEN)
    assert (trained.stopped, trained.step) == ("steps", 8)


def test_a_second_interrupt_does_not_wait_and_loses_no_charge(runs):
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        runs.attempt(watchers=[Watch({3: twice})])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert runs.spent == 3
    trained = runs.attempt()
    assert (trained.step, trained.charged) == (5, 8)  # no checkpoint was there: three steps are wasted


def test_an_interrupt_while_the_last_checkpoint_is_written_is_one(runs, monkeypatch):
    save = loop.state.save

    def interrupted(*arguments):
        interrupt()
        return save(*arguments)

    monkeypatch.setattr(loop.state, "save", interrupted)
    try:
        trained = runs.attempt()
    except KeyboardInterrupt:
        pytest.fail("the interrupt was not waited for")
    assert (trained.stopped, trained.step) == ("interrupted", 8)
    monkeypatch.undo()
    trained = runs.attempt()
    assert (trained.stopped, trained.step, trained.charged) == ("steps", 8, 8)


@pytest.mark.parametrize("every", [0.0, 3600.0], ids=["checkpoint at each step", "no checkpoint"])
def test_a_crash_between_reserve_and_commit_is_charged_and_taken_off(every, runs):
    with pytest.raises(Crash):
        runs.attempt(spoil=failing_losses(after=3 + 2), checkpoint_every_seconds=every)  # 2: the check before the loop
    charged = runs.spent
    assert 3 < charged < 8
    shown = show(runs.ledger_path)
    assert shown["uncommitted"] == 1
    assert "forward" not in vars(runs.model.denoiser.outward)  # the engine let go of the model
    watch = Watch()
    trained = runs.attempt(watchers=[watch])
    assert trained.charged == 8
    assert watch.lines[0]["step"] == charged + 1
    taken_before = charged - 1 if every == 0 else 0
    assert trained.step == taken_before + 8 - charged
    assert trained.step + (charged - taken_before) == PLAN.steps


def test_the_schedule_counts_what_was_wasted_and_the_warm_up_what_was_learnt(runs):
    with pytest.raises(Crash):
        runs.attempt(spoil=failing_losses(after=5), learning_rate=0.1, warmup_steps=3)
    wasted = runs.spent
    watch = Watch()
    runs.attempt(watchers=[watch], learning_rate=0.1, warmup_steps=3)
    settings = TrainingSettings(steps=8, learning_rate=0.1, warmup_steps=3)
    expected = [learning_rate(settings, (wasted + step) / 8, step) for step in range(8 - wasted)]
    assert [line["learning_rate"] for line in watch.lines] == pytest.approx(expected)


def test_a_crash_in_the_last_step_leaves_a_run_that_can_be_finished(runs):
    with pytest.raises(Crash):
        runs.attempt(spoil=failing_losses(after=7 + 2), checkpoint_every_seconds=0.0)
    assert runs.spent == 8
    trained = runs.attempt()
    assert (trained.stopped, trained.step, trained.charged) == ("steps", 7, 8)


def test_a_finished_run_takes_no_further_step(runs):
    runs.attempt()
    weights = oracles.vector(runs.model)
    trained = runs.attempt()
    assert (trained.stopped, trained.step, trained.charged) == ("steps", 8, 8)
    assert oracles.vector(runs.model).equal(weights)


def test_neither_the_draw_nor_the_noise_is_restored(runs, tmp_path):
    """Two resumes from one checkpoint, with torch's own chance the same: other units, other noise, other weights."""
    runs.attempt(watchers=[Watch({3: interrupt})], checkpoint_every_seconds=0.0)
    results = []
    for name in ("one", "two"):
        copy = type(runs)(tmp_path / name)
        copy.folder.mkdir()
        shutil.copytree(runs.checkpoints, copy.checkpoints, symlinks=True)
        shutil.copy(runs.ledger_path, copy.ledger_path)
        torch.manual_seed(0)
        watch = Watch()
        trained = copy.attempt(watchers=[watch])
        results.append((oracles.vector(copy.model), trained.units_seen, [line["loss"] for line in watch.lines]))
    assert not results[0][0].equal(results[1][0])
    assert results[0][2] != results[1][2]


def test_a_checkpoint_newer_than_its_ledger_is_refused(runs, tmp_path):
    runs.attempt(watchers=[Watch({2: interrupt})])
    older = shutil.copy(runs.ledger_path, tmp_path / "older.db")
    runs.attempt(watchers=[Watch({5: interrupt})])
    shutil.copy(older, runs.ledger_path)
    with pytest.raises(LedgerError, match="the ledger is older than the checkpoint") as caught:
        runs.attempt()
    assert caught.value.exit_code == 3


def test_a_loss_that_couples_units_is_refused_before_anything_is_charged(runs):
    from sfumato.errors import UnsupportedLayer

    def spoil(model):
        losses = model.losses
        model.losses = lambda batch: losses(batch) * losses(batch).mean()

    with pytest.raises(UnsupportedLayer):
        runs.attempt(spoil=spoil)
    assert runs.spent == 0


def test_records_of_a_unit_beyond_the_plans_take_no_part(runs):
    """Two plans' worth of rows: a unit with three records gives one gradient, and one loss."""
    from tests.models.conftest import SHAPE

    from sfumato.models import model as models
    from sfumato.training.settings import PerformanceSettings

    model = models.build(TINY, picture_shape=SHAPE)
    table = model.encode(records([3] * 20))
    rows = []
    losses = model.losses
    model.losses = lambda batch: (rows.append((batch.num_rows, batch.num_units)), losses(batch))[1]
    plan = replace(PLAN, population=20, expected_batch_size=20, steps=2, unit="person", records_per_unit=2)
    with Ledger.open(runs.ledger_path, run="tiny/v1", plan=plan) as ledger:
        loop.train(
            model,
            table,
            plan,
            TrainingSettings(steps=2),
            PerformanceSettings(),
            checkpoints=runs.checkpoints,
            ledger=ledger,
        )
    assert rows[-2:] == [(40, 20), (40, 20)]  # every unit is drawn: q = 1
