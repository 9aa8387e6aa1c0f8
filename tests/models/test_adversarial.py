"""The adversarial family: what each network's step is made of, and that the generator never sees a private row."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.conftest import SHAPE, TINY, disturbed, records
from torch import Tensor

from sfumato import federating, stages
from sfumato.data.settings import DataSettings
from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.families.adversarial import BETAS, AdversarialModel
from sfumato.models.settings import Adversarial, Cosine, Mlp, ModelSettings, TermAxis, Terms, UNet
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.randomness import TestRandom
from sfumato.recipes import named
from sfumato.records import Record
from sfumato.training import loop
from sfumato.training.settings import PerformanceSettings, TrainingSettings

TERMS = Terms(axes=(TermAxis(name="side", more=("left",), less=("right",)), TermAxis(name="film", more=("film",))))
PUBLIC = records([1] * 6, seed=9)
PLAN = DpSgd(population=20, expected_batch_size=8, steps=8, noise_multiplier=20.0, delta=1e-3)


def built(**more: Any) -> AdversarialModel:
    objective = Adversarial(
        **{"noise": 3, "discriminator_steps": 2, "generator_batch_size": 5, "generator": Mlp(width=8, depth=1), **more}
    )
    settings = ModelSettings(image=TINY.image, text=TERMS, backbone=Mlp(width=8, depth=1), objective=objective)
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, AdversarialModel)
    disturbed(model)
    model.tell_public(PUBLIC)
    return model


def whole(model: AdversarialModel, found: list[Record]):
    table = model.encode(found)
    return table.batch(range(table.num_units), records_per_unit=100)


def generators(model: AdversarialModel) -> dict[str, Tensor]:
    """What the generator's training holds: weights and the state of its Adam."""
    names = ("generator.", "first", "second", "taken")
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith(names)}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(one[key].equal(two[key]) for key in one)


def train(model: AdversarialModel, private: list[Record], folder: Path, *, plan: Any = PLAN, rate: float = 0.1) -> Any:
    settings = TrainingSettings(
        steps=plan.steps, learning_rate=rate, optimizer="sgd", warmup_steps=0, schedule="constant", ema_decay=0.9
    )
    return loop.train(
        model, model.encode(private), plan, settings, PerformanceSettings(), checkpoints=folder, random=TestRandom(0)
    )


# ---- the losses ----


@pytest.mark.parametrize("kind", ["logistic", "hinge", "wasserstein"])
def test_a_records_loss_is_that_of_its_own_picture_and_of_fakes_for_its_own_text(kind: Any):
    model = built(loss=kind, fakes=3, weight_bound=0.5 if kind == "wasserstein" else None)
    batch = whole(model, records([1, 1, 1]))
    with torch.no_grad():
        fast = model.record_losses(batch, torch.Generator().manual_seed(2))
        noise = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(2))
        for row in range(3):
            told = batch.tensors["text"][row]
            real = batch.tensors["image"][row] / model.scale
            score = model.discriminator(real[None, None], told[None]).item()
            fakes = [model.generator(torch.cat([told, noise[row, k]])) for k in range(3)]
            made = torch.stack([model.discriminator(fake[None, None], told[None])[0, 0] for fake in fakes]).double()
            expected = {
                "logistic": np.log1p(np.exp(-score)) + float((1 + made.exp()).log().mean()),
                "hinge": max(0.0, 1 - score) + float((1 + made).clamp(min=0).mean()),
                "wasserstein": float(made.mean()) - score,
            }[kind]
            assert fast[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_discriminators_loss_gives_the_generator_nothing():
    model = built()
    model.losses(whole(model, records([2, 1]))).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.generator.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.discriminator.parameters())


def test_the_attack_looks_at_the_nearest_of_what_is_released():
    model = built()
    found = records([1] * 3)
    given = whole(model, found)
    table = model.encode(found)
    with torch.no_grad():
        chance = torch.Generator().manual_seed(0)
        noise = torch.randn(3, 1, 3, generator=chance)
        first = model.generator(torch.cat([given.tensors["text"][:, None], noise], -1))[:, 0] * model.scale
        far = model.row_losses(given, 5, torch.Generator().manual_seed(0))
        table.tensors["image"] = first  # a record that the generator makes exactly
        near = model.row_losses(table.batch(range(3), records_per_unit=1), 5, torch.Generator().manual_seed(0))
    assert (far > 0.1).all()
    assert (near < 1e-10).all()


