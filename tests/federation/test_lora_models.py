"""Adapters of a language model over several sites: what is trained, sent and saved, in DP-FedLoRA's three forms."""

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chi2
from tests.federation.conftest import work_for
from tests.federation.engines import ENGINES
from tests.models import small_checkpoints as small

from sfumato import workflow
from sfumato.errors import UsageError
from sfumato.federation import local_training
from sfumato.federation import mechanism_settings as of
from sfumato.federation.policy import SitePolicy
from sfumato.federation.simulate import simulate
from sfumato.federation.sites import Site
from sfumato.models import model as models
from sfumato.models import pretrained
from sfumato.models.families.adapter import FILE, fingerprint
from sfumato.models.settings import Adapter, ModelSettings, Pixels, Sampling
from sfumato.models.shapes import Shapes
from sfumato.privacy.engine import make_engine
from sfumato.privacy.gradients.reference import clipped_sum, per_unit_gradients
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.randomness import TestRandom
from sfumato.records import Record
from sfumato.training.rounds import LocalTraining
from sfumato.training.settings import PerformanceSettings, TrainingSettings

PERSONS = 110
SETTINGS = TrainingSettings(optimizer="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0)
FORMS = {
    "paper": ("a_and_b", of.FedLora(epsilon=8.0, max_a_norm=0.3, max_b_norm=0.1)),
    "frozen A": ("b", of.FedLora(epsilon=8.0, max_b_norm=0.1)),
    "record level": ("a_and_b", of.RecordLevel()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    small.write_llama(made)
    return made


def settings_of(folder: Path, trained: Any = "a_and_b", **values) -> ModelSettings:
    objective = Adapter(
        path=str(folder), rank=2, alpha=4, targets=("q_proj", "v_proj"), trained=trained, longest=24, **values
    )
    return ModelSettings(image=None, text=None, objective=objective, sampling=Sampling(guidance=0.0))


def built(folder: Path, trained: Any = "a_and_b", **values) -> Any:
    return models.build(settings_of(folder, trained, **values), Shapes(), seed=3)


def records(site: str = "s", persons: int = 6) -> list[Record]:
    """Two conversations of each person."""
    chats = small.chats(2 * persons)
    return [
        Record(id=f"{site}{i}", unit=f"{site}-{i // 2:03d}", text="unread", metadata=chat)
        for i, chat in enumerate(chats)
    ]


def sites_of(folder: Path, tmp_path: Path, trained: str, mechanism) -> list[Site]:
    kind = {"population": PERSONS, "expected_batch_size": 8.0, "steps": 4, "unit": "person", "records_per_unit": 1}
    plan = DpSgd(**kind, noise_multiplier=1.0, delta=1e-4) if mechanism.kind == "record_level" else NotPrivate(**kind)
    table = built(folder, trained).encode
    return [
        Site(
            name=name, table=partial(table, records(name, PERSONS)), plan=plan, ledger=tmp_path / name / "ledger.db",
            policy=SitePolicy(allowed_mechanisms=None),
        )
        for name in ("north", "south")
    ]  # fmt: skip


# ---- the model ----


def test_its_loss_is_that_of_the_fine_tuner_and_of_the_record_alone(folder):
    model, given = built(folder), records(persons=3)
    table = model.encode(given)
    together = model.record_losses(table.batch(range(3), records_per_unit=2))
    tuned = pretrained.load(folder)
    assert isinstance(tuned, pretrained.CausalText)
    for row, record in enumerate(given):
        expected = tuned.losses(
            tuned.model, tuned.collate([dict(record.metadata)])
        )  # B begins at zero: both are the base
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    make_engine(
        model, DpSgd(population=9, expected_batch_size=3, steps=1, noise_multiplier=1.0, delta=1e-2)
    ).check_independence(model.losses, table.batch(range(3), records_per_unit=1))


def test_a_text_without_a_conversation_is_learnt_whole_and_a_long_one_is_cut(folder):
    model = built(folder)
    tensors = model.encode(
        [Record(id="1", unit="1", text="a red square"), Record(id="2", unit="2", text="the heart " * 40)]
    ).tensors
    assert tensors["length"].tolist()[1] == 24
    end = model._causal.processor.eos_token_id
    length = int(tensors["length"][0])
    assert tensors["tokens"][0, 0] == end and tensors["labels"][0, 0] == -100
    assert tensors["labels"][0, 1:length].tolist() == tensors["tokens"][0, 1:length].tolist()
    assert tensors["labels"][0, length - 1] == end
    nobody = model.encode([]).batch([], records_per_unit=1)
    assert model.losses(nobody).shape == (0,)


def test_a_draw_of_nobody_is_a_step_of_noise(folder):
    """Chi-square on the sum of squares: false-alarm probability 1e-6."""
    model = built(folder)
    table, before = model.encode(records(persons=5)), local_training.trained_state(model)
    kind = {"unit": "person", "records_per_unit": 2, "max_grad_norm": 0.1}
    plan = DpSgd(population=5, expected_batch_size=1e-9, steps=1, noise_multiplier=2.0, delta=1e-2, **kind)
    LocalTraining(SETTINGS, PerformanceSettings(), TestRandom(0))(model, table, plan, None, steps=1, first_step=0)
    moved = torch.cat(
        [(t - before[name]).flatten() for name, t in local_training.trained_state(model).items()]
    ).double()
    statistic = float((moved * 1e-9 / 0.5).square().sum()) / (2.0 * 0.1) ** 2
    assert chi2.ppf(5e-7, len(moved)) < statistic < chi2.ppf(1 - 5e-7, len(moved))


@pytest.mark.parametrize("trained", ["a_and_b", "b"])
def test_the_adapter_alone_is_trained_and_a_is_the_same_everywhere(folder, trained):
    one, other = built(folder, trained), built(folder, trained)
    state = local_training.trained_state(one)
    sides = {"lora_A", "lora_B"} if trained == "a_and_b" else {"lora_B"}
    assert {part for name in state for part in name.split(".") if part.startswith("lora_")} == sides
    assert set(one.state_dict()) == {n for n, _ in one.named_parameters() if "lora_" in n}
    for (name, mine), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    seeded = models.build(settings_of(folder, trained), Shapes(), seed=4)
    assert not torch.equal(*(next(p for n, p in m.named_parameters() if "lora_A" in n) for m in (one, seeded)))


def test_a_saved_adapter_is_read_by_peft_alone(folder, tmp_path):
    import peft

    model = built(folder, "b")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names of yesterday
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[4, 70, 71, 72]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model.language(input_ids=ids).logits)
    ours = models.load(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.state_dict().items())
    origins = model.origins()
    assert {origin for (_, name), origin in origins.items() if "lora_A" in name} == {"public"}
    assert {origin for (_, name), origin in origins.items() if "lora_B" in name} == {"dp-sgd"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert set(load_file(tmp_path / FILE)) == {name for _, name in origins}


def test_it_says_texts_and_refuses_what_it_is_not_of(folder):
    said = built(folder, prompt="what is this").sample([Record(id="0", unit="0")] * 2, ("text",), seed=1)
    assert all(isinstance(record.text, str) for record in said)
    with pytest.raises(UsageError, match="has its own tokenizer"):
        replace(settings_of(folder), image=Pixels())
    with pytest.raises(UsageError, match="is no folder"):
        built(folder / "nowhere")
    assert built(folder, sha256=fingerprint(str(folder))) is not None
    with pytest.raises(UsageError, match="not that of the recipe"):
        built(folder, sha256="0" * 64)


# ---- a site's steps ----


@pytest.mark.parametrize("trained", ["a_and_b", "b"])
def test_a_private_step_is_that_of_the_slow_loop_over_persons(folder, trained):
    """Noise off, everybody in the batch: one step of plain descent along the sum of clipped gradients, one person at a time."""
    model, bound = built(folder, trained), 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)  # at B = 0 nothing reaches A
    table = model.encode(records(persons=5))
    everybody = table.batch(range(5), records_per_unit=2)
    expected = clipped_sum(per_unit_gradients(model, model.losses, everybody), bound) / 5
    before = torch.cat([t.flatten() for t in local_training.trained_state(model).values()])
    plan = DpSgd(
        population=5, expected_batch_size=5, steps=1, noise_multiplier=0.0, delta=1e-2, max_grad_norm=bound, unit="person",
        records_per_unit=2,
    )  # fmt: skip
    LocalTraining(SETTINGS, PerformanceSettings(), TestRandom(0))(model, table, plan, None, steps=1, first_step=0)
    after = torch.cat([t.flatten() for t in local_training.trained_state(model).values()])
    torch.testing.assert_close((before - after).double() / 0.5, expected, rtol=1e-3, atol=1e-6)
    assert float(expected.norm()) <= bound


def test_fedprox_pulls_the_adapter_back_to_where_the_round_began(folder):
    """Two steps by hand: w2 = w1 - rate (g(w1) + mu (w1 - w0))."""

    def moved(mu: float, steps: int):
        model = built(folder, "b")
        table = model.encode(records(persons=4))
        plan = NotPrivate(population=4, expected_batch_size=4, steps=2, unit="person", records_per_unit=2)
        LocalTraining(SETTINGS, PerformanceSettings(), TestRandom(0), proximal=mu)(
            model, table, plan, None, steps=steps, first_step=0
        )
        return torch.cat(
            [t.flatten() for t in local_training.trained_state(model).values()]
        )  # B begins at 0, so this is w - w0

    one, two, pulled = moved(0.0, 1), moved(0.0, 2), moved(0.7, 2)
    torch.testing.assert_close(pulled, two - 0.5 * 0.7 * one, rtol=1e-4, atol=1e-7)
    assert float((pulled - two).norm()) > 0.1 * float(two.norm())


# ---- the three forms over sites ----


@pytest.mark.parametrize("form", FORMS)
def test_three_forms_send_adapters_alone_and_spend_what_they_say(form, folder, tmp_path):
    trained, mechanism = FORMS[form]
    sites = sites_of(folder, tmp_path, trained, mechanism)
    build: Any = partial(built, folder, trained)
    steps = LocalTraining(SETTINGS, PerformanceSettings(), TestRandom(0), proximal=0.01)
    work = work_for(sites, build, steps, mechanism=mechanism, rounds=2, local_steps=2, random=lambda: TestRandom(5))
    begun = local_training.trained_state(build())
    result = simulate(sites, work, run="r", chance=TestRandom(0))
    assert [len(round.sites) for round in result.rounds] == [2, 2]
    adapter = 4 * sum(tensor.numel() for tensor in begun.values())
    assert result.bytes_up == result.bytes_down == 2 * 2 * adapter
    assert set(result.state) == set(begun)
    assert all(not torch.equal(result.state[name], tensor) for name, tensor in begun.items())
    assert result.unit == ("person" if form == "record level" else "site")
    assert result.trust.startswith("local")
    if form == "record level":
        assert result.epsilon == pytest.approx(sites[0].plan.epsilon(), rel=1e-9)
    else:
        assert result.epsilon is not None and 7.99 < result.epsilon <= 8.0
    model = build()
    local_training.load_trained(model, result.state)
    before = dict(build().named_parameters())
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name not in result.state
    )


@pytest.mark.parametrize("trained", ["a_and_b", "b"])
def test_the_same_rounds_by_every_engine(trained, folder, tmp_path):
    """Noise off: the functions alone, and through bytes and checkpoints."""
    found = []
    for name, engine in ENGINES.items():
        mechanism = of.FedLora(noise_multiplier=0.0, max_a_norm=9.0, max_b_norm=9.0)
        policy = SitePolicy(allowed_mechanisms=None, allow_not_private=True)
        sites = [replace(site, policy=policy) for site in sites_of(folder, tmp_path / name, trained, mechanism)]
        steps = LocalTraining(SETTINGS, PerformanceSettings(), TestRandom(0))
        build: Any = partial(built, folder, trained)
        work = work_for(sites, build, steps, mechanism=mechanism, rounds=2, local_steps=2, random=lambda: TestRandom(5))
        found.append(engine(sites, work, tmp_path / name / "server"))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


# ---- a recipe ----


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_a_recipe_federates_adapters_of_conversations(folder, tmp_path, own_home):
    lines = [
        {**chat, "person": f"p{i}", "site": "north" if i % 2 else "south"}
        for i, chat in enumerate(small.chats(2 * PERSONS + 12))
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "adapters.yaml"
    recipe.write_text(
        f"""
name: adapters
data: {{source: messages, path: {tmp_path / "chats.jsonl"}, unit_column: person, public_units: 12}}
model:
  text: null
  image: null
  objective: {{kind: adapter, path: {folder}, rank: 2, alpha: 4, trained: b, longest: 24, targets: [q_proj]}}
  sampling: {{guidance: 0.0}}
privacy: {{mechanism: none, unit: person}}
training: {{expected_batch_size: 20, learning_rate: 0.01}}
federation: {{sites: 2, rounds: 1, local_steps: 1, mechanism: {{kind: fed_lora, epsilon: 8.0, max_b_norm: 0.5}}}}
evaluation: {{samples: 30, usefulness: []}}
"""
    )
    answer = workflow.federate(str(recipe), out=tmp_path / "runs")
    run = Path(answer["run"])
    assert answer["bytes_up"] == answer["bytes_down"] == 2 * 4 * 2 * 16 * 2  # sites, bytes, layers, rows of B, rank
    assert 7.99 < answer["epsilon"] <= 8.0
    claim = json.loads((run / "reports" / "privacy.json").read_text())
    assert claim["unit"] == "site" and claim["mechanism"]["form"] == "fed_lora"
    assert any(fingerprint(str(folder)) in sentence for sentence in claim["boundary"])
    assert not any(b"what is this" in path.read_bytes() for path in (run / "server").rglob("*") if path.is_file())
    trained = models.load(run / "model")
    assert isinstance(trained.sample([Record(id="0", unit="0")], ("text",), seed=0)[0].text, str)
