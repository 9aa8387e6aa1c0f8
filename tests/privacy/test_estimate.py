"""Private estimates: exact sensitivity under three adjacencies, the law of the noise, coverage, and wrong ones convicted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, chisquare, kstest, norm

from sfumato.errors import UsageError
from sfumato.privacy import gaussian
from sfumato.privacy.estimate import Answer, Column, answer, charged, contributions, figures, noisy_sum, safe_population
from sfumato.privacy.events import ADJACENCIES, Event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.noise import spacing
from sfumato.privacy.questions import Histogram, Mean, Quantile, Question, Total, UnitCount, sums_of
from sfumato.privacy.releases import Estimate
from sfumato.randomness import TestRandom

K = 3
QUESTIONS: list[Question] = [
    UnitCount(),
    Histogram(categories=("a", "b", "c")),
    Total(low=-1.0, high=4.0),
    Total(low=2.0, high=5.0),
    Mean(low=-3.0, high=7.0),
    Quantile(quantile=0.9, low=1e-3, high=1e3),
    Quantile(quantile=0.5, low=0.0, high=10.0, spacing="linear"),
]
THRESHOLD = 2.0
SEEN_ALARM = 1e-6  # the chance of a false alarm of every statistical test here; the seeds are fixed

values = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1.0, 2.0, -1.0, 4.0, 1e308, -1e308, 5e-324])
)
records = st.lists(values, min_size=1, max_size=2 * K)


def plan_of(question: Question, **changes) -> Estimate:
    common = {"population": 1_000, "delta": 1e-5, "unit": "person", "records_per_unit": K}
    return Estimate(**{"name": "test", "question": question, "noise_multiplier": 2.0, **common, **changes})


def column_of(people: list[list[float]]) -> Column:
    owners = [f"{i:03d}" for i, rows in enumerate(people) for _ in rows]
    return Column(np.array([v for rows in people for v in rows], dtype=float), np.array(owners, dtype=str))


def exact_sum(question: Question, people: list[list[float]], seed: int = 0) -> np.ndarray:
    rows = contributions(question, column_of(people), K, TestRandom(seed), THRESHOLD)
    return noisy_sum(rows, question.radius(K), 0.0, TestRandom(0))


# -- sensitivity --


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.kind)
@settings(deadline=None, max_examples=150)
@given(others=st.lists(records, max_size=4), hostile=records, instead=records)
def test_no_unit_moves_a_sum_further_than_the_question_says(question, others, hostile, instead):
    """The last unit is there, is not, is another, or counts as zero; the others' records are chosen alike (one seed)."""
    there = exact_sum(question, [*others, hostile])
    gone = exact_sum(question, others)
    another = exact_sum(question, [*others, instead])
    assert np.linalg.norm(there - gone) <= question.radius(K)  # also of zero_out: what is zero adds nothing
    assert np.linalg.norm(there - another) <= question.diameter(K) * (1 + 1e-15)


@pytest.mark.parametrize(
    ("question", "one", "other"),
    [
        (Histogram(categories=("a", "b", "c")), [0.0] * 6, [2.0] * 6),
        (Total(low=-1.0, high=4.0), [9.0] * 6, [-9.0] * 6),
        (Total(low=2.0, high=5.0), [9.0] * 6, [math.nan]),
        (Mean(low=-3.0, high=7.0), [math.inf], [-math.inf]),
        (Quantile(quantile=0.5, low=1e-3, high=1e3), [1.0], [3.0]),
    ],
    ids=lambda x: getattr(x, "kind", None),
)
def test_the_most_hostile_units_reach_both_bounds(question, one, other):
    nothing = exact_sum(question, [[1.0]])
    reached = max(np.linalg.norm(exact_sum(question, [[1.0], rows]) - nothing) for rows in (one, other))
    assert reached == pytest.approx(question.radius(K), rel=1e-8)
    apart = exact_sum(question, [[1.0], one]) - exact_sum(question, [[1.0], other])
    assert np.linalg.norm(apart) == pytest.approx(question.diameter(K), rel=1e-8)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("question", QUESTIONS[1:], ids=lambda q: q.kind)
