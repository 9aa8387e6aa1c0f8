"""The whole model: what a record loses, that no other record moves it, what is on disk, and the private step on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import oracles
from tests.models.conftest import SHAPE, TINY, TINY_UNET, disturbed, records

from sfumato.errors import DataError, OutsideError, UsageError
from sfumato.models import model as models
from sfumato.models.objectives import diffusion
from sfumato.models.settings import Pixels, Sampling
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable


def whole(table: UnitTable):
    return table.batch(range(table.num_units), records_per_unit=100)


def losses(model, batch, seed: int = 3) -> torch.Tensor:
    """The training losses with the same chance at every call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return model.losses(batch)


# ---- losses ----


@pytest.mark.parametrize("settings", [TINY, TINY_UNET], ids=["mlp", "unet"])
def test_no_units_loss_moves_with_anothers_records(settings):
    model = disturbed(models.build(settings, picture_shape=SHAPE))
    given = records([2, 1, 3])
    other = replace(given[2], text="something else altogether", image=255 - given[2].image)  # the only record of unit 1
    before = losses(model, whole(model.encode(given)))
    after = losses(model, whole(model.encode([*given[:2], other, *given[3:]])))
    assert before.shape == (3,)
    assert before[[0, 2]].tolist() == pytest.approx(after[[0, 2]].tolist(), rel=1e-6)
    assert before[1].item() != pytest.approx(after[1].item(), rel=1e-3)


def test_a_units_loss_is_the_mean_over_its_records(tiny):
    batch = whole(tiny.encode(records([3, 1])))
    rows = tiny.row_losses(batch, 4, torch.Generator().manual_seed(0))
    assert rows.shape == (4,)
    assert batch.per_unit(rows).tolist() == pytest.approx([rows[:3].mean().item(), rows[3].item()])


