"""Models that learn from releases: public codes, moments corrected for known noise, and the two models on top."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.data.clinic import FACTS, Clinic
from sfumato.errors import DataError, UsageError
from sfumato.models import model as models
from sfumato.models import moments
from sfumato.models.codecs import terms
from sfumato.models.from_mean import Features
from sfumato.models.public_codes import PublicCodes
from sfumato.models.settings import (
    Cosine,
    Flow,
    HashedWords,
    Mlp,
    ModelSettings,
    RandomFeatures,
    Sampling,
    TermAxis,
    Terms,
    UNet,
)
from sfumato.recipes.clinic import FINDINGS, TERMS
from sfumato.records import Batch, Record, UnitTable

SETTINGS = ModelSettings(
    image=Cosine(kept=3),
    text=Terms(axes=TERMS),
    backbone=Mlp(width=16, depth=1),
    sampling=Sampling(steps=4),
    random_features=RandomFeatures(pairs=True, frequencies=3, longest=4.0),
)
SHAPE = (16, 16, 1)


# -- codes --


def test_the_public_terms_say_the_facts_of_every_history():
    """All phrasings of the built-in clinic; "no effusion" is not an effusion, "not enlarged" not an enlarged heart."""
    expected = {
        "side": ("side", {"left": 1, "right": -1}),
        "height": ("zone", {"upper": 1, "middle": 0, "lower": -1}),
        "middle": ("zone", {"upper": -1, "middle": 1, "lower": -1}),
        "view": ("view", {"lateral": 1, "frontal": -1}),
        "heart": ("heart", {"enlarged": 1, "normal": -1}),
        "effusion": ("effusion", {"present": 1, "none": -1}),
        "nodule": ("kind", {"nodule": 1, "consolidation": -1, "cavity": -1}),
        "cavity": ("kind", {"nodule": -1, "consolidation": -1, "cavity": 1}),
    }
    records = list(Clinic(patients=150, image_size=32))
    axes = TERMS + FINDINGS
    values, present = terms.encode([record.text for record in records], axes)
    assert present.all() and set(expected) == {axis.name for axis in axes}
    for column, axis in enumerate(axes):
        fact, coded = expected[axis.name]
        assert set(coded) == set(FACTS[fact])
        assert values[:, column].tolist() == [coded[record.metadata["facts"][fact]] for record in records], axis.name


def test_terms_are_words_and_what_is_missing_is_absent():
    axis = TermAxis(name="x", more=("left", "left lung base"), less=("not left",))
    values, present = terms.encode(["LEFT.", "leftover", "not left at all", None, "", "Not: left"], [axis])
    assert values[:, 0].tolist() == [1, 0, -1, 0, 0, -1]
    assert present.tolist() == [True, True, True, False, False, True]
    for wrong in ({"axes": ()}, {"axes": (axis, axis)}):
        with pytest.raises(UsageError, match="axes = "):
            Terms(**wrong)
    with pytest.raises(UsageError, match="axis 'x'"):
        TermAxis(name="x", more=("",))


def picture(value: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def test_codes_of_what_is_missing_are_zero_and_pictures_come_back():
    codes = PublicCodes(SETTINGS, SHAPE)
    records = [
        Record(id="a", unit="a", text="left", image=picture(200)),
        Record(id="b", unit="b", text=None, image=picture(40)),
        Record(id="c", unit="c", text="right", image=None),
    ]
    table = codes.encode(records)
    assert codes.dimensions == {"image": 9, "text": 6}
    assert not table.tensors["text"][1].any() and table.present["image"].tolist() == [True, True, False]
    assert float(table.tensors["text"].norm(dim=1).max()) <= 1.0
    back = codes.decode(table.tensors["image"][:2])
    assert np.abs(back[0].astype(int) - 200).max() <= 1 and np.abs(back[1].astype(int) - 40).max() <= 1
    with pytest.raises(DataError, match=r"image\.shape"):
        codes.encode([Record(id="d", unit="d", image=picture(1, (8, 8, 1)))])


def test_hashed_words_are_projected_the_same_way_in_every_process():
    settings = replace(SETTINGS, text=HashedWords(buckets=512, width=400))
    one, two = (PublicCodes(settings, SHAPE).texts(["a nodule in the left lung", "another"]) for _ in range(2))
    assert torch.equal(one, two)
    assert one.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=0.25)


# -- moments --


def released(rows: int, noise_z: float, noise_c: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """z = 1 + A c + e, with A of rank 2, as released."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(8, 2, generator=generator).double() @ torch.randn(2, 3, generator=generator).double() / 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    c = normal(rows, 3) * 0.5 + 0.2
    z = 1.0 + c @ slope.T + 0.1 * normal(rows, 8)
    return z + noise_z * normal(rows, 8), c + noise_c * normal(rows, 3), slope, c