def test_the_charge_is_the_noise_over_the_sensitivity_under_every_adjacency(question, adjacency):
    """The oracle: mu of all T sums together is sqrt(T) sensitivity / standard deviation, and epsilon follows in closed form."""
    plan = plan_of(question, adjacency=adjacency)
    sensitivity = question.diameter(K) if adjacency == "replace_one" else question.radius(K)
    mu = math.sqrt(sums_of(question)) * sensitivity / plan.noise_std
    assert plan.epsilon() == pytest.approx(gaussian.epsilon_of(mu, plan.delta), rel=1e-9)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_sampled_quantile_is_charged_as_one_sampled_gaussian_of_all_its_counts(adjacency):
    plan = plan_of(QUESTIONS[5], adjacency=adjacency, sampling_rate=0.1)
    assert plan.events() == (Event(sampling_rate=0.1, noise_multiplier=2.0),)
    assert plan.noise_std == pytest.approx(2.0 * math.sqrt(8) * 0.9)  # the radius, also under replace_one
    whole = plan_of(QUESTIONS[5], adjacency=adjacency)
    assert plan.epsilon() < 0.5 * whole.epsilon()
    assert whole.noise_std == pytest.approx(2.0 * math.sqrt(8) * (0.5 if adjacency == "replace_one" else 0.9))


def test_half_the_diameter_is_too_little_noise_for_a_sampled_exchange_and_the_radius_is_enough():
    """One count of a quantile 0.9, rate 0.1: a unit at -0.9 becomes one at 0.1, or is not drawn. Integrals of the densities."""
    plan = plan_of(Quantile(quantile=0.9, low=1.0, high=2.0, halvings=1), adjacency="replace_one", sampling_rate=0.1)
    x, step = np.linspace(-30, 30, 600_001, retstep=True)

    def delta(std: float) -> float:
        one, other = (0.9 * norm.pdf(x, 0, std) + 0.1 * norm.pdf(x, mean, std) for mean in (-0.9, 0.1))
        factor = math.exp(plan.epsilon())
        return max(float(np.maximum(a - factor * b, 0).sum() * step) for a, b in ((one, other), (other, one)))

    assert delta(plan.noise_std) <= plan.delta < delta(plan.noise_multiplier * 0.5)


def test_a_sum_in_floating_point_moves_further_than_its_bound_and_ours_does_not():
    """A unit adds 1. The wrong one adds up in doubles: sometimes the sum moves by more than 1."""
    random = np.random.default_rng(0)
    wrong, ours = [], []
    for _ in range(200):
        rows = random.random((1000, 1))
        more = np.concatenate([rows, [[1.0]]])
        wrong.append(float(more.sum() - rows.sum()))
        ours.append(float((noisy_sum(more, 1.0, 0.0, TestRandom(0)) - noisy_sum(rows, 1.0, 0.0, TestRandom(0)))[0]))
        shuffled = random.permutation(rows)
        assert noisy_sum(shuffled, 1.0, 0.0, TestRandom(0)) == noisy_sum(rows, 1.0, 0.0, TestRandom(0))
    assert max(wrong) > 1.0
    assert set(ours) == {1.0}


def test_a_contribution_between_two_points_of_the_grid_is_rounded_towards_zero():
    """Noise of 2^31 has a grid of 2: rounding 1.9 to the nearest would move the sum by more than 1.9."""
    std = 2.0**31
    assert spacing(std) == 2.0
    for value, moved in ((1.9, 0.0), (-1.9, 0.0), (3.9, 2.0), (-2.0, -2.0)):
        one, none = (noisy_sum(np.array([[x]]), 4.0, std, TestRandom(3)) for x in (value, 0.0))
        assert one - none == moved


# -- the wrong ones --


def test_dividing_by_the_private_number_of_units_is_convicted():
    """Claimed: a unit moves the mean by (high - low) / 2N. With the true count as divisor, by up to (high - low) / 2."""
    question, people = Mean(low=0.0, high=1.0), [[1.0]]

    def wrong(people: list[list[float]]) -> float:
        return float(exact_sum(question, people)[0]) / len(people)

    def right(people: list[list[float]]) -> float:
        return float(exact_sum(question, people)[0]) / 1_000

    claimed = question.radius(K) / 1_000
    assert abs(right([*people, [0.0]]) - right(people)) <= claimed
    assert abs(wrong([*people, [0.0]]) - wrong(people)) > 100 * claimed