def test_k_draws_are_averaged_inside_a_records_loss(tiny):
    """``losses`` is the mean over K draws of one noise level each: the formula, with the chance that it drew."""
    batch = whole(tiny.encode(records([1, 1])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        keep = torch.rand(2) >= tiny.settings.objective.condition_dropout
        sigma = diffusion.noise_levels(tiny.settings.objective, (2, 3))
        noise = torch.randn(2, 3, 16)
    with torch.no_grad():
        condition = tiny.condition(batch.tensors, {"text": batch.present["text"] & keep})
        single = [
            diffusion.record_losses(
                tiny.denoiser, batch.tensors["image"], condition, sigma[:, k : k + 1], noise[:, k : k + 1], tiny.scale,
                tiny.settings.objective.sigma_data,
            )
            for k in range(3)
        ]  # fmt: skip
    torch.testing.assert_close(losses(tiny, batch), torch.stack(single).mean(0))


def test_a_missing_text_is_no_condition_and_a_missing_picture_no_loss(tiny):
    given = records([1, 1, 1])
    given = [given[0], replace(given[1], text=None), replace(given[2], image=None)]
    table = tiny.encode(given)
    assert table.present["text"].tolist() == [True, False, True]
    assert table.present["image"].tolist() == [True, True, False]
    batch = whole(table)
    condition = tiny.condition(batch.tensors, batch.present)
    assert not condition[1].any()
    assert condition[0].any()
    values = losses(tiny, batch)
    assert values[2] == 0
    assert (values[:2] > 0).all()


@pytest.mark.parametrize("settings", [TINY, TINY_UNET], ids=["mlp", "unet"])
def test_a_batch_without_units_has_no_losses(settings):
    model = models.build(settings, picture_shape=SHAPE)
    empty = model.encode(records([1])).batch([], records_per_unit=1)
    assert model.losses(empty).shape == (0,)


def test_attack_losses_are_the_same_at_every_call(tiny):
    batch = whole(tiny.encode(records([2, 1])))
    first = tiny.row_losses(batch, 8, torch.Generator().manual_seed(0))
    assert first.equal(tiny.row_losses(batch, 8, torch.Generator().manual_seed(0)))


def test_a_picture_of_another_shape_is_refused_by_name(tiny):
    (record,) = records([1])
    with pytest.raises(DataError, match=r"record 0-0: image.shape = \(9, 8, 1\) · must be \(8, 8, 1\)") as caught:
        tiny.encode([replace(record, image=np.zeros((9, 8, 1), np.uint8))])
    assert caught.value.exit_code == 2


def test_no_records_make_an_empty_table(tiny):
    table = tiny.encode([])
    assert (table.num_units, table.num_records) == (0, 0)


# ---- the private step ----


def fixed_losses(model, batch) -> torch.Tensor:
    """``model.losses`` with each row's chance taken from the batch, so that it can be done again in another order."""
    dtype = model.text_encoder.project.weight.dtype
    condition = model.condition(batch.tensors, {"text": batch.present["text"] & batch.tensors["keep"]})
    sigma, noise = batch.tensors["sigma"].to(dtype), batch.tensors["noise"].to(dtype)
    return batch.per_unit(model._record_losses(batch, condition, sigma, noise))


def table_with_chance(model, counts: list[int], incomplete: bool = True) -> UnitTable:
    given = records(counts)
    if incomplete:
        given[1] = replace(given[1], text=None)
        given[2] = replace(given[2], image=None)
    table = model.encode(given)
    rows, draws, entries = len(given), model.settings.objective.noise_multiplicity, model.scale.numel()
    generator = torch.Generator().manual_seed(5)
    chance = {
        "keep": torch.rand(rows, generator=generator) > 0.3,
        "sigma": diffusion.noise_levels(model.settings.objective, (rows, draws), generator),
        "noise": torch.randn(rows, draws, entries, generator=generator),
    }
    return UnitTable({**table.tensors, **chance}, [record.unit for record in given], table.present)


@pytest.mark.parametrize("max_physical_batch_size", [None, 2])
@pytest.mark.parametrize(("settings", "norm"), [(TINY, 0.05), (TINY, 1e3), (TINY_UNET, 0.5)])
def test_the_private_step_equals_one_unit_at_a_time(settings, norm, max_physical_batch_size):
    """Oracle: a plain float64 copy of the model, one backward pass per unit, clipped and added up."""
    model = disturbed(models.build(settings, picture_shape=SHAPE))
    table = table_with_chance(model, [2, 1, 4, 1, 3])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, batch = oracles.released(
        model, fixed_losses, table, max_grad_norm=norm, max_physical_batch_size=max_physical_batch_size
    )
    model.load_state_dict(before)
    slow = oracles.one_unit_at_a_time(model, fixed_losses, batch, norm)
    assert batch.num_units == 5
    assert oracles.relative(fast, slow) < 2e-5


def test_every_tensor_of_the_model_is_trained_privately(tiny):
    """Nothing of the model is outside the clipped and noised sum: after one step of noise every tensor has moved."""
    engine = DifferentialPrivacyEngine(tiny, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(tiny.parameters(), lr=1.0))
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    table = tiny.encode(records([1] * 10))
    for batch in engine.batches(table, expected_batch_size=5, steps=1):
        tiny.losses(batch).mean().backward()
        optimizer.step()
    engine.detach()
    after = tiny.state_dict()
    assert not [name for name in before if before[name].equal(after[name])]
    assert {name for name, _ in tiny.named_parameters()} == set(before)


# ---- generation ----


def test_the_same_seed_gives_the_same_pictures(tiny):
    first = tiny.generate(["a", None, "b"], seed=1)
    assert first.shape == (3, *SHAPE)
    assert first.dtype == np.uint8
    assert (first == tiny.generate(["a", None, "b"], seed=1)).all()
    assert (first != tiny.generate(["a", None, "b"], seed=2)).any()
    assert tiny.generate([], seed=1).shape == (0, *SHAPE)


def test_generating_leaves_the_training_mode_and_torchs_chance_alone(tiny):
    tiny.train()
    state = torch.random.get_rng_state()
    tiny.generate(["a"], seed=1, sampling=Sampling(steps=2, churn=0.6))
    assert tiny.training
    assert torch.random.get_rng_state().equal(state)


def test_the_text_steers_the_picture_more_with_guidance(tiny):
    """One noise, two texts: the pictures differ, and the difference grows with the guidance."""

    def difference(guidance: float) -> float:
        sampling = Sampling(steps=4, guidance=guidance)
        a, b = (tiny.generate([text], seed=0, sampling=sampling).astype(float) for text in ("left left", "right"))
        return float(np.abs(a - b).mean())

    assert 0 < difference(0.0) < difference(8.0)


def test_without_a_text_guidance_changes_nothing(tiny):
    pictures = [tiny.generate([None], seed=0, sampling=Sampling(steps=3, guidance=g)) for g in (0.0, 4.0)]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1


# ---- on disk ----


@pytest.mark.parametrize("settings", [TINY, replace(TINY, image=Pixels()), TINY_UNET], ids=["cosine", "pixels", "unet"])
def test_a_model_comes_back_from_disk_bit_by_bit(settings, tmp_path):
    model = disturbed(models.build(settings, picture_shape=SHAPE))
    model.save(tmp_path)
    back = models.load(tmp_path)
    assert back.settings == model.settings
    assert back.shapes.picture == SHAPE
    saved = model.state_dict()
    assert list(back.state_dict()) == list(saved)
    assert all(tensor.equal(saved[name]) for name, tensor in back.state_dict().items())
    assert (back.generate(["left"], seed=4) == model.generate(["left"], seed=4)).all()
    listed = {(file, name) for file, name in model.named_tensors()}
    from safetensors import safe_open

    on_disk = set()
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            on_disk |= {(file.relative_to(tmp_path).as_posix(), name) for name in tensors.keys()}  # noqa: SIM118
    assert on_disk == listed


def test_diffusers_loads_what_we_write(tmp_path):
    from diffusers import EDMEulerScheduler, UNet2DConditionModel

    model = disturbed(models.build(TINY_UNET, picture_shape=SHAPE))
    model.save(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    ours = model.denoiser.unet
    for name, tensor in unet.state_dict().items():
        assert tensor.equal(ours.state_dict()[name]), name
    latents, told = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8)
    with torch.no_grad():
        theirs = unet(latents, torch.tensor([10.0, -20.0]), encoder_hidden_states=told).sample
        torch.testing.assert_close(
            theirs, ours(latents, torch.tensor([10.0, -20.0]), encoder_hidden_states=told).sample
        )
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config["sigma_max"] == model.settings.objective.sigma_max
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_model_that_is_not_whole_is_refused_by_name(tmp_path, tiny):
    tiny.save(tmp_path)
    weights = tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for broken in (content[: len(content) // 2], b""):
        weights.write_bytes(broken)
        with pytest.raises(UsageError, match=r"model = .* · is not a model that this version wrote"):
            models.load(tmp_path)
    with pytest.raises(UsageError, match="is not a model"):
        models.load(tmp_path / "nowhere")


def test_a_disk_that_does_not_take_the_model_is_an_outside_error(tmp_path, tiny):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutsideError, match=r"model = .* · could not be written") as caught:
        tiny.save(tmp_path / "file")
    assert caught.value.exit_code == 5


def test_the_seed_fixes_the_first_weights_and_leaves_torchs_chance_alone():
    state = torch.random.get_rng_state()
    one, two, other = (models.build(TINY, picture_shape=SHAPE, seed=seed) for seed in (1, 1, 2))
    assert torch.random.get_rng_state().equal(state)
    assert oracles.vector(one).equal(oracles.vector(two))
    assert not oracles.vector(one).equal(oracles.vector(other))


def test_memory_is_told_without_touching_data(tiny):
    few, many = (
        tiny.bytes_per_row(),
        models.build(
            replace(TINY, objective=replace(TINY.objective, noise_multiplicity=6)), picture_shape=SHAPE
        ).bytes_per_row(),
    )
    assert 0 < few < many