# ---- the generator's step ----


def test_the_generators_step_is_adams_on_the_scores_of_its_own_fakes():
    """Oracle: torch's Adam on a copy, by an ordinary backward pass."""
    model = built()
    other = copy.deepcopy(model)
    other.generator.requires_grad_(True)
    optimizer = torch.optim.Adam(other.generator.parameters(), lr=model.objective.generator_learning_rate, betas=BETAS)
    assert model._public is not None
    for step in (2, 4, 6):
        model.after_step(step)
        chance = torch.Generator().manual_seed(step)
        told = model._public[torch.randint(len(model._public), (5,), generator=chance)]
        noise = torch.randn(5, 1, 3, generator=chance)
        fake = other.generator(torch.cat([told, noise[:, 0]], 1))
        optimizer.zero_grad()
        torch.nn.functional.softplus(-other.discriminator(fake[:, None], told)).mean().backward()
        optimizer.step()
    for ours, theirs in zip(model.generator.parameters(), other.generator.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_generator_moves_after_so_many_steps_of_the_discriminator_and_moves_nothing_else():
    model = built(discriminator_steps=3)
    discriminator = copy.deepcopy(model.discriminator.state_dict())
    moved = []
    for step in range(1, 8):
        before = generators(model)
        model.after_step(step)
        moved += [] if equal(before, generators(model)) else [step]
    assert moved == [3, 6]
    assert all(discriminator[key].equal(tensor) for key, tensor in model.discriminator.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_generators_chance_is_its_own():
    """torch's global generator has been asked for as many numbers as the private batch has rows: it must not matter."""
    states = []
    for seed in (0, 1):
        model = built()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            model.after_step(2)
            assert torch.random.get_rng_state().equal(before)
        states.append(generators(model))
    assert equal(*states)


# ---- the attack: private rows that try to reach the generator ----


def poisoned(private: list[Record]) -> list[Record]:
    """Entirely other pictures and texts, and other units."""
    white = [
        replace(r, image=255 - r.image, text="right poison", unit=f"x{r.unit}") for r in private if r.image is not None
    ]
    return [*white[:12], *[replace(r, text=None) for r in white[12:]]]


def test_no_private_row_reaches_the_generator_but_through_the_discriminator(tmp_path):
    """The whole private loop on two data sets that have nothing in common. With the discriminator's weights held, the
    generator, its optimizer and its average are the same to the bit. The control, where the discriminator learns, differs."""
    private = records([1] * 20)
    ends: dict[str, list[dict[str, Tensor]]] = {"held": [], "learning": []}
    for number, found in enumerate((private, poisoned(private))):
        for name in ends:
            model = built()
            if name == "held":
                hold(model)
            start = generators(model)
            train(model, found, tmp_path / f"{name}{number}")
            assert not equal(start, generators(model))  # it was trained at all
            ends[name].append(generators(model))
    assert equal(*ends["held"])
    assert not equal(*ends["learning"])


def hold(model: AdversarialModel) -> None:
    """Puts the discriminator back before each step of the generator: what it learnt of the records is gone."""
    weights, after_step = copy.deepcopy(model.discriminator.state_dict()), model.after_step

    def held(step: int) -> None:
        model.discriminator.load_state_dict(weights)
        after_step(step)

    model.after_step = held  # type: ignore[method-assign]


def test_the_engine_trains_the_discriminator_alone_and_the_average_is_the_generators(tmp_path):
    model = built()
    before = copy.deepcopy(model.discriminator.state_dict())
    trained = train(model, records([1] * 20), tmp_path)
    assert trained.step == 8
    assert any(not before[key].equal(tensor) for key, tensor in model.discriminator.state_dict().items())
    from safetensors.torch import load_file

    held = load_file(tmp_path / "last" / "average.safetensors")
    assert set(held) == {f"generator.{name}" for name, _ in model.generator.named_parameters()}
    assert all(tensor.equal(model.state_dict()[key]) for key, tensor in held.items())  # what is sampled
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert any(not last[key].equal(tensor) for key, tensor in held.items())


def test_the_generator_resumes_exactly(tmp_path):
    """Eight steps, and four and four, the discriminator held: weights, average and Adam's state are the same to the bit."""
    ends = []
    for name, parts in (("whole", (8,)), ("halves", (4, 8))):
        for steps in parts:
            model = built()
            hold(model)
            plan = NotPrivate(population=20, expected_batch_size=8, steps=steps)
            train(model, records([1] * 20), tmp_path / name, plan=plan)
        ends.append(generators(model))
    assert equal(*ends)
    assert int(ends[0]["taken"]) == 4


# ---- what is saved and said ----


def test_the_discriminator_stays_in_the_run():
    model = built()
    origins = model.origins()
    assert {file for file, _ in origins} == {"generator/model.safetensors"}
    assert set(origins.values()) == {"released"}
    said = " ".join(stages.boundary(named("clinic-adversarial"), family=model.boundary()))
    assert "Post-processing: the generator" in said
    assert "DP-SGD: the discriminator" in said
    assert "Declared public: the texts" in said


def test_it_works_without_texts_and_needs_public_ones_where_it_has_texts():
    settings = ModelSettings(
        image=TINY.image, text=None, backbone=Mlp(width=8, depth=1), objective=Adversarial(discriminator_steps=1)
    )
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, AdversarialModel)
    before = generators(model)
    model.after_step(1)
    assert not equal(before, generators(model))
    assert [str(d) for d in model.directions] == ["nothing→image"]
    told = built(discriminator_steps=1)
    told.tell_public([replace(record, text=None) for record in PUBLIC])
    with pytest.raises(UsageError, match="public texts = none"):
        told.after_step(1)


def test_a_wasserstein_discriminators_weights_are_clipped_after_every_step():
    model = built(loss="wasserstein", weight_bound=0.05)
    model.after_step(1)
    assert max(p.abs().max().item() for p in model.discriminator.parameters()) == pytest.approx(0.05)


def test_what_cannot_be_is_refused():
    for wrong in ({"loss": "wasserstein"}, {"weight_bound": 0.1}, {"discriminator_steps": 0}):
        with pytest.raises(UsageError):
            Adversarial(**wrong)  # type: ignore[arg-type]
    settings = ModelSettings(image=TINY.image, text=TERMS, backbone=UNet(), objective=Adversarial())
    with pytest.raises(UsageError, match="adversarial model makes continuous pictures"):
        models.build(settings, picture_shape=SHAPE)
    with pytest.raises(UsageError, match="adversarial model makes continuous pictures"):
        models.build(replace(settings, image=None, backbone=Mlp()), picture_shape=SHAPE)


def test_a_federation_refuses_it(tmp_path):
    recipe = replace(
        named("clinic-adversarial"), data=DataSettings(source="clinic", units=40, public_units=8, image_size=16)
    )
    with pytest.raises(UsageError, match="needs more than the tensors that sites exchange"):
        federating.run(recipe, out=tmp_path, progress=lambda line: None)
    assert not list(tmp_path.iterdir())


# ---- what it is for ----


def test_a_text_tells_the_picture():
    """Left pictures are bright on the left, right ones on the right; 600 steps without privacy."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(64):
        picture = rng.integers(0, 60, SHAPE, dtype=np.uint8)
        side = "left" if number % 2 else "right"
        picture[:, :4] += 150 * (side == "left")
        picture[:, 4:] += 150 * (side == "right")
        found.append(Record(id=str(number), unit=str(number), text=f"{side} film", image=picture))
    settings = ModelSettings(
        image=Cosine(kept=4), text=TERMS, backbone=Mlp(width=32, depth=1),
        objective=Adversarial(noise=4, discriminator_steps=2, generator=Mlp(width=32, depth=1), generator_batch_size=64),
    )  # fmt: skip
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, AdversarialModel)
    model.tell_public(found)
    batch, optimizer = whole(model, found), torch.optim.Adam(model.discriminator.parameters(), lr=2e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(600):
            optimizer.zero_grad()
            model.losses(batch).mean().backward()
            optimizer.step()
            model.after_step(step + 1)
    left, right = (model.generate([f"{side} film"] * 8, seed=1).astype(float) for side in ("left", "right"))
    assert left[:, :, :4].mean() > left[:, :, 4:].mean() + 40
    assert right[:, :, 4:].mean() > right[:, :, :4].mean() + 40
