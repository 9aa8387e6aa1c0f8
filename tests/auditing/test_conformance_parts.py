"""The pieces of the suite, each against something slower or known: the probe, the bounds of mu, the verdicts, the adapter."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tests.auditing.adapters import loop

from sfumato.auditing.conformance import (
    accounts,
    adapter,
    boundary,
    bugs,
    game,
    outcome,
    page,
    probe,
    sensitivity,
    suite,
)
from sfumato.auditing.conformance.bench import Bench, Released, spread
from sfumato.auditing.conformance.outcome import Evidence, Finding, Undecided
from sfumato.errors import UsageError


def test_a_units_gradient_in_the_probe_is_its_data():
    model = probe.Probe(torch.float64)
    rows = torch.randn(3, sum(probe.SIZES), dtype=torch.float64)
    for row in rows:
        gradients = torch.autograd.grad(model(row[None]).sum(), list(model.parameters()))
        assert torch.equal(torch.cat([g.flatten() for g in gradients]), row)


def test_directions_have_length_one_and_stay_where_they_should():
    for index, size in enumerate(probe.SIZES):
        for direction, count in ((probe.in_tensor(index), size), (probe.in_coordinate(index), 1)):
            assert float(direction.norm()) == pytest.approx(1.0)
            pieces = direction.split(probe.SIZES)
            assert int((pieces[index] != 0).sum()) == count
            assert sum(int((piece != 0).sum()) for piece in pieces) == count
    assert float(probe.everywhere().norm()) == pytest.approx(1.0)


def test_the_lower_bound_of_mu_is_above_the_truth_as_seldom_as_it_says():
    """2,000 measurements of a Gaussian that loses exactly mu, at alpha = .05; more than 149 alarms have probability 1e-6."""
    rng = np.random.default_rng(3)
    moved = Released((torch.full((4,), 0.3).double(), torch.full((9,), 0.2).double()), 2)
    stds = (1.0, 2.0)
    truth = math.sqrt(sum((float(b.norm()) / s) ** 2 for b, s in zip(moved.blocks, stds, strict=True)))
    alarms = 0
    for _ in range(2_000):
        noise = [
            Released(
                tuple(torch.from_numpy(rng.normal(0, s, len(b))) for b, s in zip(moved.blocks, stds, strict=True)), 2
            )
            for _ in range(10)
        ]
        alarms += sensitivity.mu(moved, spread(noise), 0.05) > truth
    assert alarms <= 149


def test_mu_without_noise_is_infinite_and_without_movement_zero():
    moved = Released((torch.ones(3).double(), torch.zeros(2).double()), 2)
    assert sensitivity.mu(moved, [(0.0, 3), (0.0, 2)]) == math.inf
    assert sensitivity.mu(moved.scaled(0.0), [(0.0, 3), (0.0, 2)]) == 0.0
    assert sensitivity.mu(moved.scaled(math.nan), [(1.0, 3), (1.0, 2)]) == math.inf


def test_the_games_bound_is_above_the_truth_as_seldom_as_it_says():
    """1,000 games of two normals mu = .5 apart, each rate at 2.5 %: at most 5 % alarms, more than 87 have probability 1e-6."""
    rng = np.random.default_rng(4)
    alarms = sum(game._mu(rng.normal(0, 1, 90), rng.normal(0.5, 1, 90), 0.025) > 0.5 for _ in range(1_000))
    assert alarms <= binom.ppf(1 - 1e-6, 1_000, 0.05)
    assert game._mu(rng.normal(0, 1, 90), rng.normal(50, 1, 90), 0.025) > 2.5  # and sees what is there


def test_every_bug_that_is_put_in_is_of_the_kind_it_says():
    """The effective noise multiplier of the plain loop, claimed 1: exact for what only moves the sum."""
    bench = Bench(loop.trainer(), seed=1)

    def effective(broken: Bench) -> float:
        noise = [(loop.SIGMA * loop.C / loop.EXPECTED, 10**9)] * len(probe.SIZES)
        moves = [sensitivity.lone(broken, probe.everywhere()), sensitivity.crowded(broken)[0]]
        return 1 / max(sensitivity.mu(moved, noise) for moved in moves)

    assert effective(bench) == pytest.approx(1.0, rel=1e-3)
    assert effective(bench.broken(bugs.units_twice)) == pytest.approx(1 / 2, rel=1e-3)
    assert effective(bench.broken(bugs.tensor_by_tensor)) == pytest.approx(1 / 6**0.5, rel=1e-3)
    assert effective(bench.broken(bugs.by_coordinates)) == pytest.approx(1 / 32**0.5, rel=1e-3)
    assert effective(bench.broken(bugs.the_mean)) == pytest.approx(1 / 2, rel=1e-3)
    assert effective(bench.broken(bugs.in_pairs)) == pytest.approx(1 / 2, rel=1e-3)


def test_a_trainer_that_raises_is_undecided_and_a_run_is_not_repeated():
    calls = []

    def step(model, inputs, noise_multiplier, generator):
        calls.append(len(inputs))
        if not len(inputs):
            raise RuntimeError("nobody is here")
        loop.step(model, inputs, noise_multiplier, generator)

    bench = Bench(loop.trainer(step=step))
    for _ in range(2):
        with pytest.raises(Undecided, match="step raised RuntimeError: nobody is here"):
            bench.run(bench.nobody())
        bench.run(bench.crowd(1))
    assert calls == [0, 1]


def test_noise_differs_from_run_to_run_and_the_global_generator_is_left_alone():
    bench = Bench(loop.trainer(), seed=5)
    before = torch.random.get_rng_state()
    a, b = (bench.run(bench.crowd(1), 1.0, seed).vector for seed in (1, 2))
    assert not torch.equal(a, b)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a, Bench(loop.trainer(), seed=5).run(bench.crowd(1), 1.0, 1).vector)  # a pass can be repeated
    assert not torch.equal(a, Bench(loop.trainer(), seed=6).run(bench.crowd(1), 1.0, 1).vector)


# ------------------------------------------------------------------------------------------------------------ verdicts


def check_of(look, control_found=True):
    def looking(bench, alpha):
        return look() if bench is not None else Finding(violated=control_found, because="the bug")

    return suite.Check(row=1, test="S", name="x", look=looking, control=lambda bench: None, chance=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "control", "verdict"),
    [
        (True, True, "VIOLATION"),
        (True, False, "VIOLATION"),
        (False, True, "CONSISTENT"),
        (False, False, "INCONCLUSIVE"),
    ],
)
def test_consistent_needs_a_control_that_was_found(found, control, verdict):
    bench = Bench(loop.trainer())
    decided = suite.decide(check_of(lambda: Finding(violated=found, because="looked"), control), bench, 1e-5)
    assert decided.verdict == verdict
    assert decided.false_alarm == 1e-5


def test_what_cannot_be_looked_at_is_inconclusive_with_its_reason():
    def cannot():
        raise Undecided("the adapter gives no train")

    decided = suite.decide(check_of(cannot), Bench(loop.trainer()), 1e-5)
    assert (decided.verdict, decided.because) == ("INCONCLUSIVE", "the adapter gives no train")


def evidence(verdict):
    return Evidence(name="x", test="S", verdict=verdict, because=verdict.lower(), false_alarm=0.0)


def test_the_gravest_evidence_decides_a_row_and_a_gap_is_graver_than_consistency():
    row = outcome.row_of
    assert row(1, [evidence("CONSISTENT"), evidence("VIOLATION"), evidence("INCONCLUSIVE")]).verdict == "VIOLATION"
    assert row(1, [evidence("CONSISTENT"), evidence("INCONCLUSIVE")]).verdict == "INCONCLUSIVE"
    assert row(1, [evidence("CONSISTENT")]).verdict == "CONSISTENT"
    assert row(1, []).verdict == "INCONCLUSIVE"
    other = row(19, [], not_about="no sites")
    assert (other.verdict, other.applies, other.because) == ("INCONCLUSIVE", False, "no sites")


def test_one_violation_decides_the_whole_and_rows_that_do_not_apply_leave_it_consistent():
    rows = [outcome.row_of(1, [evidence("CONSISTENT")]), outcome.row_of(19, [], not_about="no sites")]
    assert outcome.overall(rows)[0] == "CONSISTENT"
    assert outcome.overall([*rows, outcome.row_of(2, [evidence("INCONCLUSIVE")])])[0] == "INCONCLUSIVE"
    assert outcome.overall([*rows, outcome.row_of(2, [evidence("VIOLATION")])]) == (
        "VIOLATION",
        "the claim is false: row 2.",
    )


def test_the_false_alarms_of_all_checks_add_up_to_that_of_the_pass():
    chance = [check for check in suite.CHECKS if check.chance]
    result = suite.audit(loop.trainer(), seed=1, games=9, noise_runs=8)
    used = sum(item.false_alarm for row in result.rows for item in row.evidence)
    assert 0 < used <= suite.FALSE_ALARM * (1 + 1e-9)
    assert {check.row for check in suite.CHECKS} == set(outcome.FAILURES) == set(range(1, 25))
    assert len(chance) < len(suite.CHECKS)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_more_noise_than_claimed_is_no_violation_and_is_not_called_consistent():
    def step(model, inputs, noise_multiplier, generator):
        loop.step(model, inputs, 64 * noise_multiplier, generator)

    result = suite.audit(loop.trainer(step=step), seed=1, games=12)
    assert result.convicted == []
    assert result.rows[2].verdict == "INCONCLUSIVE"
    assert "more than claimed, so the guarantee holds" in result.rows[2].because


def test_epsilon_of_replace_one_is_that_of_twice_the_distance():
    assert accounts.epsilon(2.0, 1.0, 1, 1e-5, "replace_one")[0] == pytest.approx(
        accounts.epsilon(1.0, 1.0, 1, 1e-5, "add_or_remove")[0]
    )
    sampled, how = accounts.epsilon(1.0, 0.1, 10, 1e-5, "replace_one")
    assert sampled >= accounts.epsilon(1.0, 0.1, 10, 1e-5, "add_or_remove")[0], how


def test_hints_name_the_lines_of_the_source():
    from tests.auditing.museum import clip_of_the_mean, seeded_noise

    (hint,) = [hint for hint in boundary.hints(clip_of_the_mean.wrong()) if "clip_grad_norm_" in hint]
    line = int(hint.split(":")[1])
    assert "clip_grad_norm_" in Path(clip_of_the_mean.__file__).read_text().splitlines()[line - 1]
    assert any("manual_seed" in hint for hint in boundary.hints(seeded_noise.wrong()))
    assert boundary.hints(loop.trainer()) == []


def test_a_claim_that_makes_no_sense_is_refused():
    for changes in ({"max_grad_norm": 0.0}, {"noise_multiplier": -1.0}, {"sampling_rate": 2.0}, {"adjacency": "next"}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            loop.claim(**changes)


ADAPTER = """
from sfumato.auditing.conformance import Claim, Trainer