def test_a_person_whose_records_are_all_counted_is_convicted():
    question, hostile = Histogram(categories=("a", "b")), [0.0] * 50
    unbounded = column_of([[1.0], hostile])
    moved = contributions(question, unbounded, 1_000, TestRandom(0)).sum(axis=0) - [0.0, 1.0]
    assert np.linalg.norm(moved) == 50.0 > question.radius(K)
    assert np.linalg.norm(contributions(question, unbounded, K, TestRandom(0)).sum(axis=0) - [0.0, 1.0]) == K


def test_a_quantile_without_noise_is_convicted_and_ours_is_not():
    """50 units at 1 and 50 at 9, with and without one more: without noise every run tells the two apart. Ours tells
    them apart no better than its mu allows: total variation 2 Phi(mu/2) - 1, measured over 2 x 400 runs."""
    question = Quantile(quantile=0.5, low=0.5, high=10.0, halvings=4, spacing="linear")
    people = [[1.0]] * 50 + [[9.0]] * 50
    neighbour = [*people, [9.0]]

    def median(people: list[list[float]], noise: float, seed: int) -> float:
        return answer(plan_of(question, noise_multiplier=noise), column_of(people), TestRandom(seed))["value"].value

    assert {median(people, 0.0, s) for s in range(5)}.isdisjoint({median(neighbour, 0.0, s) for s in range(5)})
    ours = [np.array([median(who, 2.0, seed) for seed in range(400)]) for who in (people, neighbour)]
    allowed = 2 * norm.cdf(0.5 / 2) - 1  # mu = 1 / noise multiplier
    error = norm.isf(SEEN_ALARM / 2) * math.sqrt(2 * 0.25 / 400)
    for edge in np.unique(np.concatenate(ours)):
        assert abs((ours[0] <= edge).mean() - (ours[1] <= edge).mean()) <= allowed + error


def test_noise_of_one_count_on_each_of_the_eight_is_convicted():
    question = QUESTIONS[5]
    wrong = replace(plan_of(question), question=replace(question, halvings=1)).noise_std  # ignores the other seven
    mu = math.sqrt(8) * question.radius(K) / wrong
    assert gaussian.epsilon_of(mu, 1e-5) > 2.5 * plan_of(question).epsilon()


# -- the noise --


def residuals(question: Question, count: int) -> np.ndarray:
    """(answer - truth) / its stated standard deviation."""
    plan, column = plan_of(question), column_of([[1.0, 2.0], [0.0], [2.0, 2.0, 1.0]])
    truth = answer(replace(plan, noise_multiplier=0.0), column, TestRandom(0))
    random = TestRandom(7)
    found = []
    while len(found) < count:
        found += [(a.value - truth[name].value) / a.std for name, a in answer(plan, column, random).items()]
    return np.array(found[:count])


@pytest.mark.parametrize("question", [*QUESTIONS[:5]], ids=lambda q: q.kind)
def test_the_noise_is_normal_with_the_stated_deviation(question):
    """Kolmogorov-Smirnov and chi-square on 3,000 answers."""
    drawn = residuals(question, 3_000)
    assert kstest(drawn, norm.cdf).pvalue > SEEN_ALARM
    total = float(np.square(drawn).sum())
    assert chi2.ppf(SEEN_ALARM / 2, 3_000) < total < chi2.isf(SEEN_ALARM / 2, 3_000)


def test_every_bin_has_noise_of_its_own():
    plan = plan_of(Histogram(categories=tuple(f"{i}" for i in range(2_000))))
    drawn = np.array([a.value / a.std for a in answer(plan, column_of([[5.0]]), TestRandom(3)).values()])
    drawn[5] -= 1 / plan.noise_std
    assert kstest(drawn, norm.cdf).pvalue > SEEN_ALARM
    assert abs(float(drawn[1:] @ drawn[:-1])) < norm.isf(SEEN_ALARM / 2) * math.sqrt(2_000)


