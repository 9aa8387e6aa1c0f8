"""What a ``PrivateTrainer`` gives away beside the weights: chance, claims while it trains, figures that nothing covers."""

import functools
import gc
import json

import pytest
import torch
import transformers
from tests.training.small_trainers import arguments, padded, plan, trainer

from sfumato.errors import PrivacyRefused
from sfumato.privacy import ledger
from sfumato.privacy.accounting import Event
from sfumato.privacy.guarantee import in_words
from sfumato.randomness import SecretRandom, TestRandom


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


class Claims(transformers.TrainerCallback):
    """Asks for the claim after every step, and saves the model."""

    def __init__(self):
        self.found, self.trainer, self.stop_after = {}, None, None

    def on_step_end(self, args, state, control, **kwargs):
        folder = f"{args.output_dir}/model-{state.global_step}"
        self.trainer.save_model(folder)
        with open(folder + "/privacy.json") as file:
            self.found[state.global_step] = (self.trainer.claim(), json.load(file), self.trainer._book.spent())
        if state.global_step == self.stop_after:
            raise Stop


class Stop(Exception):
    pass


def test_the_claim_while_it_trains_is_of_what_the_ledger_holds(tmp_path):
    asked = Claims()
    asked.trainer = made = trainer(tmp_path, callbacks=[asked])
    made.train()
    assert list(asked.found) == [1, 2, 3, 4]
    for step, (claim, written, spent) in asked.found.items():
        assert claim.epsilon == written["epsilon"] and claim.mechanism["steps_spent"] == sum(e.count for e in spent)
        assert plan().epsilon(step) <= claim.epsilon <= plan().epsilon()


def test_the_claim_of_a_second_attempt_has_its_own_steps(tmp_path):
    asked = Claims()
    asked.stop_after = 5
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    asked.trainer = made = trainer(tmp_path, args=args, privacy=plan(steps=8), callbacks=[asked])
    with pytest.raises(Stop):
        made.train()
    asked.stop_after = None
    made.train(resume_from_checkpoint=True)
    claim, written, _ = asked.found[6]  # the seventh charged: the fifth was lost
    assert claim.mechanism["steps_spent"] >= 7
    assert claim.epsilon == written["epsilon"] >= plan(steps=8).epsilon(7) > plan(steps=8).epsilon(5)


def test_another_process_claims_what_its_engine_was_told(tmp_path):
    """Only process 0 has the ledger; the others hear of it with every charge."""

    class Asked(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            charges = made.engine._charges
            made._book, charges.ledger, book = None, None, made._book
            claims.append(made.claim())
            made._book = charges.ledger = book

    claims = []
    made = trainer(tmp_path, callbacks=[Asked()])
    made.train()
    assert [claim.epsilon for claim in claims] == [
        pytest.approx(plan().epsilon(claim.mechanism["steps_spent"])) for claim in claims
    ]
    assert all(claim.mechanism["steps_spent"] >= step for step, claim in enumerate(claims, start=1))


def test_a_trainer_that_has_not_trained_claims_nothing(tmp_path):
    claim = trainer(tmp_path).claim()
    assert (claim.definition, claim.epsilon) == ("none", None)
    assert "nothing was spent: nothing was trained" in in_words(claim)


def test_the_claim_names_the_other_runs_of_its_account(tmp_path):
    shared = tmp_path / "account.db"
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        made.append(trainer(folder, args=arguments(folder, logging_strategy="no"), account=shared))
        made[-1].train()
    made[1].save_model(str(tmp_path / "model"))
    written = json.loads((tmp_path / "model" / "privacy.json").read_text())
    assert made[0].claim().composed_with == []
    assert [run["run"] for run in written["composed_with"]] == ["one"]
    assert written["composed_with"][0]["epsilon"] == pytest.approx(plan().epsilon())
    assert "1 other run(s) used the same data" in in_words(made[1].claim())


def test_the_folder_of_a_training_is_not_uploaded(tmp_path):
    made = trainer(tmp_path)
    with pytest.raises(PrivacyRefused, match="push_to_hub") as refused:
        made.push_to_hub()
    assert "save_model" in refused.value.next


def test_saved_figures_are_those_that_are_covered(tmp_path):
    made = trainer(tmp_path)
    figures = made.train().metrics
    assert "train_loss" in figures
    made.save_metrics("train", {**figures, "epsilon": 1.5})
    made.save_metrics("eval", {"eval_loss": 2.0, "epoch": 1.0})
    for name in ("train", "eval", "all"):
        saved = json.loads((tmp_path / f"{name}_results.json").read_text())
        assert saved and set(saved) <= {"epoch", "epsilon"}
    public = trainer(tmp_path / "public", evaluation_is_public=True)
    (tmp_path / "public").mkdir(exist_ok=True)
    public.save_metrics("eval", {"eval_loss": 2.0, "epoch": 1.0})
    assert json.loads((tmp_path / "public" / "eval_results.json").read_text()) == {"eval_loss": 2.0, "epoch": 1.0}


@pytest.mark.parametrize("old_format", [False, True])
def test_a_test_source_is_remembered_over_a_resume(tmp_path, old_format):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    asked = Claims()
    asked.stop_after = 3
    asked.trainer = first = trainer(tmp_path, args=args, random=TestRandom(0), callbacks=[asked])
    with pytest.raises(Stop):
        first.train()
    path = tmp_path / "checkpoint-2" / "privacy_state.json"
    state = json.loads(path.read_text())
    assert state["engine"]["for_release"] is False
    if old_format:  # it did not say
        del state["engine"]["for_release"]
        path.write_text(json.dumps(state))
    second = trainer(tmp_path, args=args, random=SecretRandom())
    second.train(resume_from_checkpoint=True)
    assert second.engine.for_release is old_format
    assert second.claim().not_for_release == ("" if old_format else "chance came from a test source")
    spent = [Event.from_dict(event) for event in ledger.show(tmp_path / "ledger.db")["events"]]
    assert second.claim().mechanism["steps_spent"] == sum(event.count for event in spent) == 4
