"""Encoders that prompts are learnt for: a CLIP checkpoint from disk, and the small pair."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.prompting import write_clip

from sfumato.errors import UsageError
from sfumato.federation.prompts import small
from sfumato.federation.prompts.encoders import ClipEncoders
from sfumato.federation.prompts.methods import PromptModel
from sfumato.federation.prompts.settings import DpFpl, FedOTP, PromptSettings
from sfumato.federation.prompts.training import PromptSteps
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def pictures(count):
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (20 + n, 18, 3 if n % 2 else 1), dtype=np.uint8) for n in range(count)]


def pooled(answer: Any) -> torch.Tensor:
    return answer.pooler_output


def test_context_vectors_take_the_place_of_tokens(clip_folder):
    """Words told as context vectors, by their own embeddings, give what the library says of the same text: place, mask, end."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    encoders = ClipEncoders(clip_folder)
    names, words = ["cat", "horse", "bee"], "a dog on"
    context = tokenizer(words, add_special_tokens=False)["input_ids"]
    embedded = encoders.clip.text_model.embeddings.token_embedding(torch.tensor(context))
    found = encoders.read(encoders.texts(names, len(context)), embedded.expand(3, -1, -1))
    told = tokenizer([f"{words} {name}." for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = pooled(model.get_text_features(**told))
    torch.testing.assert_close(found, wanted / wanted.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert float((found[0] - found[1]).norm()) > 1e-3
    hand = encoders.hand_written(["cat"])
    with torch.no_grad():
        photo = pooled(model.get_text_features(**tokenizer(["a photo of a cat."], return_tensors="pt")))
    torch.testing.assert_close(hand, photo / photo.norm(), rtol=1e-4, atol=1e-5)


def test_a_whole_picture_comes_first_and_then_its_patches(clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPImageProcessor.from_pretrained(clip_folder)
    shown = pictures(3)
    found = ClipEncoders(clip_folder).look(shown)
    assert found.shape == (3, 1 + 4, 8)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 5))
    pixels = processor(images=[np.repeat(p, 3, 2) if p.shape[2] == 1 else p for p in shown], return_tensors="pt")
    with torch.no_grad():
        whole = pooled(model.get_image_features(**pixels))
    torch.testing.assert_close(found[:, 0], whole / whole.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [DpFpl(rank=2), FedOTP()], ids=["dpfpl", "fedotp"])
def test_a_prompt_for_clip_is_learnt_in_private_steps(clip_folder, method, tmp_path):
    encoders = ClipEncoders(clip_folder)
    model = PromptModel(encoders, ["cat", "dog"], PromptSettings(method=method, tokens=4))
    assert set(model.trained()) == {"p_G", "p_L"}
    shown, labels = encoders.look(pictures(12)), torch.arange(12) % 2
    cut = model.cut(TestRandom(0))
    together = model.gradients(shown, labels, model.prompts(cut))  # more records than features
    few = [model.gradients(shown[i : i + 2], labels[i : i + 2], model.prompts(cut)) for i in range(0, 12, 2)]
    torch.testing.assert_close(together, torch.cat(few), rtol=1e-3, atol=1e-5)
    parts = model.settings.parts(0.1)
    plan = DpSgd(
        population=12, expected_batch_size=6, steps=2, noise_multiplier=1.0, delta=1e-2, parts=parts,
        max_grad_norm=0.1 * len(parts) ** 0.5,
    )  # fmt: skip
    frozen = {name: tensor.clone() for name, tensor in encoders.state_dict().items()}
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        table = UnitTable({"image": shown, "label": labels}, [f"r{i:02d}" for i in range(12)])
        PromptSteps(TestRandom(1))(model, table, plan, ledger, steps=2, first_step=0)
    assert show(tmp_path / "ledger.db")["steps"] == 2
    assert all(tensor.equal(encoders.state_dict()[name]) for name, tensor in frozen.items())
    assert 0 <= model.accuracy(shown, labels, cut) <= 1


def test_prompts_that_clip_cannot_read_are_refused(clip_folder, tmp_path):
    with pytest.raises(UsageError, match="64"):
        PromptModel(ClipEncoders(clip_folder), ["cat", "dog"], PromptSettings(tokens=62))
    with pytest.raises(UsageError, match="config"):
        ClipEncoders(tmp_path)
    with pytest.raises(UsageError, match="two or more"):
        PromptModel(ClipEncoders(clip_folder), ["cat", "cat"], PromptSettings(tokens=4, method=DpFpl(rank=2)))


def test_the_small_pair_learns_public_pairs_and_prompts_improve_on_it(tmp_path):
    """Bright on the left or on the right: told by hand, lost by a prompt of chance, found again by training it."""
    chance = torch.Generator().manual_seed(0)
    side = torch.arange(200) % 2
    pixels = torch.rand(200, 1, 16, 16, generator=chance) * 0.3
    pixels[side == 0, :, :, :8] += 0.7
    pixels[side == 1, :, :, 8:] += 0.7
    names = ["left", "right"]
    model = small.trained(
        pixels, [("bright {}" if i % 4 < 2 else "{}").format(names[s]) for i, s in enumerate(side.tolist())],
        steps=40, batch=32, width=16, features=8,
    )  # fmt: skip
    seen = model.pictures(pixels)
    by_hand = (seen[:, 0] @ model.hand_written(names).T).argmax(1)
    assert float((by_hand == side).float().mean()) > 0.95
    learner = PromptModel(
        model, names, PromptSettings(method=DpFpl(rank=4), tokens=4, learning_rate=0.02, local_learning_rate=0.02)
    )
    table = UnitTable({"image": seen, "label": side}, [f"r{i:03d}" for i in range(200)])
    before = learner.accuracy(seen, side)
    plan = NotPrivate(population=200, expected_batch_size=100, steps=40)
    PromptSteps(TestRandom(0))(learner, table, plan, None, steps=40, first_step=0)
    assert before < 0.9 and learner.accuracy(seen, side) > 0.95