def step(model, inputs, noise_multiplier, generator):
    pass

def trainer():
    return Trainer(claim=Claim(max_grad_norm=1.0, noise_multiplier=1.0), step=step, name="mine")

def something_else():
    return 3

def raising():
    return 1 / 0
"""


def test_an_adapter_is_loaded_from_a_file_or_a_module_and_what_is_none_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my_adapter.py").write_text(ADAPTER)
    assert adapter.load(f"{tmp_path}/my_adapter.py:trainer").name == "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert adapter.load("my_adapter:trainer").name == "mine"
    for target, said in [
        ("my_adapter.py", "must be MODULE:FUNCTION"),
        ("my_adapter.py:", "must be MODULE:FUNCTION"),
        ("missing.py:trainer", "there is no file missing.py"),
        ("missing.adapter:trainer", "there is no module missing.adapter"),
        ("my_adapter.py:nothing", "has no function nothing"),
        ("my_adapter.py:something_else", "returned int, not a conformance.Trainer"),
        ("my_adapter.py:raising", "raised ZeroDivisionError: division by zero"),
    ]:
        with pytest.raises(UsageError, match=said):
            adapter.load(target)


def test_a_trainer_that_does_not_train_the_model_it_is_given_is_wrong_use(tmp_path):
    (tmp_path / "idle.py").write_text(ADAPTER)
    with pytest.raises(UsageError, match="one step did not change the model's parameters"):
        suite.audit(adapter.load(f"{tmp_path}/idle.py:trainer"))

    def broken(*_):
        raise RuntimeError("no such layer")

    with pytest.raises(UsageError, match="step raised RuntimeError: no such layer, on two ordinary units"):
        suite.audit(loop.trainer(step=broken))


def test_the_page_has_a_line_for_every_row_and_the_evidence():
    result = suite.audit(loop.trainer(), seed=1, games=9, noise_runs=8)
    text = page.markdown(result)
    for number, failure in outcome.FAILURES.items():
        assert f"| {number} | {failure} |" in text
    for check in suite.CHECKS:
        if check.when(loop.trainer()):
            assert f"**{check.row} · {check.name}**" in text
    assert "(seed 1)" in text


PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"


def test_the_adapter_of_the_documentation_works(tmp_path):
    """Its noise is secret, so that a pass cannot be repeated: it is convicted by chance once in a million."""
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "documented.py").write_text(code)
    trainer = adapter.load(f"{tmp_path}/documented.py:trainer")
    result = suite.audit(trainer, false_alarm=1e-6, noise_runs=8, games=9)
    assert result.convicted == []
    consistent = {row.number for row in result.rows if row.verdict == "CONSISTENT"}
    assert consistent >= {1, 2, 4, 5, 11, 12, 13, 17, 22, 23}, [(row.number, row.because) for row in result.rows]


def test_the_table_of_the_documentation_is_that_of_the_suite():
    rows = {
        int(line.split("|")[1]): line
        for line in PAGE.read_text().splitlines()
        if line.startswith(tuple(f"| {i} |" for i in range(1, 25)))
    }
    alpha = suite.FALSE_ALARM / sum(check.chance for check in suite.CHECKS)
    pieces = sorted(path.stem for path in (Path(__file__).parent / "museum").glob("*.py"))
    for number, failure in outcome.FAILURES.items():
        own = [check for check in suite.CHECKS if check.row == number]
        chance = sum(check.chance for check in own)
        assert failure in rows[number]
        assert all(f"{check.test} {check.name}" in rows[number] for check in own)
        assert (f"{chance * alpha:.1e}" if chance else "exact") in rows[number]
    assert all(sum(f"`{name}`" in row for row in rows.values()) == 1 for name in pieces)


def test_calls_that_raise_make_their_rows_inconclusive_and_are_told():
    def broken(*_):
        raise RuntimeError("out of order")

    calls = ("sample", "train", "resume", "step_together", "accountant", "prepare", "lower_bound")
    result = suite.audit(loop.trainer(**dict.fromkeys(calls, broken)), seed=1, games=9, noise_runs=8, controls=False)
    because = {row.number: row.because for row in result.rows}
    for row, call in (
        (7, "sample"),
        (11, "train"),
        (16, "resume"),
        (18, "step_together"),
        (21, "prepare"),
        (23, "accountant"),
    ):
        assert f"{call} raised RuntimeError: out of order" in because[row]
    assert "lower_bound raised RuntimeError" in because[24]
    assert result.convicted == []
    for call in ("model", "units"):
        own = suite.audit(loop.trainer(**{call: broken}), seed=1, games=9, noise_runs=8, controls=False)
        assert f"{call} raised RuntimeError: out of order" in {row.number: row.because for row in own.rows}[6]
