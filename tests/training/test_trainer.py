"""``PrivateTrainer``: the step against one row at a time, what is refused, what is charged, what is kept."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tests.training.small_trainers import (
    Told,
    arguments,
    gpt2,
    llama,
    padded,
    plan,
    texts,
    trainer,
    vector,
)

from sfumato.errors import BudgetExhausted, LedgerError, PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy import ledger
from sfumato.privacy.accounting import Event, epsilon
from sfumato.privacy.settings import PrivacySettings
from sfumato.randomness import SecretRandom
from sfumato.training.trainer import PrivateTrainer


@pytest.fixture(scope="module", autouse=True)
def many_trainings():
    """transformers collects garbage before and after every training, which takes longer than these."""
    gc.freeze()
    yield
    gc.unfreeze()


def one_row_at_a_time(model, groups, expected):
    """The slow and obvious step: each unit's gradient, from batches of one row without padding, clipped, added, divided.

    Returns: the step, and a bound that clips about half of the units: where all are clipped, a wrong scale does not show.
    """
    gradients = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for rows in groups:
        gradient = 0.0
        for row in rows:
            loss = model(**padded([row])).loss
            gradient = gradient + torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]) / len(rows)
        gradients.append(gradient)
    norms = sorted(float(g.norm()) for g in gradients)
    bound = (norms[(len(norms) - 1) // 2] + norms[(len(norms) + 1) // 2]) / 2
    return sum(g * min(1.0, bound / float(g.norm())) for g in gradients) / expected, bound


@pytest.mark.parametrize("physical", [1, 3, 16])
def test_a_step_is_that_of_one_row_at_a_time(tmp_path, physical):
    """Poisson batch, padding, parts of any size, accumulation in the arguments or not: the same step."""
    rows, drawn = texts(), [3, 4, 11, 20, 22, 23, 39]
    model = llama(torch.float64)
    before = vector(model)
    expected, bound = one_row_at_a_time(model, [[rows[i]] for i in drawn], 16.0)
    args = arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=physical, learning_rate=1.0, optim="sgd", max_grad_norm=bound,
        gradient_accumulation_steps=16 // physical if 16 % physical == 0 else 1,
    )  # fmt: skip
    private = plan(noise_multiplier=0.0, max_grad_norm=bound, steps=1, expected_batch_size=16.0)
    trainer(tmp_path, model=model, rows=rows, args=args, privacy=private, random=Told(0, [drawn])).train()
    torch.testing.assert_close(before - vector(model), expected, rtol=1e-4, atol=1e-7)  # its loss is of float32
    assert float(expected.norm()) > bound / 16


def test_the_rows_of_a_person_make_one_gradient(tmp_path):
    rows = texts(12, persons=4)  # person p has rows p, p + 4, p + 8
    model = llama(torch.float64)
    before = vector(model)
    expected, bound = one_row_at_a_time(model, [[rows[i] for i in (p, p + 4, p + 8)] for p in (1, 3)], 2.0)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=1.0, optim="sgd")
    private = plan(
        noise_multiplier=0.0,
        max_grad_norm=bound,
        steps=1,
        expected_batch_size=2.0,
        population=4,
        unit="person",
        records_per_unit=3,
    )
    trainer(
        tmp_path, model=model, rows=rows, args=args, privacy=private, random=Told(0, [[1, 3]]), unit="person"
    ).train()
    torch.testing.assert_close(before - vector(model), expected, rtol=1e-4, atol=1e-7)  # its loss is of float32


def test_a_draw_of_nobody_is_a_step_of_noise(tmp_path):
    """Its variance, by chi-square over all coordinates; false-alarm probability 1e-6, seed fixed."""
    from scipy.stats import chi2

    model = llama()
    before = vector(model)
    args = arguments(tmp_path, max_steps=1, learning_rate=1.0, optim="sgd")
    made = trainer(tmp_path, model=model, args=args, privacy=plan(steps=1), random=Told(3, [[]]))
    made.train()
    moved = before - vector(model)
    assert made._events[0].count == 1
    statistic = float((moved * 4.0).square().sum())  # B / (sigma C) = 4
    assert chi2.ppf(5e-7, len(moved)) < statistic < chi2.ppf(1 - 5e-7, len(moved))


def test_every_step_is_charged_and_epsilon_is_told(tmp_path):
    private = PrivacySettings(epsilon=4.0, delta=1e-4, max_grad_norm=1.0, population=1000)
    args = arguments(tmp_path, max_steps=5, gradient_accumulation_steps=2)
    made = trainer(tmp_path, args=args, privacy=private)
    assert (made.plan.expected_batch_size, made.plan.steps, made.plan.population) == (8.0, 5, 1000)
    made.train()
    spent = [Event.from_dict(event) for event in ledger.show(tmp_path / "ledger.db")["events"]]
    assert sum(event.count for event in spent) == 5
    assert made.get_epsilon() == pytest.approx(epsilon(spent, 1e-4))
    assert 3.9 < made.get_epsilon() <= 4.0
    told = [entry["epsilon"] for entry in made.state.log_history if "loss" in entry]
    assert len(told) == 5 and told == sorted(told) and told[-1] == made.get_epsilon()
    assert made.claim().epsilon == pytest.approx(made.get_epsilon())
    assert made.claim().not_for_release == "chance came from a test source"


def test_epochs_are_of_the_expected_batch(tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1.5, logging_strategy="no")
    made = trainer(tmp_path, args=args, privacy=plan(steps=15))  # 40 units, 4 a step
    made.train()
    assert made.state.global_step == 15
    assert made.state.epoch == pytest.approx(1.5)


def test_what_is_saved_has_no_figures_of_the_private_data(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1)
    made = trainer(tmp_path, args=args, eval_dataset=texts(5, seed=9))
    made.train()
    made.save_state()
    made.save_model(str(tmp_path / "final"))
    assert any("loss" in entry for entry in made.state.log_history)
    for path in (tmp_path / "checkpoint-4", tmp_path):
        kept = json.loads((path / "trainer_state.json").read_text())
        assert kept["total_flos"] == 0 and kept["num_input_tokens_seen"] == 0
        assert len(kept["log_history"]) >= 4
        assert {name for entry in kept["log_history"] for name in entry} <= {
            "step", "epoch", "learning_rate", "epsilon", "delta",
        }  # fmt: skip
    claim = json.loads((tmp_path / "final" / "privacy.json").read_text())
    assert claim["epsilon"] == pytest.approx(made.get_epsilon())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(vector(loaded), vector(made.model))
    kept = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (kept.max_steps, kept.ignore_data_skip) == (4, False)


def test_public_evaluation_may_be_kept(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                     load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    made = trainer(tmp_path, args=args, eval_dataset=texts(5, seed=9), evaluation_is_public=True)
    made.train()
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in kept["log_history"]) == 2
    assert "Declared public: the evaluation data." in made.claim().boundary
    rows = texts()
    with pytest.raises(PrivacyRefused, match="eval_dataset = train_dataset"):
        trainer(tmp_path, rows=rows, eval_dataset=rows, evaluation_is_public=True)


class Stop(Exception):
    pass


class StopAfter(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def stopped(folder, after=5, **named):
    args = arguments(folder, max_steps=8, save_strategy="steps", save_steps=2)
    made = trainer(folder, args=args, privacy=plan(steps=8), callbacks=[StopAfter(after)], **named)
    with pytest.raises(Stop):
        made.train()
    return made


def continued(folder, **named):
    args = arguments(folder, max_steps=8, save_strategy="steps", save_steps=2)
    return trainer(folder, args=args, privacy=plan(steps=8), **named)


def test_a_resumed_training_pays_for_what_was_lost(tmp_path):
    first = stopped(tmp_path)  # five steps charged, the checkpoint holds four
    assert sum(event.count for event in first._events) == 5
    assert not hasattr(first.model.lm_head, "hooked") and "forward" not in vars(
        first.model.lm_head
    )  # an ordinary model
    second = continued(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 7  # of eight, one was lost
    assert ledger.show(tmp_path / "ledger.db")["steps"] == 8
    assert second.get_epsilon() == pytest.approx(plan(steps=8).epsilon())
    assert (tmp_path / "checkpoint-7").is_dir()  # the end is kept
    with pytest.raises(BudgetExhausted, match="are all spent"):
        continued(tmp_path).train(resume_from_checkpoint=True)


def test_a_resume_draws_anew(tmp_path):
    """The released noise of steps 5 and 6, before and after; with SecretRandom they agree with probability 2^-53 or less."""
    moved = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = vector(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            moved.append((state.global_step, self.before - vector(model)))

    stopped(tmp_path, random=SecretRandom())
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "kept")
    watching = continued(tmp_path, random=SecretRandom(), callbacks=[Watch()])
    watching.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert [step for step, _ in moved] == [5, 6, 7]
    assert not any(torch.allclose(a, b) for i, (_, a) in enumerate(moved) for _, b in moved[:i])


def test_a_ledger_that_was_begun_is_not_begun_again(tmp_path):
    stopped(tmp_path)
    with pytest.raises(LedgerError, match="holds 5 steps of an earlier training"):
        continued(tmp_path).train()


def test_a_checkpoint_newer_than_its_ledger_is_refused(tmp_path):
    stopped(tmp_path, after=3)
    older = (tmp_path / "ledger.db").read_bytes()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "kept")
    continued(tmp_path).train(resume_from_checkpoint=str(tmp_path / "kept"))
    (tmp_path / "ledger.db").write_bytes(older)
    with pytest.raises(LedgerError, match="older than the checkpoint"):
        continued(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_without_its_spending_is_refused(tmp_path):
    stopped(tmp_path)
    (tmp_path / "checkpoint-4" / "privacy_state.json").unlink()
    with pytest.raises(LedgerError, match="does not say what was spent"):
        continued(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="has no checkpoint"):
        continued(tmp_path / "other").train(resume_from_checkpoint=True)


def test_two_trainings_on_one_account_are_seen_to_add_up(tmp_path):
    for name in ("one", "two"):
        trainer(
            tmp_path / name, args=arguments(tmp_path / name, logging_strategy="no"), account=tmp_path / "account.db"
        ).train()
    shown = ledger.show(tmp_path / "account.db")
    assert len(shown["runs"]) == 2
    limited = PrivacySettings(
        epsilon=None,
        noise_multiplier=1.0,
        delta=1e-4,
        population=1000,
        account=str(tmp_path / "account.db"),
        account_epsilon=0.01,
    )
    with pytest.raises(PrivacyRefused):
        trainer(tmp_path / "three", args=arguments(tmp_path / "three", max_grad_norm=1.0), privacy=limited).train()


REFUSED = {
    "train_sampling_strategy": "group_by_length",
    "dataloader_drop_last": True,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 2,
    "data_seed": 3,
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "torch_compile": True,
    "debug": "underflow_overflow",
    "include_num_input_tokens_seen": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "ddp_find_unused_parameters": False,
    "optim": "lomo",
    "push_to_hub": True,
    "report_to": ["wandb"],
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "fsdp": "full_shard",
    "fp16": True,
}
LATE = {
    "lr_scheduler_type",
    "parallelism_config",
    "deepspeed",
    "fsdp",
    "fp16",
    "torch_compile",
    "report_to",
    "use_liger_kernel",
}  # need what is not here


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_breaks_the_guarantee_is_refused_by_name(tmp_path, name):
    value = REFUSED[name]
    needed = {
        "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
        "load_best_model_at_end": {"save_strategy": "no"},
    }
    args = arguments(tmp_path, **({} if name in LATE else {name: value, **needed.get(name, {})}))
    if name in LATE:
        setattr(args, name, value)
    with pytest.raises(PrivacyRefused) as refused:
        trainer(tmp_path, args=args)
    reasons = [reason["message"].split(" = ")[0].split(".")[0] for reason in refused.value.refusals]
    assert name in reasons, refused.value.refusals
    assert all(reason["next"] for reason in refused.value.refusals)


def test_all_reasons_are_told_at_once_and_changes_are_seen_later(tmp_path):
    with pytest.raises(PrivacyRefused) as refused:
        trainer(tmp_path, args=arguments(tmp_path, data_seed=1, dataloader_drop_last=True))
    assert len(refused.value.refusals) == 2
    made = trainer(tmp_path)
    made.args.dataloader_drop_last = True
    with pytest.raises(PrivacyRefused, match="dataloader_drop_last"):
        made.train()


def test_early_stopping_and_searches_are_refused(tmp_path):
    with pytest.raises(PrivacyRefused, match="EarlyStoppingCallback"):
        trainer(tmp_path, callbacks=[transformers.EarlyStoppingCallback()])
    with pytest.raises(PrivacyRefused, match="hyperparameter_search"):
        trainer(tmp_path).hyperparameter_search()


@pytest.mark.parametrize(
    ("args", "named", "said"),
    [
        ({"max_grad_norm": 0.3}, {}, "max_grad_norm = 0.3"),
        ({"max_steps": 9}, {}, "max_steps = 9"),
        ({"gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps = 3"),
        ({}, {"expected_batch_size": 5.0}, "expected_batch_size = 5.0"),
        ({}, {"unit": "person"}, "unit = 'person', privacy.unit = record"),
        ({}, {"privacy": PrivacySettings(mechanism="none", epsilon=None)}, "mechanism = none"),
        ({}, {"privacy": 8.0}, "privacy = float"),
        ({}, {"privacy": plan(unit="person"), "unit": "author"}, "unit = 'author' · is no column"),
    ],
)
def test_numbers_that_disagree_are_refused(tmp_path, args, named, said):
    with pytest.raises(UsageError) as refused:
        trainer(tmp_path, args=arguments(tmp_path, **args), **named)
    assert said in str(refused.value)


def test_a_loss_of_the_whole_batch_is_refused(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])

    with pytest.raises(UsageError, match=r"compute_loss_func: shape = \(\) · must be \(1,\)"):
        trainer(tmp_path, compute_loss_func=mean).train()

    class Old(PrivateTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(UsageError, match=r"Old.compute_loss · would not be called"):
        trainer(tmp_path, kind=Old).train()


def test_a_loss_of_each_row_is_taken(tmp_path):
    def each(outputs, labels, num_items_in_batch=None):
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        return losses.sum(1) / (labels[:, 1:] != -100).sum(1)

    moved = []
    for named in ({"compute_loss_func": each}, {}):
        folder = tmp_path / str(len(moved))
        made = trainer(folder, args=arguments(folder), **named)
        made.train()
        moved.append(vector(made.model))
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize(
    ("model", "collate"),
    [
        (gpt2, lambda rows: padded(rows, "left")),  # positions count from the padding
        (llama, lambda rows: {k: v for k, v in padded(rows, "left").items() if k != "attention_mask"}),
        (llama, lambda rows: padded(rows, label_of_padding=0)),  # padding is learnt: its amount is the others'
    ],
)
def test_padding_that_couples_rows_is_refused(tmp_path, model, collate):
    with pytest.raises(UnsupportedLayer, match="depends on another unit's data"):
        trainer(tmp_path, model=model(), data_collator=collate).train()
    assert not (tmp_path / "ledger.db").exists() or ledger.show(tmp_path / "ledger.db")["steps"] == 0


def test_a_divisor_of_the_batch_is_refused(tmp_path):
    class TokenMean(PrivateTrainer):
        def compute_losses(self, model, inputs):
            labels = inputs["labels"]
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            return len(labels) * losses.sum(1) / (labels[:, 1:] != -100).sum()

    with pytest.raises(UnsupportedLayer, match="depends on another unit's data"):
        trainer(tmp_path, kind=TokenMean).train()


def test_rows_packed_into_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="puts several units into one row"):
        trainer(tmp_path, data_collator=transformers.DataCollatorWithFlattening()).train()


def test_left_padding_of_a_model_with_relative_positions_is_taken_if_the_first_word_is_not_learnt(tmp_path):
    """The padding before it would predict it, and without padding nobody does."""

    def left(rows):
        return padded([{**row, "labels": [-100, *row["labels"][1:]]} for row in rows], "left")

    made = trainer(tmp_path, data_collator=left)
    made.train()
    assert made.state.global_step == 4


def test_chance_in_the_collator_is_taken(tmp_path):
    def masked(rows):
        batch = padded(rows)
        return {**batch, "labels": torch.where(torch.rand(batch["labels"].shape) < 0.5, batch["labels"], -100)}

    made = trainer(tmp_path, data_collator=masked)
    made.train()
    assert made.state.global_step == 4


def test_a_data_set_of_datasets_with_its_column_and_the_library_s_collator(tmp_path):
    import datasets

    rows = texts(persons=10)
    dataset = datasets.Dataset.from_list([{**row, "note": "not for the model"} for row in rows])
    private = PrivacySettings(
        epsilon=None, noise_multiplier=1.0, delta=1e-4, unit="person", records_per_unit=2, population=1000
    )
    args = arguments(tmp_path, per_device_train_batch_size=2)
    made = trainer(tmp_path, rows=dataset, args=args, privacy=private, unit="person")
    assert made.units.num_units == 10
    made.train()
    assert made.plan.records_per_unit == 2 and made.state.global_step == 4


def test_every_optimizer_of_the_loop_and_bfloat16_train(tmp_path):
    for i, values in enumerate(
        ({"optim": "adafactor"}, {"optim": "adamw_torch"}, {"bf16": True}, {"activation_checkpointing": True})
    ):
        folder = tmp_path / str(i)
        made = trainer(folder, args=arguments(folder, max_steps=2, **values), privacy=plan(steps=2))
        before = vector(made.model)
        made.train()
        assert torch.isfinite(vector(made.model)).all() and not torch.equal(before, vector(made.model))


def test_how_many_parts_a_batch_has_does_not_reach_the_optimizer(tmp_path):
    """An optimizer that counts its steps, gradients or not, would tell of the size of the batch."""

    model, calls = llama(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *step: calls.append(step))
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer(
        tmp_path, model=model, args=args, privacy=plan(steps=2), random=Told(0, [range(9), [1]]), optimizers=(optimizer, None)
    ).train()  # fmt: skip
    assert len(calls) == 2


def test_corrected_adam_is_told_of_the_noise(tmp_path):
    from sfumato.training.dp_adam import DpAdamBC

    model = llama()
    optimizer = DpAdamBC(model.parameters(), lr=1e-2)
    made = trainer(tmp_path, model=model, optimizers=(optimizer, None))
    made.train()
    assert optimizer.noise_variance is None and made.state.global_step == 4


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """Started as torchrun does; every unit joins and there is no noise, so that the weights must agree."""
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        script = Path(__file__).with_name("trainer_in_processes.py")
        start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"] if size == 2 else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *start, str(script), str(folder)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(folder / "done.pt"))
        assert (folder / "checkpoint-3" / "privacy_state.json").is_file()
    assert [f["processes"] for f in found] == [1, 2] and [f["charged"] for f in found] == [3, 3]
    torch.testing.assert_close(found[0]["weights"], found[1]["weights"], rtol=1e-4, atol=1e-6)
