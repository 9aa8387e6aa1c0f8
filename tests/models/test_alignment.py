"""The alignment family: a record against a public bank, both ways of retrieval, and the batch-coupled loss that is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.conftest import SHAPE, TINY, disturbed, records
from torch import Tensor

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.evaluation import agreement
from sfumato.models import model as models
from sfumato.models.families.alignment import AlignmentModel
from sfumato.models.settings import Alignment, Cosine, HashedWords, Mlp, ModelSettings
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import Batch, Record, prompt

SETTINGS = ModelSettings(
    image=TINY.image, text=HashedWords(buckets=64), backbone=Mlp(width=12, depth=1),
    objective=Alignment(width=5, temperature=0.3),
)  # fmt: skip
PUBLIC = records([1] * 6, seed=9)


def built(settings: ModelSettings = SETTINGS) -> AlignmentModel:
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, AlignmentModel)
    disturbed(model)
    return model


def whole(model: AlignmentModel, found: list[Record]) -> Batch:
    table = model.encode(found)
    return table.batch(range(table.num_units), records_per_unit=100)


def test_a_records_loss_is_its_own_partner_against_the_public_ones():
    model = built()
    model.tell_public([*PUBLIC[:5], replace(PUBLIC[5], text=None)])
    found = records([1] * 3)
    found[2] = replace(found[2], image=None)
    with torch.no_grad():
        fast = model.record_losses(whole(model, found))
        own = {name: model.embed(found, name).double().numpy() for name in ("text", "image")}
        bank = {"image": model.embed(PUBLIC, "image"), "text": model.embed(PUBLIC[:5], "text")}
    for row in range(2):
        values = []
        for a, b in (("text", "image"), ("image", "text")):
            alike = np.exp(own[a][row] @ own[b][row] / 0.3)
            others = np.exp(bank[b].double().numpy() @ own[a][row] / 0.3).sum()
            values.append(-np.log(alike / (alike + others)))
        assert fast[row].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert fast[2] == 0


def test_the_bank_gives_no_gradient_and_is_not_trained():
    model = built()
    model.tell_public(PUBLIC)
    before = {key: tensor.clone() for key, tensor in model.bank.state_dict().items()}
    assert not list(model.bank.parameters())
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    for batch in engine.batches(model.encode(records([1] * 6)), expected_batch_size=3, steps=2):
        model.losses(batch).mean().backward()
        optimizer.step()
    engine.detach()
    assert all(before[key].equal(tensor) for key, tensor in model.bank.state_dict().items())
    assert model.origins()["bank/model.safetensors", "image"] == "public"
    assert model.origins()["text_encoder/model.safetensors", "stack.inward.weight"] == "dp-sgd"


def test_a_loss_whose_negatives_are_the_batchs_other_records_is_refused():
    model = built()
    model.tell_public(PUBLIC)
    batch = whole(model, records([1] * 3))

    def in_batch(given: Batch) -> Tensor:
        text, image = (model.encoders[name](given.tensors[name]) for name in ("text", "image"))
        return torch.nn.functional.cross_entropy(text @ image.T / 0.3, torch.arange(len(text)), reduction="none")

    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UnsupportedLayer, match="one unit's gradient changes with another unit's data"):
        engine.check_independence(in_batch, batch)
    engine.check_independence(model.losses, batch)
    engine.detach()


def test_answers_are_records_of_the_public_bank():
    model = built()
    model.tell_public(PUBLIC)
    known = {record.image.tobytes() for record in model_pictures(model) if record.image is not None}
    made = model.sample([prompt(text="left"), prompt(text=None)], ["image"], seed=0)
    assert {record.image.tobytes() for record in made if record.image is not None} <= known
    with pytest.raises(UsageError, match="direction = image→text"):
        model.sample(records([1]), ["text"], seed=0)


def model_pictures(model: AlignmentModel) -> list[Record]:
    decoded = model.codecs["image"].decode(model.bank.of("image")[0])
    return [prompt(image=picture) for picture in decoded]


def test_without_a_bank_it_does_not_train_and_does_not_answer():
    model = built()
    with pytest.raises(UsageError, match="public bank = empty"):
        model.losses(whole(model, records([1])))
    with pytest.raises(UsageError, match="public bank = none"):
        model.generate(["left"], seed=0)
    with pytest.raises(UsageError, match="aligning needs two modalities"):
        models.build(replace(SETTINGS, text=None), picture_shape=SHAPE)


def test_partners_that_were_never_seen_find_each_other_both_ways():
    """Eight kinds of pictures, each with its word; 200 steps without privacy on some, retrieval on others."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (8, *SHAPE))

    def some(count: int, start: int) -> list[Record]:
        made = []
        for number in range(start, start + count):
            kind = number % 8
            picture = (0.7 * kinds[kind] + 0.3 * rng.integers(0, 256, SHAPE)).astype(np.uint8)
            made.append(Record(id=str(number), unit=str(number), text=f"word{kind}", image=picture))
        return made

    private, public, held = some(64, 0), some(32, 100), some(8, 200)
    settings = replace(SETTINGS, image=Cosine(kept=4), objective=Alignment(width=8), backbone=Mlp(width=32, depth=1))
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, AlignmentModel)
    model.tell_public(public)
    batch, optimizer = whole(model, private), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model.losses(batch).mean().backward()
        optimizer.step()
    found = agreement.retrieval(model.embed(held, "image").numpy(), model.embed(held, "text").numpy())
    assert all(by_k[1][0] >= 0.75 for by_k in found.values()), found  # chance: 1/8
