"""One transformer over the tokens of all modalities: its sequences, its losses, how it draws, and what others can load."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests import oracles
from tests.models.combinations import records
from tests.models.conftest import SHAPE, disturbed
from tests.models.token_models import SHORT, TINY_BYTES, TINY_SOUNDS, TINY_TOKENS, WORDS

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.codecs import text_tokens
from sfumato.models.families.autoregressive import choose
from sfumato.models.settings import Autoregressive, HashedWords, Mlp, Pixels, Sampling, Tokenizer, Transformer, Words
from sfumato.models.shapes import Shapes
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import prompt

PICTURES = Shapes(picture=SHAPE)


def built(settings=TINY_TOKENS, shapes=PICTURES):
    return disturbed(models.build(settings, shapes))


def whole(model, found):
    table = model.encode(found)
    return table.batch(range(table.num_units), records_per_unit=100)


# ---- sequences ----


def test_a_record_is_its_fields_in_the_order_that_was_drawn():
    """Oracle: the sequence put together by hand, record by record."""
    model = built(TINY_SOUNDS, SHORT)
    of = model.sequences
    found = records([1] * 4, ["text", "image", "audio"], shapes=SHORT)
    found[1] = replace(found[1], image=None)
    found[2] = replace(found[2], text=None, audio=None)
    found[3] = replace(found[3], text=None, audio=None, image=None)
    batch = whole(model, found)
    order = torch.tensor([[2, 0, 1], [2, 1, 0], [0, 1, 2], [0, 1, 2]])
    weights = {"text": 2.0, "image": 1.0, "audio": 0.5}
    ids, counts = of.interleave(batch.tensors, batch.present, order, weights)
    assert ids.shape == counts.shape == (4, of.length)
    for row in range(4):
        expected, weight = [of.special["<bos>"]], [0.0]
        for m in order[row].tolist():
            name = of.names[m]
            if batch.present[name][row]:
                field = of.field(name, batch.tensors[name][row : row + 1])[0].tolist()
                expected += field
                weight += [weights[name] * (token != of.special["<pad>"]) for token in field]
        told = len(expected) > 1
        expected, weight = [*expected, of.special["<eos>"]], [*weight, float(told)]
        padding = of.length - len(expected)
        assert ids[row].tolist() == [*expected, *[of.special["<pad>"]] * padding]
        assert counts[row].tolist() == [*weight, *[0.0] * padding]


def test_every_modality_has_tokens_of_its_own_and_texts_keep_their_numbers():
    of = built(TINY_SOUNDS, SHORT).sequences
    text, image, audio = (of.codecs[name].vocabulary for name in ("text", "image", "audio"))
    assert of.first == {"text": 0, "image": text, "audio": text + image}
    assert list(of.special.values()) == list(range(text + image + audio, of.vocabulary))
    assert of.starts_of("image") == [1, 1 + 9, 1 + 13, 1 + 9 + 13]
    blank = of.field("text", of.codecs["text"].blank(1))
    assert blank.tolist() == [[of.start("text"), *[of.special["<pad>"]] * 8]]


# ---- losses ----


def slow_loss(model, ids: list[int], counts: list[float]) -> float:
    """-log p of each token given those before it, one call a token, weighted."""
    total = 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits = model.transformer(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        total -= counts[place] * float(logits.log_softmax(0)[ids[place]])
    return total / sum(counts)


def test_a_records_loss_is_the_weighted_mean_of_its_tokens_surprise():
    settings = replace(TINY_TOKENS, objective=Autoregressive(text_weight=3.0))
    model = built(settings)
    found = records([1, 1], ["text", "image"])
    found[1] = replace(found[1], image=None)
    batch = whole(model, found)
    with torch.no_grad():
        values = model.row_losses(batch, 1, torch.Generator())  # the first order alone: text, image
        ids, counts = model.sequences.interleave(
            batch.tensors, batch.present, torch.tensor([[0, 1], [0, 1]]), model.weights
        )
        for row in range(2):
            assert values[row].item() == pytest.approx(
                slow_loss(model, ids[row].tolist(), counts[row].tolist()), rel=1e-5
            )
        both = model.row_losses(batch, 9, torch.Generator())
        other = model._record_losses(batch.tensors, batch.present, torch.tensor([[1, 0], [1, 0]]))
    torch.testing.assert_close(both, (values + other) / 2)


def test_the_order_is_drawn_for_each_record():
    """64 records with the same content: two losses occur, each of the two orders' (chance of failure 2^-63)."""
    model = built()
    (record,) = records([1], ["text", "image"])
    batch = whole(model, [replace(record, unit=f"{i:02d}") for i in range(64)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = model.record_losses(batch)
        orders = [
            model._record_losses(batch.tensors, batch.present, torch.tensor(o).expand(64, -1)) for o in ([0, 1], [1, 0])
        ]
    first, second = (torch.isclose(values, of_order, rtol=1e-5) for of_order in orders)
    assert (first ^ second).all()
    assert first.any()
    assert second.any()


def test_a_dropped_condition_leaves_the_modality_that_comes_first():
    model = built(replace(TINY_TOKENS, objective=Autoregressive(condition_dropout=1.0)))
    found = records([1] * 3, ["text", "image"])
    found[1] = replace(found[1], text=None)
    found[2] = replace(found[2], text=None, image=None)
    batch = whole(model, found)
    order = torch.tensor([[0, 1], [0, 1], [1, 0]])
    kept = model._dropped(batch.present, order, torch.tensor([True, True, True]))
    assert kept["text"].tolist() == [True, False, False]
    assert kept["image"].tolist() == [False, True, False]
    assert model._dropped(batch.present, order, torch.zeros(3, dtype=torch.bool))["image"].tolist() == [
        True,
        True,
        False,
    ]
    with torch.no_grad():
        assert torch.isfinite(model.losses(batch)).all()


def test_an_empty_first_batch_is_a_step_of_noise():
    """No unit is drawn in any of the steps: every weight moves, by noise alone."""
    model = built()
    engine = DifferentialPrivacyEngine(
        model,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        sampling_rate=0.01,
        random=TestRandom(0),
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = model.encode(records([1], ["text", "image"])).batch([], records_per_unit=1)
    model.losses(empty).sum().backward()
    optimizer.step()
    engine.detach()
    assert not [name for name, tensor in model.state_dict().items() if tensor.equal(before[name])]


def test_an_empty_batch_goes_through_every_layer():
    model = built()
    seen = []
    for name, module in model.transformer.named_modules():
        if module._parameters:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model.losses(model.encode(records([1], ["text", "image"])).batch([], records_per_unit=1))
    owners = {name.rpartition(".")[0] for name, _ in model.transformer.named_parameters()}
    assert set(seen) == owners


@pytest.mark.parametrize("max_physical_batch_size", [None, 1])
def test_the_private_step_equals_one_unit_at_a_time_whatever_is_missing(max_physical_batch_size):
    """The contract's test again with units of several records of different modalities, every order averaged."""
    model = built(TINY_SOUNDS, SHORT)
    found = records([3, 1, 2, 1], ["text", "image", "audio"], shapes=SHORT)
    found[0], found[4] = replace(found[0], image=None), replace(found[4], text=None, audio=None)

    def losses(model, batch):
        return batch.per_unit(model.record_losses(batch, torch.Generator(), 6))

    fast, batch = oracles.released(
        model, losses, model.encode(found), max_grad_norm=0.5, max_physical_batch_size=max_physical_batch_size
    )
    slow = oracles.one_unit_at_a_time(built(TINY_SOUNDS, SHORT), losses, batch, 0.5)
    assert oracles.relative(fast, slow) < 2e-5


def test_bits_per_byte_is_the_surprise_of_the_texts_tokens():
    model = built(TINY_BYTES, Shapes())
    found = [
        prompt(text="left lung"),
        prompt(text="é"),
        prompt(),
        prompt(text="a text that is longer than the codec takes"),
    ]
    of, total = model.sequences, 0.0
    for text in ("left lung", "é", found[3].text[:32]):
        tokens = [*text.encode(), 256][:32]
        ids = [of.special["<bos>"], of.start("text"), *tokens]
        total += slow_loss(model, ids, [0.0, 0.0, *[1.0] * len(tokens)]) * len(tokens)
    assert model.bits_per_byte(found) == pytest.approx(total / math.log(2) / (9 + 2 + 32), rel=1e-5)
    assert math.isnan(model.bits_per_byte([prompt()]))
    with pytest.raises(UsageError, match="says nothing of texts"):
        built(replace(TINY_TOKENS, text=None)).bits_per_byte([])


# ---- first weights ----


def test_a_new_model_knows_which_tokens_belong_together():
    """Before any training a token of its own modality is e times likelier on average, and more."""
    model = models.build(replace(TINY_SOUNDS, backbone=Transformer(width=64, depth=2, heads=2)), SHORT)
    of = model.sequences
    batch = whole(model, records([1] * 6, ["text", "image", "audio"], shapes=SHORT))
    ids, _ = of.interleave(batch.tensors, batch.present, torch.tensor([[0, 1, 2]] * 6), model.weights)
    with torch.no_grad():
        logits = model.transformer(input_ids=ids).logits
    for name in of.names:
        mine = slice(of.first[name], of.first[name] + of.codecs[name].vocabulary)
        inside = (ids >= mine.start) & (ids < mine.stop)
        own, every = logits[inside][:, mine], logits[inside]
        others = (every.sum() - own.sum()) / (every.numel() - own.numel())
        assert own.mean() - others > 1.0, name


def test_a_new_model_has_a_head_that_reads_each_modality():
    """In every layer, of the last position's attention: most of the m-th head's lies on tokens of the m-th modality."""
    settings = replace(TINY_SOUNDS, backbone=Transformer(width=96, depth=2, heads=3))
    model = models.build(settings, SHORT)
    of = model.sequences
    batch = whole(model, records([1] * 4, ["text", "image", "audio"], shapes=SHORT))
    ids, _ = of.interleave(batch.tensors, batch.present, torch.tensor([[0, 1, 2]] * 4), model.weights)
    model.transformer.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model.transformer(input_ids=ids, output_attentions=True).attentions
    for layer in layers:
        for head, name in enumerate(of.names):
            first = of.first[name]
            mine = (ids >= first) & (ids < first + of.codecs[name].vocabulary) | (ids == of.start(name))
            share = (layer[:, head, -1] * mine).sum(1)
            assert (share > 0.6).all(), (name, share)


def test_alike_tokens_begin_alike():
    model = models.build(replace(TINY_TOKENS, backbone=Transformer(width=64, depth=1, heads=2)), PICTURES)
    words = model.transformer.transformer.wte.weight.detach()
    first = model.sequences.first["image"]
    dark, next_to_it, bright = (
        words[first],
        words[first + 3],
        words[first + 9],
    )  # levels (4, 3): 0, 1 and 3 of brightness
    assert (dark - next_to_it).norm() < (dark - bright).norm()


# ---- drawing ----


def test_a_drawn_field_holds_tokens_of_its_modality_alone():
    model = built(TINY_SOUNDS, SHORT)
    drawn = model.draw(
        {name: codec.blank(5) for name, codec in model.codecs.items()},
        {name: torch.zeros(5, dtype=torch.bool) for name in model.codecs},
        ("text", "image", "audio"),
        Sampling(temperature=3.0),
        torch.Generator().manual_seed(0),
    )
    for name, codec in model.codecs.items():
        tokens = drawn[name]
        for place, (low, high) in enumerate(codec.ranges):
            real = tokens[:, place] < codec.vocabulary
            assert ((tokens[:, place] >= low) & (tokens[:, place] < high))[real].all()
            assert real.all() or codec.end is not None


def test_after_the_end_of_a_text_there_is_padding():
    """Without chance: the end is made the likeliest token from the third place on."""
    model = built(TINY_BYTES, Shapes())
    with torch.no_grad():
        model.transformer.transformer.wpe.weight.zero_()
        model.transformer.transformer.wpe.weight[4:] += 30.0
        model.transformer.transformer.ln_f.bias.zero_()
        model.transformer.lm_head.weight.mul_(0.01)
        probe = model.transformer(input_ids=torch.full((1, 6), 97), use_cache=False, output_hidden_states=True)
        model.transformer.lm_head.weight[256] = probe.hidden_states[-1][0, 5]
    (record,) = model.sample([prompt()], ("text",), seed=0, sampling=Sampling(temperature=0))
    tokens, _ = model.codecs["text"].encode([record])
    drawn = model.draw(
        {"text": model.codecs["text"].blank(1)},
        {"text": torch.tensor([False])},
        ("text",),
        Sampling(temperature=0),
        torch.Generator(),
    )
    end = drawn["text"][0].tolist().index(256)
    assert end <= 4
    assert (drawn["text"][0, end + 1 :] == 257).all()
    assert tokens.shape == (1, 32)


def test_the_cache_gives_what_the_whole_sequence_gives():
    """Greedy tokens of a picture told a text, without a cache: one call a token of the whole sequence, guidance by hand."""
    model = built()
    found = records([1] * 3, ["text"])
    encoded, present = model._encoded(found)
    sampling = Sampling(temperature=0, guidance=0.7)
    fast = model.draw(
        encoded, {**present, "image": torch.zeros(3, dtype=torch.bool)}, ("image",), sampling, torch.Generator()
    )
    of = model.sequences
    streams = [of.prefix(encoded, told) for told in (("text",), ())]
    streams = [torch.cat([ids, torch.full((3, 1), of.start("image"))], 1) for ids in streams]
    first = of.first["image"]
    slow = []
    with torch.no_grad():
        for low, high in model.codecs["image"].ranges:
            told, untold = (
                model.transformer(input_ids=ids).logits[:, -1, first + low : first + high].log_softmax(1)
                for ids in streams
            )
            token = (told + 0.7 * (told - untold)).argmax(1)
            slow.append(token)
            streams = [torch.cat([ids, first + token[:, None]], 1) for ids in streams]
    assert fast["image"].equal(torch.stack(slow, 1))


def test_records_told_different_things_are_drawn_each_by_what_it_was_told():
    model = built()
    texts = ["patient left", None, "patient right"]
    told = [prompt(text=text) for text in texts]
    greedy = Sampling(temperature=0, guidance=0.0)
    together = model.sample(told, ("image",), seed=0, sampling=greedy)
    for record, one in zip(told, together, strict=True):
        (alone,) = model.sample([record], ("image",), seed=0, sampling=greedy)
        assert (alone.image == one.image).all()


def test_without_anything_told_guidance_changes_nothing():
    model = built()
    made = [model.generate([None] * 3, seed=0, sampling=Sampling(guidance=g)) for g in (0.0, 5.0)]
    assert (made[0] == made[1]).all()
    texts = ["patient left"] * 3
    steered = [model.generate(texts, seed=0, sampling=Sampling(guidance=g)) for g in (0.0, 5.0)]
    assert (steered[0] != steered[1]).any()


def test_tokens_are_chosen_by_temperature_among_the_likeliest():
    """20,000 draws a setting from (.5, .3, .15, .05): shares within 5 standard deviations, false alarm below 1e-5 in all."""
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = chances.log().expand(20_000, -1)

    def shares(**how) -> torch.Tensor:
        chosen = choose(logits, Sampling(**how), torch.Generator().manual_seed(1))
        return torch.bincount(chosen, minlength=4) / len(chosen)

    squared = chances.square() / chances.square().sum()
    for how, expected in (
        ({}, chances),
        ({"temperature": 0.5}, squared),
        ({"top_k": 2}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.6}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.5}, torch.tensor([1.0, 0.0, 0.0, 0.0])),
        ({"temperature": 0}, torch.tensor([1.0, 0.0, 0.0, 0.0])),
    ):
        spread = (expected * (1 - expected) / 20_000).sqrt()
        assert ((shares(**how) - expected).abs() <= 5 * spread).all(), how


# ---- on disk ----

_STRANGER = """
import sys, json, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "sfumato":
            raise ImportError("not here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("<bos><text>patient left lung<end>", return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(input_ids=ids).logits
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
print(json.dumps({"ids": ids.tolist(), "sum": logits.double().abs().sum().item(), "shape": list(made.shape),
    "loaded": sorted(n for n in sys.modules if n.startswith("sfumato")), "bos": model.generation_config.bos_token_id}))
"""


def test_transformers_loads_what_we_write_without_us(tmp_path):
    model = built()
    model.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "sfumato.json",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _STRANGER, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    of = model.sequences
    (words,) = model.codecs["text"].tokens(["patient left lung"])
    expected = [of.special["<bos>"], of.start("text"), *words, model.codecs["text"].end]
    assert told["ids"] == [expected]
    with torch.no_grad():
        ours = model.transformer(input_ids=torch.tensor([expected])).logits.double().abs().sum().item()
    assert told["sum"] == pytest.approx(ours, rel=1e-6)
    assert told["shape"] == [1, len(expected) + 4]
    assert told["loaded"] == []
    assert told["bos"] == of.special["<bos>"]


def test_a_tokenizer_from_the_disk_goes_with_the_model(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    text = text_tokens.fit([" ".join(WORDS)] * 3, vocabulary=280, public=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = replace(TINY_TOKENS, text=Tokenizer(path=str(folder), public=True, longest=12))
    model = built(settings)
    model.save(tmp_path / "model")
    sha256 = model.codecs["text"].sha256
    assert json.loads((tmp_path / "model" / "sfumato.json").read_text())["settings"]["text"]["sha256"] == sha256
    (folder / "tokenizer.json").unlink()
    back = models.load(tmp_path / "model")
    assert back.codecs["text"].sha256 == sha256
    (one,), (other,) = (m.sample([prompt(text="patient left")], ("image",), seed=2) for m in (model, back))
    assert (one.image == other.image).all()
    file = tmp_path / "model" / "text_tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UsageError, match="is not a model that this version wrote"):
        models.load(tmp_path / "model")


# ---- what it does not do ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": Mlp()}, r"model.backbone.kind = mlp"),
        ({"image": Pixels()}, r"model.image · this family says tokens"),
        ({"text": HashedWords()}, r"model.text · this family says tokens"),
        ({"image": None, "text": None}, r"modalities = none"),
    ],
)
def test_what_it_cannot_say_is_refused_by_name(change, said):
    with pytest.raises(UsageError, match=said):
        models.build(replace(TINY_TOKENS, **change), PICTURES)


def test_other_families_refuse_tokens_by_name():
    from sfumato.models.settings import Diffusion, ModelSettings

    with pytest.raises(UsageError, match=r"model\.backbone\.kind = transformer"):
        models.build(ModelSettings(backbone=Transformer()), PICTURES)
    with pytest.raises(UsageError, match=r"has tokens, which a diffusion is not told|model.image"):
        models.build(replace(TINY_TOKENS, objective=Diffusion(), backbone=Mlp()), PICTURES)
    settings = ModelSettings(text=Words(words=WORDS))
    with pytest.raises(UsageError, match="tokens are no latents"):
        models.build_for_release("from_latents", settings, picture_shape=SHAPE)
