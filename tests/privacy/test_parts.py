"""Parts of a model with a bound and noise of their own: the sum is the oracle's, one unit moves it by no more than claimed,
every coordinate gets the noise that was promised, and the event that is charged is the joint one."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests.oracles import joined, relative, table_of, vector
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.accounting import Event, epsilon, joint_noise_multiplier
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.groups import Part
from sfumato.privacy.gradients.reference import clipped_sum_of_groups, per_unit_gradients
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.settings import PartSettings
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable

PARTS = {
    "text": Part(modules=("text",), max_grad_norm=0.4, noise_multiplier=3.0),
    "rest": Part(modules=("",), max_grad_norm=1.5, noise_multiplier=1.2),
}
COUNTS = [1, 2, 2, 3, 1, 4]


class TwoEncoders(nn.Module):
    """Two modalities and a head; the vocabulary is tied: it embeds words, and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"words": nn.Embedding(7, 4), "mix": nn.Linear(4, 4)})
        self.image = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.norm = nn.LayerNorm(4)
        self.scores = nn.Linear(4, 7)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        told = self.text["mix"](self.text["words"](words)).mean(1)
        return self.scores(self.norm(self.image(x) + told))


class Tied(TwoEncoders):
    def __init__(self) -> None:
        super().__init__()
        self.scores.weight = self.text["words"].weight


def make(kind: type[nn.Module] = TwoEncoders) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    values = (model(batch.tensors["x"], batch.tensors["words"]) - 2).square().sum(1)
    return batch.per_unit(values * batch.tensors["weight"])


def people(weights: list[float] | None = None, seed: int = 1) -> UnitTable:
    """Persons of 1 to 4 records, whose gradients have the sizes that ``weights`` say."""
    torch.manual_seed(seed)
    counts = COUNTS if weights is None else COUNTS[: len(weights)]
    rows = sum(counts)
    sizes = torch.tensor(weights or [1e-3, 0.1, 1.0, 10.0, 3e-3, 1e3], dtype=torch.float64)
    tensors = {
        "x": torch.randn(rows, 5, dtype=torch.float64),
        "words": torch.randint(0, 7, (rows, 3)),
        "weight": sizes.repeat_interleave(torch.tensor(counts)),
    }
    return table_of(tensors, counts)


def released(model: nn.Module, table: UnitTable, **options: Any) -> tuple[Tensor, Batch, DifferentialPrivacyEngine]:
    """The sum of clipped gradients of one step in which everybody is drawn; the batch; the engine."""
    physical = options.pop("max_physical_batch_size", None)
    engine = DifferentialPrivacyEngine(model, random=TestRandom(0), **options)
    optimizer = engine.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    before, drawn = vector(model), []
    for batch in engine.batches(
        table,
        expected_batch_size=table.num_units,
        steps=1,
        records_per_unit=9,
        max_physical_batch_size=physical,
    ):
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(batch)
    engine.detach()
    return (before - vector(model)) * table.num_units, joined(drawn), engine


def groups(model: nn.Module, of: Any) -> Tensor:
    """(P,): the group of every trainable coordinate, where ``of`` gives that of a parameter by its name."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.cat([torch.full((p.numel(),), of(name)) for name, p in named])


def reference(model: nn.Module, batch: Batch, group_of: Tensor, bounds: list[float], **kind: bool) -> Tensor:
    gradients = per_unit_gradients(model, lambda batch: losses(model, batch), batch)
    norms = torch.stack([gradients[:, group_of == g].norm(dim=1) for g in range(len(bounds))])
    beyond = norms > torch.tensor(bounds, dtype=torch.float64).unsqueeze(1)
    assert beyond.any(1).all() and not beyond.all(1).any()  # in every group some are clipped, and some are not
    return clipped_sum_of_groups(gradients, group_of, bounds, **kind)


LAYERS = {"text.words": 0, "text.mix": 1, "image.0": 2, "norm": 3, "scores": 4}


def without_noise(parts: dict[str, Part]) -> dict[str, Part]:
    return {
        name: Part(modules=part.modules, max_grad_norm=part.max_grad_norm, noise_multiplier=0.0)
        for name, part in parts.items()
    }


# ------------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("physical", [None, 4])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_the_sum_is_that_of_one_person_after_another(clipping, physical):
    """A person's records make one gradient, and each of its groups has one clip; in unequal physical parts too."""
    model, plain = make(), make()
    sums, batch, engine = released(
        model, people(), max_grad_norm=1.0, noise_multiplier=0.0, clipping=clipping, max_physical_batch_size=physical
    )
    if clipping == "per_layer":
        of, bounds = lambda name: LAYERS[name.rsplit(".", 1)[0]], [1 / math.sqrt(5)] * 5
    else:
        of, bounds = lambda name: 0, [1.0]
    expected = reference(plain, batch, groups(plain, of), bounds, normalised=clipping == "automatic")
    assert batch.num_units == 6 and batch.num_rows == sum(COUNTS)
    assert relative(sums, expected) <= 1e-6
    assert engine.max_grad_norm == 1.0


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_the_sum_over_parts_is_that_of_one_person_after_another(clipping):
    model, plain = make(), make()
    sums, batch, engine = released(model, people(), parts=without_noise(PARTS), clipping=clipping)
    if clipping == "per_layer":
        bounds = [0.4 / math.sqrt(2)] * 2 + [1.5 / math.sqrt(3)] * 3
        group_of = groups(plain, lambda name: LAYERS[name.rsplit(".", 1)[0]])
    else:
        bounds, group_of = [0.4, 1.5], groups(plain, lambda name: int(not name.startswith("text")))
    assert relative(sums, reference(plain, batch, group_of, bounds, normalised=clipping == "automatic")) <= 1e-6
    assert engine.max_grad_norm == pytest.approx(math.hypot(0.4, 1.5))


