"""The variational family: posteriors of any subset, the bound against its definition, and that subsets condition each other."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.conftest import SHAPE, TINY, disturbed, records
from torch.distributions import Categorical as Tokens
from torch.distributions import MultivariateNormal, Normal

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.families import likelihoods
from sfumato.models.families.variational import VariationalModel
from sfumato.models.settings import Cosine, HashedWords, Mlp, ModelSettings, TermAxis, Terms, UNet, Variational
from sfumato.records import Record, prompt

TERMS = Terms(axes=(TermAxis(name="side", more=("left",), less=("right",)), TermAxis(name="film", more=("film",))))
MLP = Mlp(width=12, depth=1)


def built(experts: Any = "product", **more: Any) -> VariationalModel:
    settings = ModelSettings(
        image=TINY.image, text=TERMS, backbone=MLP, objective=Variational(experts=experts, latent=3, beta=0.7, **more)
    )
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, VariationalModel)
    disturbed(model)
    return model


def whole(model: VariationalModel, found: list[Record]):
    table = model.encode(found)
    return table.batch(range(table.num_units), records_per_unit=100)


# ---- the posterior ----


def test_the_product_of_experts_is_the_product_of_their_densities():
    """Oracle: densities multiplied on a grid; one latent entry, prior and two experts, and each subset of them."""
    model = built()
    means, spreads = torch.tensor([[[0.8], [-1.5]]]), torch.tensor([[[-0.4], [0.9]]])
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for chosen in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]):
        density = Normal(0.0, 1.0).log_prob(grid)
        for take, mean, spread in zip(chosen, means[0, :, 0].double(), spreads[0, :, 0].double(), strict=True):
            density = density + take * Normal(mean, (spread / 2).exp()).log_prob(grid)
        weight = density.exp() / density.exp().sum()
        expected = float((weight * grid).sum())
        variance = float((weight * (grid - expected) ** 2).sum())
        mean, spread = model.product(means, spreads, torch.tensor([[chosen]]))
        assert mean.item() == pytest.approx(expected, abs=1e-6)
        assert spread.exp().item() == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("experts", ["product", "mixture", "mixture_of_products"])
def test_what_is_missing_leaves_the_posterior(experts: str):
    model = built(experts)
    (full,) = records([1])
    batch = whole(model, [replace(full, text=None), replace(full, image=None), replace(full, text=None, image=None)])
    means, spreads = model.experts(batch.tensors)
    mean, spread = model.posterior(batch.tensors, batch.present)
    for row, expert in ((0, 1), (1, 0)):  # experts: text, image
        prior = 0.0 if experts == "mixture" else 1.0
        precision = (-spreads[row, expert]).exp()
        torch.testing.assert_close((-spread[row]).exp(), prior + precision)
        torch.testing.assert_close(mean[row], means[row, expert] * precision / (prior + precision))
    assert not mean[2].any()  # the prior
    assert not spread[2].any()


def test_a_mixture_is_drawn_from_each_of_its_experts():
    """A fair draw among two, 2,000 times: each has 1,000 +- 134 but once in 5e-10 (six standard deviations)."""
    model = built("mixture")
    batch = whole(model, records([1] * 2_000))
    means, _ = model.experts(batch.tensors)
    mean, _ = model.posterior(batch.tensors, batch.present, torch.Generator().manual_seed(0))
    first = (mean == means[:, 0]).all(1)
    assert ((mean == means[:, 1]).all(1) | first).all()
    assert abs(int(first.sum()) - 1_000) < 134


# ---- the bound ----


def slow(model: Any, batch: Any, row: int, noise: torch.Tensor) -> float:
    """Minus the ELBO of one record, subset by subset, as the papers write it. Args: noise (K, S, L)."""
    objective = model.objective
    there = [name for name in model.names if batch.present[name][row]]
    if not there:
        return 0.0
    expert: dict[str, Any] = {}
    for name in there:
        mean, spread = model.encoders[name](batch.tensors[name][row : row + 1])
        expert[name] = (mean[0].double(), spread[0].double())
    every = [tuple(n for n, take in zip(model.names, s, strict=True) if take) for s in model.subsets.tolist()]
    kept = {}
    for number, subset in enumerate(every):
        if objective.experts == "product" and number == 0:
            kept[tuple(there)] = number
        elif set(subset) <= set(there):
            kept.setdefault(subset, number)
    prior = Normal(torch.zeros(3).double(), 1.0)
    values = []
    for subset, number in kept.items():
        if objective.experts == "mixture":
            mean, variance = expert[subset[0]][0], expert[subset[0]][1].exp()
        else:
            precision: Any = 1 + sum((-expert[n][1]).exp() for n in subset)
            mean, variance = sum(expert[n][0] * (-expert[n][1]).exp() for n in subset) / precision, 1 / precision
        told = subset if objective.experts == "product" else there
        for draw in noise[:, number].double():
            z = mean + variance.sqrt() * draw
            if objective.experts == "mixture":
                each = [Normal(expert[n][0], (expert[n][1] / 2).exp()).log_prob(z).sum() for n in there]
                divergence = torch.stack(each).logsumexp(0) - math.log(len(each)) - prior.log_prob(z).sum()
            else:
                divergence = torch.distributions.kl_divergence(Normal(mean, variance.sqrt()), prior).sum()
            value = objective.beta * divergence
            for name in told:
                out = model.decoders[name].stack(z.float()).double()
                target = batch.tensors[name][row]
                if name == "image":
                    scale = model.codecs["image"].scale
                    likely = Normal(out, 1.0).log_prob((target / scale).double()).sum() + 8 * math.log(2 * math.pi)
                else:
                    likely = Tokens(logits=out.reshape(2, 3)).log_prob(target.long() + 1).sum()
                value = value - model.weights[name] * likely
            values.append(value)
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("experts", ["product", "mixture", "mixture_of_products"])
def test_a_records_loss_is_its_bound_subset_by_subset(experts: str):
    model = built(experts, image_weight=0.3, text_weight=2.0)
    found = records([1] * 4)
    found[1], found[2] = replace(found[1], text=None), replace(found[2], image=None)
    found[3] = replace(found[3], text=None, image=None)
    batch = whole(model, found)
    with torch.no_grad():
        fast = model.record_losses(batch, torch.Generator().manual_seed(5), 2)
        noise = torch.randn(4, 2, len(model.subsets), 3, generator=torch.Generator().manual_seed(5))
        expected = [slow(model, batch, row, noise[row]) for row in range(4)]
    assert fast.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[3] == 0
    assert len(model.subsets) == {"product": 3, "mixture": 2, "mixture_of_products": 3}[experts]


def test_the_bound_is_below_the_evidence():
    """Decoders made linear: the evidence of a picture is a Gaussian density, which minus the loss must not exceed; and the
    exact posterior as expert reaches it."""
    settings = ModelSettings(image=Cosine(kept=2), text=None, backbone=MLP, objective=Variational(latent=2))
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, VariationalModel)
    disturbed(model)
    stack: Any = model._decoder("image").stack
    with torch.no_grad():
        for parameter in (*stack.outward.parameters(), *stack.layers.parameters(), *stack.inward.parameters()):
            parameter.zero_()
    batch = whole(model, records([1] * 20))
    weight = stack.straight.weight.detach()
    evidence = MultivariateNormal(torch.zeros(4), torch.eye(4) + weight @ weight.T)
    target = batch.tensors["image"] / model.codecs["image"].scale
    exact = evidence.log_prob(target) + 2 * math.log(2 * math.pi)  # the constant that losses leave out
    with torch.no_grad():
        bound = -model.record_losses(batch, torch.Generator().manual_seed(0), 4_000)
    assert (bound < exact + 0.05).all()  # of 4,000 draws; their mean is within .02 of its expectation here
    assert (bound < exact - 0.01).any()


# ---- every codec ----


@pytest.mark.parametrize("text", [HashedWords(buckets=16), TERMS])
def test_texts_that_are_a_condition_are_reconstructed_but_never_made(text: Any):
    settings = ModelSettings(image=TINY.image, text=text, backbone=MLP, objective=Variational(latent=3))
    model = models.build(settings, picture_shape=SHAPE)
    assert [str(d) for d in model.directions] == ["text→image"]
    with pytest.raises(UsageError, match="direction = image→text"):
        model.sample(records([1]), ["text"], seed=0)


def test_words_are_a_draw_from_one_distribution():
    decoder = likelihoods.Words(5, 2, MLP)
    disturbed(decoder)
    z, lists = torch.randn(1, 1, 2), torch.tensor([[3, 0, 5, 5]])  # features 3 and 0; 5 pads
    log = decoder.stack(z)[0, 0].log_softmax(0).detach()
    assert decoder.lost(z, lists).item() == pytest.approx(-float(log[3] + log[0]), rel=1e-5)


def test_tokens_are_categorical_and_padding_is_a_token_of_its_own():
    decoder, inputs = likelihoods.Categorical(3, 4, 2, MLP, pads=True), likelihoods.Tokens(3, 4)
    disturbed(decoder)
    z, told = torch.randn(2, 5, 2), torch.tensor([[1, 2, 4], [0, 4, 4]])
    scores = decoder._scores(z).log_softmax(-1).detach()
    expected = [[-float(sum(scores[r, p, i, told[r, i]] for i in range(3))) for p in range(5)] for r in range(2)]
    assert decoder.lost(z, told).tolist() == [pytest.approx(row, rel=1e-5) for row in expected]
    assert decoder.likeliest(z).shape == (2, 5, 3)
    with torch.no_grad():
        decoder.head.bias[4] = 1e3
    assert (decoder.likeliest(z) == 4).all()
    decoder.kinds = 4  # of pictures and sounds: never padding
    assert (decoder.likeliest(z) < 4).all()
    assert inputs(told).shape == (2, inputs.width)


@pytest.mark.parametrize(
    ("image", "text", "known"), [(None, TERMS, []), (TINY.image, None, ["nothing→image"])], ids=["text", "image"]
)
def test_it_works_without_pictures_and_without_texts(image: Any, text: Any, known: list[str]):
    model = models.build(
        ModelSettings(image=image, text=text, backbone=MLP, objective=Variational(latent=3)), picture_shape=SHAPE
    )
    assert [str(d) for d in model.directions] == known
    found = records([2, 1])
    losses = model.losses(model.encode(found).batch([0, 1], records_per_unit=5))
    assert (losses > 0).all()
    if image is not None:
        assert model.generate([None, None], seed=0).shape == (2, *SHAPE)


def test_what_cannot_be_is_refused():
    base = ModelSettings(image=TINY.image, text=TERMS, backbone=MLP, objective=Variational())
    with pytest.raises(UsageError, match="fully connected"):
        models.build(replace(base, backbone=UNet()), picture_shape=SHAPE)
    nothing = Variational(text_weight=0, image_weight=0)
    with pytest.raises(UsageError, match="nothing would be reconstructed"):
        models.build(replace(base, objective=nothing), picture_shape=SHAPE)
    with pytest.raises(UsageError, match="beta = -1"):
        Variational(beta=-1)


# ---- what it is for ----


def test_a_text_tells_the_picture_and_the_shared_latent_finds_the_partner():
    """Left pictures are bright on the left, right ones on the right; 300 steps without privacy."""
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
        objective=Variational(latent=4, image_weight=4.0, text_weight=4.0),
    )  # fmt: skip
    model = models.build(settings, picture_shape=SHAPE)
    assert isinstance(model, VariationalModel)
    batch, optimizer = whole(model, found), torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(300):
            optimizer.zero_grad()
            model.losses(batch).mean().backward()
            optimizer.step()
    left, right = (model.generate([f"{side} film"] * 8, seed=1).astype(float) for side in ("left", "right"))
    assert left[:, :, :4].mean() > left[:, :, 4:].mean() + 40
    assert right[:, :, 4:].mean() > right[:, :, :4].mean() + 40
    texts = model.embed([prompt(text="left film"), prompt(text="right film")], "text")
    nearest = (model.embed(found, "image") @ texts.T).argmax(1)
    assert (nearest == torch.tensor([0 if n % 2 else 1 for n in range(64)])).float().mean() > 0.95