def test_which_numbers_can_come_out_does_not_depend_on_the_data():
    plan = plan_of(QUESTIONS[2])
    for people in ([[math.pi]], [[1e-9, 0.1]], [[4.0]] * 7):
        value = answer(plan, column_of(people), TestRandom(1))["value"].value
        assert (value / spacing(plan.noise_std)).is_integer()


# -- the interval --


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        (UnitCount(), {"value": 60.0}),
        (Histogram(categories=("a", "b", "c")), {"a": 20.0, "b": 20.0, "c": 20.0}),
        (Total(low=0.0, high=4.0), {"value": 60.0}),
        (Mean(low=-3.0, high=7.0), {"value": 2.0 + 60 * (1.0 - 2.0) / 1_000}),
        (Quantile(quantile=0.4, low=0.25, high=8.0, halvings=5), {"value": 1.0}),
    ],
    ids=lambda x: getattr(x, "kind", None),
)
def test_intervals_hold_as_often_as_they_say(question, truth):
    """600 intervals of 90 %: no more misses than a binomial allows; for the exact ones no fewer either."""
    column = column_of([[float(i % 3)] for i in range(60)])
    random, plan, missed = TestRandom(11), plan_of(question, noise_multiplier=1.0), 0
    for _ in range(600):
        found = answer(plan, column, random, confidence=0.9)
        missed += any(not a.low <= truth[name] <= a.high for name, a in found.items())
    assert missed <= binom.isf(SEEN_ALARM, 600, 0.1)
    if isinstance(question, UnitCount | Total | Mean):
        assert missed >= binom.ppf(SEEN_ALARM, 600, 0.1)


def test_the_quantile_is_the_true_one_where_there_are_many_units_and_a_cell_near_it():
    plan = plan_of(Quantile(quantile=0.75, low=1e-4, high=1e4, halvings=10), population=20_000)
    column = Column(np.exp(np.random.default_rng(0).normal(0, 2, 20_000)), np.arange(20_000))
    found = answer(plan, column, TestRandom(2))["value"]
    true = float(np.quantile(column.values, 0.75))
    assert found.low < true <= found.high
    assert found.value == pytest.approx(true, rel=0.05)  # cells of 2 %, noise of 5 units of rank
    assert found.high / found.low < 1.2


def test_the_interval_of_a_sampled_quantile_covers_that_of_all_units():
    """300 samples of 10 %, 90 % intervals."""
    question = Quantile(quantile=0.5, low=0.1, high=10.0, halvings=6)
    column = Column(np.exp(np.random.default_rng(1).normal(0, 1, 1_000)), np.arange(1_000))
    plan = plan_of(question, sampling_rate=0.1, unit="record", records_per_unit=1, noise_multiplier=1.0)
    true, random = float(np.sort(column.values)[499]), TestRandom(5)
    found = [charged(plan, column, ledger=None, random=random, confidence=0.9)["value"] for _ in range(300)]
    missed = sum(not a.low <= true <= a.high for a in found)
    assert missed <= binom.isf(SEEN_ALARM, 300, 0.1)
    assert np.median([a.value for a in found]) == pytest.approx(true, rel=0.15)


def test_a_number_of_units_to_plan_with_is_seldom_too_small():
    """95 % intervals: below the truth in 2.5 % of 600, but for a binomial's tail."""
    plan, random = plan_of(UnitCount(), noise_multiplier=5.0), TestRandom(4)
    column = column_of([[0.0]] * 80)
    low = sum(safe_population(answer(plan, column, random)["value"]) < 80 for _ in range(600))
    assert low <= binom.isf(SEEN_ALARM, 600, 0.025)
    assert safe_population(Answer(value=-9.0, std=1.0, low=-11.0, high=-7.0, confidence=0.95)) == 1


# -- what is asked, of whom --


def test_what_is_no_number_or_out_of_range_is_clipped_and_never_refused():
    histogram = exact_sum(QUESTIONS[1], [[math.nan], [-1.0], [3.0], [0.5], [math.inf], [2.0]])
    assert histogram.tolist() == [0.0, 0.0, 1.0]
    assert exact_sum(QUESTIONS[2], [[math.nan, math.inf, -math.inf]])[0] == 3.0
    assert exact_sum(QUESTIONS[4], [[math.nan], [math.inf]])[0] == 5.0  # the middle adds nothing
    assert exact_sum(QUESTIONS[5], [[math.nan], [math.inf], [-math.inf]])[0] == pytest.approx(0.1 - 0.9 - 0.9)


