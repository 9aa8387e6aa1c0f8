"""What a ``PrivateTrainer`` gives away beside the weights: chance, claims while it trains, figures that nothing covers."""

import functools
import gc

import pytest
import torch
import transformers
from tests.training.small_trainers import arguments, padded, trainer

from sfumato.errors import PrivacyRefused
from sfumato.privacy.guarantee import in_words
from sfumato.randomness import SecretRandom


@pytest.fixture(scope="module", autouse=True)
def many_trainings():
    """transformers collects garbage before and after every training, which takes longer than these."""
    gc.freeze()
    yield
    gc.unfreeze()


class Seeded:
    """Hides labels by a generator of its own, as ``DataCollatorForLanguageModeling(seed=...)`` does."""

    def __init__(self, **own):
        self.__dict__.update(own)

    def __call__(self, rows):
        return padded(rows)


@pytest.mark.parametrize(
    ("collator", "said"),
    [
        (Seeded(seed=42), "data_collator.seed = 42"),
        (Seeded(seed=0), "data_collator.seed = 0"),
        (Seeded(generator=torch.Generator()), "data_collator.generator = Generator"),
        (functools.partial(Seeded(seed=1)), "data_collator.seed = 1"),
        (Seeded(seed=2).__call__, "data_collator.seed = 2"),
    ],
)
def test_a_collator_with_a_seed_of_its_own_is_refused(tmp_path, collator, said):
    with pytest.raises(PrivacyRefused, match=said):
        trainer(tmp_path, data_collator=collator)


def test_the_library_s_collator_is_refused_with_a_seed_and_when_it_is_given_late(tmp_path):
    class Tokens:
        mask_token, pad_token_id = "[MASK]", 0

    seeded = transformers.DataCollatorForLanguageModeling(Tokens(), mlm=True, seed=42)  # pyright: ignore
    made = trainer(tmp_path, data_collator=Seeded(seed=None, generator=None))
    made.data_collator = seeded
    with pytest.raises(PrivacyRefused, match="seed = 42 · DataCollatorForLanguageModeling"):
        made.train()
    assert not (tmp_path / "ledger.db").exists()


def test_a_checkpoint_does_not_hold_the_state_of_any_generator(tmp_path):
    """torch's state while the engine trains is the secret chance of the last part."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer(tmp_path, args=args, random=SecretRandom()).train()
    assert (tmp_path / "checkpoint-4" / "privacy_state.json").is_file()
    assert not list(tmp_path.rglob("rng_state*"))


def test_a_state_of_the_generators_in_a_checkpoint_is_not_taken(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    made = trainer(tmp_path, args=args)
    checkpoint = tmp_path / "old"
    checkpoint.mkdir()
    before = torch.random.get_rng_state()
    torch.save({"cpu": before}, checkpoint / "rng_state.pth")
    torch.rand(3)
    drawn = torch.random.get_rng_state()
    made._load_rng_state(str(checkpoint))
    assert torch.equal(torch.random.get_rng_state(), drawn) and not torch.equal(before, drawn)


def test_a_trainer_that_has_not_trained_claims_nothing(tmp_path):
    claim = trainer(tmp_path).claim()
    assert (claim.definition, claim.epsilon) == ("none", None)
    assert "nothing was spent: nothing was trained" in in_words(claim)
