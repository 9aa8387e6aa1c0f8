"""Some parameters trained, the rest as it was: names, gradients, and where each saved tensor is said to come from."""

import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.settings import Cosine, HashedWords, Mlp, ModelSettings
from sfumato.privacy.engine import make_engine
from sfumato.privacy.plan import NotPrivate
from sfumato.records import Record

SETTINGS = ModelSettings(image=Cosine(kept=4), text=HashedWords(buckets=16, width=8), backbone=Mlp(width=16, depth=2))


def fresh():
    return models.build(SETTINGS, picture_shape=(8, 8, 1), seed=0)


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["denoiser.outward"], {"denoiser.outward.weight", "denoiser.outward.bias"}),
        (["denoiser.outward.bias", "text_encoder.mix"],
         {"denoiser.outward.bias", "text_encoder.mix.weight", "text_encoder.mix.bias"}),
        (["denoiser.told.*.bias"], {"denoiser.told.0.bias", "denoiser.told.1.bias"}),
        (["denoiser.told"], {f"denoiser.told.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}),
    ],
)  # fmt: skip
def test_only_what_is_named_is_trained_and_the_rest_is_said_to_be_public(names, trained):
    model = fresh()
    model.train_only(names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert set(model.averaged()) == trained
    said = {f"{file.split('/')[0]}.{key}": origin for (file, key), origin in model.origins().items()}
    assert {name for name, origin in said.items() if origin == "dp-sgd"} == trained
    assert set(said.values()) == {"dp-sgd", "public"}
    with model.whole():
        assert all(p.requires_grad for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("names", [["denoiser.outwards"], ["outward"], ["denoiser.outward", "nothing"], []])
def test_a_name_of_nothing_is_refused(names):
    with pytest.raises(UsageError, match="names no trained parameter") as caught:
        fresh().train_only(names)
    assert "denoiser.inward.weight" in caught.value.message


def test_an_optimizer_of_ours_moves_the_named_ones_alone():
    model = fresh()
    model.train_only(["denoiser.outward.bias"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    records = [
        Record(id=str(i), unit=str(i), text=f"word {i}", image=torch.full((8, 8, 1), 20 * i, dtype=torch.uint8).numpy())
        for i in range(4)
    ]
    table = model.encode(records)
    engine = make_engine(model, NotPrivate(population=4, expected_batch_size=4.0, steps=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine.attach(optimizer)
    for batch in engine.batches(table, steps=2):
        model.losses(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {"denoiser.outward.bias"}
