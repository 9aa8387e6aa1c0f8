"""What every family x codec promises: the loop, the engine and the rest of the package rely on nothing else.

A record's loss is a function of that record and of its own chance; anything may be missing; an empty batch is a batch; the
private step is the slow oracle's; training learns; samples are records; what is saved comes back bit by bit.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import oracles
from tests.models.chance import ChanceByRecord
from tests.models.combinations import COMBINATIONS, records
from tests.models.conftest import disturbed

from sfumato.models import model as models
from sfumato.models.generative import Direction, Generative
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import MODALITIES, Batch, Modality, Record, UnitTable

pytestmark = pytest.mark.parametrize("name", COMBINATIONS)


def built(name: str) -> Generative:
    combination = COMBINATIONS[name]
    if combination.prepare is not None:
        combination.prepare()
    model = models.build(combination.settings, combination.shapes)
    disturbed(model)
    model.tell_public(records([1] * 6, list(model.codecs), seed=9, shapes=model.shapes))
    return model


def given(model: Generative, counts: list[int], seed: int = 0) -> list[Record]:
    return records(counts, list(model.codecs), seed=seed, shapes=model.shapes)


def table_of(model: Generative, found: list[Record]) -> UnitTable:
    """Encoded, with the number of each record beside it: what its chance hangs on."""
    table = model.encode(found)
    return UnitTable(
        {**table.tensors, "number": torch.arange(len(found))}, [record.unit for record in found], table.present
    )


def whole(table: UnitTable) -> Batch:
    return table.batch(range(table.num_units), records_per_unit=100)


def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(B,), with chance that hangs on the record alone."""
    assert isinstance(model, Generative)
    with ChanceByRecord(batch.tensors["number"], next(model.parameters()).dtype):
        return model.losses(batch)


def without(record: Record, *lacking: str) -> Record:
    return replace(record, **dict.fromkeys(lacking))


# ---- losses ----


def test_a_records_loss_is_the_same_bit_by_bit_whoever_is_beside_it(name: str):
    model = built(name)
    mine, others = given(model, [1] * 5), given(model, [1] * 5, seed=1)
    others[0] = without(others[0], next(iter(model.codecs)))
    beside = [*others[:2], mine[2], *others[3:]]
    with torch.no_grad():
        before, after = (losses(model, whole(table_of(model, found))) for found in (mine, beside))
    assert before.shape == (5,)
    assert torch.isfinite(before).all()
    assert before[2].equal(after[2])
    assert (before[[0, 1, 3, 4]] != after[[0, 1, 3, 4]]).all()