def test_which_records_of_a_person_are_kept_is_uniform():
    """Person with 5 records, one in each of 5 categories, k = 2: chi-square over 2,000 draws of pairs."""
    question, random = Histogram(categories=tuple("abcde")), TestRandom(9)
    column = column_of([[0.0, 1.0, 2.0, 3.0, 4.0]])
    kept = [tuple(np.flatnonzero(contributions(question, column, 2, random)[0])) for _ in range(2_000)]
    pairs, counts = np.unique(np.array(kept), axis=0, return_counts=True)
    assert len(pairs) == 10
    assert chisquare(counts).pvalue > SEEN_ALARM


def test_nobody_can_be_asked_too():
    for question in QUESTIONS:
        found = answer(plan_of(question), Column(np.array([]), np.array([], str)), TestRandom(0))
        assert all(math.isfinite(a.value) and a.low <= a.value <= a.high for a in found.values())


class _Watched:
    """Looks into the ledger at the moment when it is asked."""

    def __init__(self, ledger: Ledger, fail: bool = False) -> None:
        self.ledger, self.fail, self.asked = ledger, fail, []
        self.num_units = 40

    def column(self, units: np.ndarray) -> Column:
        self.asked.append((len(units), self.ledger.spent()))
        if self.fail:
            raise OSError("the disk is gone")
        return Column(np.ones(len(units)), units)


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_event_is_durable_before_the_data_is_asked(tmp_path, rate):
    plan = plan_of(QUESTIONS[5], sampling_rate=rate)
    with Ledger.open(tmp_path / "ledger.db", run="count", plan=plan) as ledger:
        source = _Watched(ledger)
        found = charged(plan, source, ledger=ledger, random=TestRandom(0))
        ((asked, spent),) = source.asked
        assert spent == list(plan.events()) == ledger.spent()
        assert asked == 40 if rate == 1 else asked < 25
        assert figures(found, plan)[0]["covered_by"] == "charged"


def test_an_estimate_that_failed_stays_spent(tmp_path):
    plan = plan_of(QUESTIONS[0])
    with Ledger.open(tmp_path / "ledger.db", run="count", plan=plan) as ledger:
        with pytest.raises(OSError, match="gone"):
            charged(plan, _Watched(ledger, fail=True), ledger=ledger, random=TestRandom(0))
        assert ledger.spent() == list(plan.events())


@pytest.mark.parametrize(
    "make",
    [
        lambda: plan_of(UnitCount(), adjacency="zero_out"),
        lambda: plan_of(UnitCount(), adjacency="replace_one"),
        lambda: plan_of(Mean(low=0, high=1), sampling_rate=0.5),
        lambda: plan_of(QUESTIONS[5], sampling_rate=0.0),
        lambda: Histogram(categories=("a",)),
        lambda: Histogram(categories=("a", "a")),
        lambda: Mean(low=1, high=1),
        lambda: Total(low=0, high=math.inf),
        lambda: Quantile(quantile=0.0, low=1, high=2),
        lambda: Quantile(quantile=0.5, low=0, high=2),
        lambda: Quantile(quantile=0.5, low=1, high=2, halvings=0),
        lambda: Quantile(quantile=0.5, low=1, high=2, halvings=True),
        lambda: Quantile(quantile=0.5, low=1, high=2, spacing="log"),  # pyright: ignore
        lambda: Column(np.zeros(3), np.zeros(2)),
        lambda: answer(plan_of(UnitCount()), column_of([[1.0]]), TestRandom(0), confidence=1.0),
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense_is_refused(make):
    with pytest.raises(UsageError):
        make()


def test_calibrated_estimates_spend_what_they_were_given():
    for question in QUESTIONS:
        values = {"name": "x", "question": question, "population": 5_000, "delta": 1e-5}
        assert 0.0999 < Estimate.calibrated(epsilon=0.1, **values).epsilon() <= 0.1