def test_known_noise_is_taken_out_of_the_dependence():
    """100,000 rows, noise on c of its own standard deviation: regression on c~ finds half of A, ours all of it, within 10 %."""
    z, c_seen, slope, c = released(100_000, 1.0, 0.5)
    found = moments.fit(z, c_seen, 1.0, 0.5)
    assert float((found.slope - slope).norm() / slope.norm()) < 0.10
    naive = torch.linalg.lstsq(c_seen - c_seen.mean(0), z - z.mean(0)).solution.T
    assert float((naive - slope).norm() / slope.norm()) == pytest.approx(0.5, abs=0.05)
    off = (found.condition(c_seen) - c).square().mean(0)
    assert torch.allclose(off, torch.full((3,), 0.125, dtype=torch.float64), atol=0.005)  # 1 / (1/.25 + 1/.25)
    assert torch.allclose(found.mean(c).mean(0), z.mean(0), atol=0.02)
    assert float(found.given_c.trace()) < 0.5 < float(moments._clean_covariance(z - z.mean(0), 1.0).trace())


def test_the_condition_of_training_and_the_clean_one_have_the_same_slope():
    """z regressed on E[c | c~], as a network would do it, is the slope that the clean prompt needs afterwards."""
    z, c_seen, slope, _ = released(100_000, 1.0, 0.5)
    condition = moments.fit(z, c_seen, 1.0, 0.5).condition(c_seen)
    learnt = torch.linalg.lstsq(condition - condition.mean(0), z - z.mean(0)).solution.T
    assert float((learnt - slope).norm() / slope.norm()) < 0.05