def test_layers_that_share_a_parameter_are_clipped_as_one():
    """Per layer: five layers, of which two are tied, are four groups; each keeps C / 2."""
    model, plain = make(Tied), make(Tied)
    sums, batch, _ = released(model, people(), max_grad_norm=1.0, noise_multiplier=0.0, clipping="per_layer")
    together = {"text.words": 0, "text.mix": 1, "image.0": 2, "norm": 3, "scores": 0}
    group_of = groups(plain, lambda name: together[name.rsplit(".", 1)[0]])
    assert relative(sums, reference(plain, batch, group_of, [0.5] * 4)) <= 1e-6


class Apart(nn.Module):
    """Two parts without a common layer, so that a unit chooses the size of its gradient in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
        self.image = nn.Linear(2, 4)

    def losses(self, batch: Batch) -> Tensor:
        x, y = batch.tensors["x"], batch.tensors["y"]
        return (self.text["a"](x) + self.text["b"](x)).sum(1) + self.image(y).sum(1)


def moved_apart(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, DifferentialPrivacyEngine]:
    """The sums of the text's 18 coordinates and the image's 12, without noise."""
    torch.manual_seed(0)
    model = Apart().double()
    engine = DifferentialPrivacyEngine(model, random=TestRandom(0), **options)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    before = vector(model)
    for batch in engine.batches(table_of({"x": x, "y": y}, [1] * len(x)), expected_batch_size=len(x), steps=1):
        model.losses(batch).mean().backward()
        optimizer.step()
    return (before - vector(model)) * len(x), engine


APART = {
    "text": Part(modules=("text",), max_grad_norm=0.4, noise_multiplier=0.0),
    "image": Part(modules=("image",), max_grad_norm=1.5, noise_multiplier=0.0),
}


def test_a_unit_that_is_not_finite_in_one_part_counts_as_zero_in_all():
    """And once: the other part's gradient of that unit is finite, and is left out as well."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    without = [0, 1, 2, 4]
    expected, _ = moved_apart(x[without], y[without], parts=APART)
    y[3, 1] = math.inf
    sums, engine = moved_apart(x, y, parts=APART)
    assert relative(sums, expected) <= 1e-12
    assert engine.non_finite == 1


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("loud", [(1e6, 0.0), (0.0, -1e6), (1e6, 1e6), (math.inf, 1e6), (1e-9, 1e9)])
def test_a_hostile_unit_moves_each_part_by_at_most_its_bound(clipping, loud):
    """Huge in one part or in all: C_m in each part, sqrt(sum C_m^2) over all; where it is finite, the bound is reached
    (to 1 / (norm + 0.01) of it with AUTO-S; the biases' constant input makes a part at least sqrt(6) or 2 long)."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    others, _ = moved_apart(x, y, parts=APART, clipping=clipping)
    x, y = (
        torch.cat([old, torch.full((1, 2), size, dtype=torch.float64)]) for old, size in zip((x, y), loud, strict=True)
    )
    everybody, _ = moved_apart(x, y, parts=APART, clipping=clipping)
    difference = everybody - others
    text, image = float(difference[:18].norm()), float(difference[18:].norm())
    if not all(map(math.isfinite, loud)):
        assert max(text, image) < 1e-14  # the rounding of the sum
        return
    assert 0.99 * 0.4 <= text <= 0.4 * (1 + 1e-9)
    assert 0.99 * 1.5 <= image <= 1.5 * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------- noise, and its price


def noise_of(model: nn.Module, **options: Any) -> Tensor:
    """(steps, P): what empty batches move, as noise on the sum."""
    engine = DifferentialPrivacyEngine(model, random=TestRandom(4), **options)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    steps = []
    for batch in engine.batches(people(), expected_batch_size=1e-9, steps=60):
        before = vector(model)
        losses(model, batch).sum().backward()
        optimizer.step()
        steps.append((before - vector(model)) * 1e-9)
    return torch.stack(steps)


@pytest.mark.parametrize(
    ("options", "text", "rest"),
    [
        ({"parts": PARTS}, 3.0 * 0.4, 1.2 * 1.5),
        ({"parts": PARTS, "clipping": "per_layer"}, 3.0 * 0.4, 1.2 * 1.5),
        ({"max_grad_norm": 0.7, "noise_multiplier": 2.0, "clipping": "per_layer"}, 1.4, 1.4),
        (
            {
                "parts": {k: Part(modules=p.modules, max_grad_norm=p.max_grad_norm) for k, p in PARTS.items()},
                "noise_multiplier": 2.0,
            },
            2.0 * math.hypot(0.4, 1.5),
            2.0 * math.hypot(0.4, 1.5),
        ),
    ],
)
def test_every_part_gets_the_noise_that_was_promised(options, text, rest):
    """Chi-square over 60 empty batches, part by part; false alarm 1e-6 each, seed fixed. No two parts share noise."""
    model = make()
    in_text = groups(model, lambda name: int(name.startswith("text"))) == 1
    noise = noise_of(model, **options)
    for mine, std in ((noise[:, in_text], text), (noise[:, ~in_text], rest)):
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], mine.numel())
        assert low < float((mine / std).square().sum()) < high
    correlation = np.corrcoef(noise.T.numpy())[np.triu_indices(noise.shape[1], 1)]
    assert np.abs(correlation).max() < 6.5 / math.sqrt(60) < 1.0  # 60 steps, 4,000 pairs; false alarm below 1e-6


def test_the_noise_and_bounds_of_the_parts_make_the_event_that_is_charged():
    model = make()
    for options, expected in (
        ({"parts": PARTS}, (3.0**-2 + 1.2**-2) ** -0.5),
        ({"parts": PARTS, "clipping": "per_layer"}, (3.0**-2 + 1.2**-2) ** -0.5),
        ({"max_grad_norm": 0.7, "noise_multiplier": 2.0, "clipping": "per_layer"}, 2.0),
        ({"parts": without_noise(PARTS)}, 0.0),
    ):
        engine = DifferentialPrivacyEngine(model, random=TestRandom(0), **options)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
        for batch in engine.batches(people(), expected_batch_size=3, steps=4, records_per_unit=2):
            losses(model, batch).mean().backward()
            optimizer.step()
        (event,) = engine.state_dict()["events"]
        assert event == Event(sampling_rate=0.5, noise_multiplier=event["noise_multiplier"], count=4).to_dict()
        assert event["noise_multiplier"] == pytest.approx(expected, rel=1e-12)
        groups_of_engine = [(part.bound, part.std) for part in engine._partition.parts for _ in part.groups]
        if expected:
            joint = sum((bound / std) ** 2 for bound, std in groups_of_engine) ** -0.5
            assert joint == pytest.approx(event["noise_multiplier"], rel=1e-12)
            assert engine.get_epsilon(1e-2) == epsilon([Event.from_dict(event)], 1e-2)
        else:
            assert engine.get_epsilon(1e-2) == math.inf
        engine.detach()
        model.zero_grad()


def test_joint_noise_multipliers():
    assert joint_noise_multiplier([1.7]) == 1.7
    assert joint_noise_multiplier([2.0] * 4) == pytest.approx(1.0)
    assert joint_noise_multiplier([1.0, 0.0]) == 0.0


# ----------------------------------------------------------------------------------------------- what must not pass


def test_a_trainable_parameter_in_no_part_is_named_and_a_frozen_one_stays_as_it_is():
    model = make()
    text = {"text": PARTS["text"]}
    with pytest.raises(UsageError, match=r"image\.0\.weight, image\.0\.bias, norm\.weight.*in no part.*unprotected"):
        DifferentialPrivacyEngine(model, parts=text)
    assert all("forward" not in vars(module) for module in model.modules())
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("text"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = vector(model)
    engine = DifferentialPrivacyEngine(model, parts=text, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    for batch in engine.batches(people(), expected_batch_size=3, steps=3, records_per_unit=2):
        losses(model, batch).mean().backward()
        optimizer.step()
    assert (vector(model) != before).all()
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("when", ["forward", "after"])
def test_a_frozen_parameter_that_changes_while_a_batch_is_used_is_named(when):
    class Changing(TwoEncoders):
        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            if when == "forward":
                with torch.no_grad():
                    self.norm.bias.add_(x.mean())
            return super().forward(x, words)

    model = make(Changing)
    model.norm.requires_grad_(False)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))

    def change(*_: object) -> None:
        model.norm.bias.detach().add_(1.0)

    if when == "after":
        optimizer.register_step_pre_hook(change)

    def loop() -> None:
        for batch in engine.batches(people(), expected_batch_size=6, steps=1):
            losses(model, batch).mean().backward()
            optimizer.step()

    with pytest.raises(UnsupportedLayer, match=r"norm\.bias · a frozen parameter that"):
        loop()


def test_a_frozen_parameter_with_a_gradient_that_the_optimizer_holds_is_named():
    model = make()
    model.norm.requires_grad_(False)
    model.norm.bias.grad = torch.ones(4, dtype=torch.float64)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))

    def loop() -> None:
        for batch in engine.batches(people(), expected_batch_size=6, steps=1):
            losses(model, batch).mean().backward()
            optimizer.step()

    with pytest.raises(UnsupportedLayer, match=r"norm\.bias · is frozen, but has a gradient"):
        loop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {}}, "must be one or more"),
        ({"parts": PARTS, "max_grad_norm": 1.0}, "every part has a bound of its own"),
        ({"parts": PARTS, "noise_multiplier": 1.0}, r"the parts' own make 1\.11"),
        ({"parts": {**PARTS, "rest": Part(modules=("",), max_grad_norm=1.0)}}, "missing in part rest"),
        ({"parts": {"all": Part(modules=("",), max_grad_norm=1.0)}}, "noise_multiplier = None"),
        ({"parts": {**PARTS, "more": PARTS["text"]}}, "'text' · is in parts text and more"),
        ({"parts": {**PARTS, "more": Part(modules=("tex",), max_grad_norm=1.0, noise_multiplier=1.0)}}, "'tex' of part more"),
        ({"parts": PARTS, "clipping": "adaptive"}, "adaptive · follows one bound"),
        ({"max_grad_norm": 1.0}, "noise_multiplier = None · both must be given"),
    ],
)  # fmt: skip
def test_parts_that_make_no_sense_are_refused_by_name(options, message):
    model = make()
    with pytest.raises(UsageError, match=message):
        DifferentialPrivacyEngine(model, **options)
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_two_parts_share_is_refused_by_name():
    with pytest.raises(UnsupportedLayer, match=r"text\.words\.weight = scores\.weight \(parts rest, text\)"):
        DifferentialPrivacyEngine(make(Tied), parts=PARTS)
    half = {"weight": Part(modules=("image.0.weight",), max_grad_norm=1.0, noise_multiplier=1.0), "rest": PARTS["rest"]}
    with pytest.raises(
        UnsupportedLayer, match=r"image\.0 \(Linear\) · is clipped as a whole, but is in parts rest, weight"
    ):
        DifferentialPrivacyEngine(make(), parts=half)


# -------------------------------------------------------------------------------------------------- from a plan


def test_a_plan_with_parts_is_what_the_engine_does_and_the_ledger_charges(tmp_path: Path):
    plan = DpSgd(
        population=6, expected_batch_size=3.0, steps=3, noise_multiplier=2.0, delta=1e-2, unit="person",
        records_per_unit=2, max_grad_norm=math.hypot(0.4, 1.5),
        parts=(
            PartSettings(name="text", modules=("text",), max_grad_norm=0.4, share=0.3),
            PartSettings(name="rest", modules=("",), max_grad_norm=1.5, share=0.7),
        ),
    )  # fmt: skip
    model = make()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=TestRandom(0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
        for batch in engine.batches(people()):
            losses(model, batch).mean().backward()
            optimizer.step()
        assert ledger.spent() == [plan.event()]
    parts = {part.name: part for part in engine._partition.parts}
    assert parts["text"].std == pytest.approx(2.0 / math.sqrt(0.3) * 0.4)
    assert parts["rest"].std == pytest.approx(2.0 / math.sqrt(0.7) * 1.5)
    assert engine.get_epsilon(plan.delta) == plan.epsilon()


def test_moving_names_does_not_move_bounds():
    """A deep copy has the same parts; "text" does not name "texture"."""

    class Texture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.texture = nn.Linear(2, 2), nn.Linear(2, 2)

    parts = {"text": PARTS["text"], "rest": PARTS["rest"]}
    engine = DifferentialPrivacyEngine(copy.deepcopy(Texture()), parts=parts)
    assert list(engine._partition.named("text").parameters.values()) == ["text.weight", "text.bias"]
    assert list(engine._partition.named("rest").parameters.values()) == ["texture.weight", "texture.bias"]