def test_a_records_loss_does_not_know_how_many_are_beside_it(name: str):
    """Bits may differ: a product of matrices is added up in another order. To 1e-5 they do not."""
    model = built(name)
    found = given(model, [1] * 5)
    table = table_of(model, found)
    with torch.no_grad():
        together = losses(model, whole(table))
        alone = [losses(model, table.batch([unit], records_per_unit=1)) for unit in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_no_gradient_of_a_loss_reaches_another_record(name: str):
    model = built(name)
    batch = whole(table_of(model, given(model, [1] * 3)))
    inputs = {key: tensor.requires_grad_() for key, tensor in batch.tensors.items() if tensor.is_floating_point()}
    if not inputs:
        pytest.skip("every input is whole numbers: the test of bits above is the one")
    values = losses(model, batch)
    reached = False
    for i in range(3):
        gradients = torch.autograd.grad(values[i], list(inputs.values()), retain_graph=True, allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                others = gradient[torch.arange(3) != i]
                assert not others.any()
                reached |= bool(gradient[i].any())
    assert reached


def test_the_engine_sees_records_that_do_not_touch_each_other(name: str):
    """The engine's own check, with which every private training begins, passes."""
    model = built(name)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    engine.check_independence(model.losses, whole(model.encode(given(model, [1] * 3))))
    engine.detach()


def test_a_units_loss_is_the_mean_over_its_records(name: str):
    model = built(name)
    batch = whole(table_of(model, given(model, [3, 1])))
    with torch.no_grad(), ChanceByRecord(batch.tensors["number"]):
        rows = model.record_losses(batch)
    assert rows.shape == (4,)
    expected = torch.stack([rows[:3].mean(), rows[3]])
    with torch.no_grad():
        torch.testing.assert_close(losses(model, batch), expected, rtol=1e-6, atol=0)


def test_attack_losses_are_the_same_at_every_call(name: str):
    model = built(name)
    batch = whole(model.encode(given(model, [2, 1])))
    with torch.no_grad():
        first, again = (model.row_losses(batch, 4, torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.shape == (3,)
    assert first.equal(again)


def test_whatever_is_missing_has_a_loss_and_nothing_at_all_has_none(name: str):
    model = built(name)
    names = list(model.codecs)
    found = given(model, [1] * (len(names) + 2))
    lacking = [without(record, missing) for record, missing in zip(found, names, strict=False)]
    nothing = without(found[-2], *names)
    table = table_of(model, [*lacking, nothing, found[-1]])
    for row, missing in enumerate(names):
        assert not table.present[missing][row]
        assert table.tensors[missing][row].equal(model.codecs[missing].blank(1)[0])
    with torch.no_grad():
        values = losses(model, whole(table))
    assert torch.isfinite(values).all()
    assert values[-2] == 0
    assert values[-1] > 0


def test_a_batch_without_units_has_no_losses_and_still_a_graph(name: str):
    model = built(name)
    empty = model.encode(given(model, [1])).batch([], records_per_unit=1)
    values = model.losses(empty)
    assert values.shape == (0,)
    values.sum().backward()  # raises where there is no graph
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# ---- training ----


@pytest.mark.parametrize("max_physical_batch_size", [None, 2])
def test_the_private_step_equals_one_unit_at_a_time(name: str, max_physical_batch_size: int | None):
    """Oracle: a plain float64 copy of the model, one backward pass per unit, clipped and added up."""
    model = built(name)
    found = given(model, [2, 1, 3, 1])
    for row, missing in enumerate(model.codecs):
        found[row + 1] = without(found[row + 1], missing)
    table = table_of(model, found)
    before = copy.deepcopy(model.state_dict())
    norm = middle_norm(model, whole(table))
    fast, batch = oracles.released(
        model, losses, table, max_grad_norm=norm, max_physical_batch_size=max_physical_batch_size
    )
    model.load_state_dict(before)
    slow = oracles.one_unit_at_a_time(model, losses, batch, norm)
    assert batch.num_units == 4
    assert slow.norm() > 0
    assert oracles.relative(fast, slow) < COMBINATIONS[name].largest


def middle_norm(model: Generative, batch: Batch) -> float:
    """A bound that clips some units and not others."""
    norms = [float(oracles.one_unit_at_a_time(model, losses, oracles.only(batch, u), 1e9).norm()) for u in range(4)]
    return 1.01 * float(np.median(norms))


def test_a_private_step_moves_every_tensor(name: str):
    """Nothing that is trained is outside the clipped and noised sum, and what is saved is what is trained."""
    model = built(name)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for batch in engine.batches(model.encode(given(model, [1] * 6)), expected_batch_size=3, steps=1):
        model.losses(batch).mean().backward()
        optimizer.step()
    engine.detach()
    after = model.state_dict()
    assert {key for key in before if not before[key].equal(after[key])} == trained
    assert {key for key in before if not key.startswith(COMBINATIONS[name].outside)} == trained


def test_training_lowers_the_loss(name: str):
    """Twenty steps of Adam on six records, with the same chance in every step."""
    model = built(name)
    model.train()
    batch = whole(table_of(model, given(model, [1] * 6)))
    optimizer = torch.optim.Adam(model.parameters(), lr=COMBINATIONS[name].learning_rate)
    path = []
    for step in range(20):
        loss = losses(model, batch).mean()
        path.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step + 1)
    assert path[-1] < path[0]


# ---- samples ----


def asked(model: Generative, direction: Direction) -> list[Record]:
    """Prompts: all that may be told, and nothing."""
    full = given(model, [1, 1])
    told = [without(record, *(name for name in MODALITIES if name not in direction.given)) for record in full]
    return [*told, without(told[0], *direction.given)]


def of_the_right_kind(model: Generative, record: Record, wanted: Modality) -> bool:
    value = getattr(record, wanted)
    if wanted == "text":
        return isinstance(value, str)
    if wanted == "image":
        return value.shape == model.shapes.picture and value.dtype == np.uint8
    samples, rate = model.shapes.of_sound()
    fits = value.shape == (samples,) and value.dtype == np.float32 and record.sample_rate == rate
    return bool(fits and np.isfinite(value).all() and np.abs(value).max() <= 1.0)


def same(one: list[Record], two: list[Record]) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for a, b in zip(one, two, strict=True) for n in MODALITIES]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def test_every_direction_gives_records_of_what_was_wanted(name: str):
    model = built(name)
    state = torch.random.get_rng_state()
    for direction in model.directions:
        told = asked(model, direction)
        made = model.sample(told, direction.wanted, seed=1)
        assert len(made) == len(told)
        for record in made:
            for modality in MODALITIES:
                if modality in direction.wanted:
                    assert of_the_right_kind(model, record, modality), (str(direction), modality)
                else:
                    assert getattr(record, modality) is None
        assert same(made, model.sample(told, direction.wanted, seed=1))
        assert not same(made, model.sample(told, direction.wanted, seed=2))
        assert model.sample([], direction.wanted, seed=1) == []
    assert torch.random.get_rng_state().equal(state)  # torch's own chance is nobody's seed


def test_what_is_saved_comes_back_bit_by_bit_and_draws_the_same(name: str, tmp_path):
    model = built(name)
    model.save(tmp_path)
    back = models.load(tmp_path)
    assert back.settings == model.settings
    assert back.shapes == model.shapes
    saved, read = model.state_dict(), back.state_dict()
    assert list(read) == list(saved)
    assert all(read[key].equal(saved[key]) for key in saved if not key.startswith(COMBINATIONS[name].stays))
    for direction in model.directions:
        told = asked(model, direction)
        assert same(back.sample(told, direction.wanted, seed=3), model.sample(told, direction.wanted, seed=3))
    files = {file for file, _ in model.named_tensors()}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")} == files


def test_memory_is_told_without_touching_data(name: str):
    assert built(name).bytes_per_row() > 0