def test_noise_alone_is_no_dependence_and_a_clear_one_is_kept():
    generator = torch.Generator().manual_seed(1)
    ones = torch.ones(64, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    kept = 0
    for _ in range(20):
        noise = torch.randn(64, 6, generator=generator, dtype=torch.float64) / 100
        kept += int((torch.linalg.matrix_norm(moments.shrunk(noise, *ones, 10_000)) > 0).item())
    assert kept <= 10  # the edge is where noise ends on average
    strong = torch.zeros(64, 6, dtype=torch.float64)
    strong[3, 2] = 1.0
    assert float(moments.shrunk(strong, *ones, 10_000)[3, 2]) == pytest.approx(1.0, abs=0.02)


# -- models --


def clean_table(rows: int = 400) -> UnitTable:
    """Pictures whose first entries follow the text's first axes."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, 2, (rows, 6), generator=generator) * 2.0 - 1.0
    image = 0.05 * torch.randn(rows, 9, generator=generator)
    image[:, 1] += 0.6 * text[:, 0]
    return UnitTable({"image": image, "text": text / math.sqrt(6)}, [f"{i:04d}" for i in range(rows)])


def latents_model(noise: float = 0.05):
    model = models.build_for_release("from_latents", SETTINGS, picture_shape=SHAPE)
    clean = clean_table()
    generator = torch.Generator().manual_seed(3)
    seen = {
        name: z.double() + noise * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        for name, z in clean.tensors.items()
    }
    table = model.receive(seen, {"image": noise, "text": noise})
    return model, table


def test_a_model_of_latents_follows_its_text_before_any_step():
    model, table = latents_model()
    assert table.num_units == 400 and set(table.tensors) == {"image", "text"}
    left, right = model.generate(["left"] * 8, seed=0), model.generate(["right"] * 8, seed=0)
    halves = [float(p[:, :, :8].mean() - p[:, :, 8:].mean()) for p in (left, right)]
    assert halves[0] * halves[1] < 0 and abs(halves[0] - halves[1]) > 20
    assert np.array_equal(left, model.generate(["left"] * 8, seed=0))
    assert model.generate([None, ""], seed=0).shape == (2, *SHAPE)
    assert model.generate([], seed=0).shape == (0, *SHAPE)


def test_one_loss_a_unit_that_no_other_unit_moves():
    model, table = latents_model()
    torch.manual_seed(0)
    batch = table.batch(range(5), records_per_unit=1)
    torch.manual_seed(1)
    before = model.losses(batch)
    other = Batch(
        tensors={name: torch.cat([t[:4], t[4:] * 9]) for name, t in batch.tensors.items()},
        present=batch.present, unit=batch.unit, num_units=5,
    )  # fmt: skip
    torch.manual_seed(1)
    after = model.losses(other)
    assert before.shape == (5,) and torch.equal(before[:4], after[:4]) and before[4] != after[4]
    rows = model.row_losses(batch, 3, torch.Generator().manual_seed(0))
    assert rows.shape == (5,) and bool((rows > 0).all())


@pytest.mark.parametrize("kind", ["from_latents", "from_mean"])
def test_a_model_is_read_back_as_it_was(tmp_path, kind):
    if kind == "from_latents":
        model, _ = latents_model()
    else:
        model = models.build_for_release(kind, SETTINGS, picture_shape=SHAPE)
        model.receive(torch.randn(model.dimensions["mean"]).double(), ["left", "right"])
        torch.nn.init.normal_(model.generator.outward.weight)
    model.save(tmp_path)
    again = models.load(tmp_path)
    assert np.array_equal(model.generate(["left", "upper"], seed=3), again.generate(["left", "upper"], seed=3))
    assert {n: t.tolist() for n, t in again.named_buffers()} == {n: t.tolist() for n, t in model.named_buffers()}
    (next(tmp_path.glob("*/model.safetensors"))).unlink()
    with pytest.raises(UsageError, match="is not a model"):
        models.load(tmp_path)


def test_released_latents_need_a_fully_connected_backbone():
    for kind in ("from_latents", "from_mean"):
        with pytest.raises(UsageError, match=r"model\.backbone\.kind = unet"):
            models.build_for_release(kind, replace(SETTINGS, backbone=UNet()), picture_shape=SHAPE)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_features_are_never_longer_than_one(scale):
    features = Features(SETTINGS.random_features, 9, 6)
    generator = torch.Generator().manual_seed(4)
    image, text = (torch.randn(50, d, generator=generator) * scale for d in (9, 6))
    present = torch.arange(50) % 2 == 0
    batch = Batch(
        tensors={"image": image, "text": text}, present={"image": present, "text": ~present | (torch.arange(50) < 25)},
        unit=torch.arange(50), num_units=50,
    )  # fmt: skip
    rows = features.of_batch(batch)
    assert rows.shape == (50, features.dimension) and float(rows.norm(dim=1).max()) <= 1 + 1e-6
    assert not rows[1::2].any()  # without a picture, nothing


def test_a_generator_is_fitted_to_a_mean_alone():
    """300 steps on public texts and the mean of 400 clean records: left and right come out on their sides."""
    model = models.build_for_release(
        "from_mean", replace(SETTINGS, random_features=RandomFeatures(longest=2.0)), picture_shape=SHAPE
    )
    clean = clean_table()
    mean = model.features.of_batch(clean.batch(range(400), records_per_unit=1)).mean(0)
    words = (
        ("left", "right"),
        ("upper", "lower"),
        ("middle", ""),
        ("lateral", "frontal"),
        ("enlarged", ""),
        ("effusion", ""),
    )
    generator = torch.Generator().manual_seed(5)
    prompts = [
        " ".join(pair[int(torch.randint(0, 2, (1,), generator=generator))] for pair in words) for _ in range(300)
    ]
    table = model.receive(mean, prompts)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    first = last = 0.0
    for _ in range(300):
        losses = model.losses(table.batch(range(300), records_per_unit=1))
        assert losses.shape == (300,)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        last = float(losses[0].detach())
        first = first or last
    assert last < first  # what is left is the difference of the texts, which no generator moves
    left, right = model.generate(["left"] * 4, seed=0), model.generate(["right"] * 4, seed=0)
    assert (
        abs(
            float(left[:, :, :8].mean() - left[:, :, 8:].mean())
            - float(right[:, :, :8].mean() - right[:, :, 8:].mean())
        )
        > 20
    )


def test_a_member_of_a_mean_without_noise_scores_higher_than_others():
    model = models.build_for_release("from_mean", SETTINGS, picture_shape=SHAPE)
    table = clean_table(60)
    few = UnitTable({n: t[:10] for n, t in table.tensors.items()}, [f"{i:02d}" for i in range(10)])
    model.control_table(few)
    losses = model.row_losses(table.batch(range(60), records_per_unit=1), 1, torch.Generator())
    assert float(losses[:10].mean()) < float(losses[10:].mean())


@pytest.mark.parametrize(
    "settings",
    [
        replace(SETTINGS, sampling=Sampling(solver="dpmpp_2m")),
        replace(SETTINGS, sampling=Sampling(churn=2.0)),
        replace(SETTINGS, objective=Flow(), sampling=Sampling()),
    ],
    ids=["solver", "churn", "flow"],
)
def test_what_a_release_does_not_have_is_refused(settings: ModelSettings):
    with pytest.raises(UsageError, match=r"model.(sampling.solver = |objective.kind = flow)"):
        PublicCodes(settings, SHAPE)
