"""``sfumato.PrivateTrainer`` as its users have it: a data set, a collator, a plan, ``train()``, a checkpoint, a resume.

The suite says who is in a step; so the coins of ``step`` and ``train`` are told beforehand (``Told``), all else is left alone.
"""

import contextlib
import functools
import math
import tempfile

import numpy as np
import torch
import transformers
from tests.auditing.adapters import loop, ours

from sfumato.auditing.conformance import Run, Trainer
from sfumato.privacy.plan import DpSgd
from sfumato.randomness import TestRandom
from sfumato.training.trainer import PrivateTrainer

RESUME_UNITS, RESUME_BATCH = 200, 20


class Told(TestRandom):
    """Chance for tests, of which the coins of each step are given: the units that join it."""

    def __init__(self, seed, draws):
        super().__init__(seed)
        self._draws = iter(draws)

    def uniform(self, count):
        coins = np.ones(count) - 2.0**-53
        coins[next(self._draws)] = 0.0
        return coins


class OfLosses(PrivateTrainer):
    """The suite's model gives one loss for each row of ``inputs``."""

    def compute_losses(self, model, inputs):
        if self.engine is not None:  # not when it looks whether rows are alone
            self.drawn[self.state.global_step] += inputs["row"].tolist()
        return model(inputs["inputs"])


class Watching(transformers.TrainerCallback):
    """What every step has released, and what it was told to do after some of them."""

    def __init__(self, model, kill_after=None):
        self.model, self.kill_after, self.released = model, kill_after, []

    def _vector(self):
        return torch.cat([p.detach().flatten().double() for p in self.model.parameters()])

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self._vector()

    def on_step_end(self, args, state, control, **kwargs):
        self.released.append(self.before - self._vector())
        if state.global_step == self.kill_after:
            raise Killed


class Killed(Exception):
    pass


def trainer_of(model, rows, folder, random, *, noise_multiplier, steps, batch=loop.EXPECTED, population=None,
               owner=None, callbacks=(), save_steps=0, learning_rate=1.0):  # fmt: skip
    dataset = [{"inputs": row, "row": i} for i, row in enumerate(rows)]
    if owner is not None:
        dataset = [{**row, "person": f"{int(person):03d}"} for row, person in zip(dataset, owner, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=int(batch), learning_rate=learning_rate,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=loop.C, report_to=[], logging_strategy="no",
        save_strategy="steps" if save_steps else "no", save_steps=save_steps or 500, disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    plan = DpSgd(
        population=population or loop.POPULATION, expected_batch_size=batch, steps=steps, noise_multiplier=noise_multiplier,
        max_grad_norm=loop.C, delta=1e-5, unit="record" if owner is None else "person",
        records_per_unit=1 if owner is None else 100,
    )  # fmt: skip
    trainer = OfLosses(
        model=model, args=arguments, train_dataset=dataset, data_collator=torch.utils.data.default_collate,
        callbacks=list(callbacks), privacy=plan, random=random, unit=None if owner is None else "person",
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.drawn = {step: [] for step in range(steps + 1)}
    return trainer


def charged(trainer):
    return sum(event.count for event in trainer._events)


def train(model, batches, noise_multiplier, generator):
    batches = list(batches)
    rows = torch.cat([*batches, batches[0].new_zeros(1, *batches[0].shape[1:])])  # the last one is never drawn
    ends = np.cumsum([0, *map(len, batches)])
    random = Told(int(torch.randint(2**62, (1,), generator=generator)), map(np.arange, ends, ends[1:]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, rows, folder, random, noise_multiplier=noise_multiplier, steps=len(batches))
        trainer.train()
    return Run(charged=charged(trainer), noise_multiplier=noise_multiplier)


def step(model, inputs, noise_multiplier, generator):
    train(model, [inputs], noise_multiplier, generator)


def sample(population, sampling_rate, steps, generator):
    """Who was drawn by a whole training, as its model has seen them. Asked again with the same generator, it need not train again."""
    return _sampled(population, sampling_rate, steps, int(torch.randint(2**62, (1,), generator=generator)))


@functools.cache
def _sampled(population, sampling_rate, steps, seed):
    model = torch.nn.Linear(1, 1)
    batch = population * sampling_rate
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            _Losses(model), torch.zeros(population, 1), folder, TestRandom(seed), noise_multiplier=1.0, steps=steps,
            batch=batch, population=population,
        )  # fmt: skip
        trainer.train()
    return [np.array(trainer.drawn[step], dtype=np.int64) for step in range(steps)]


class _Losses(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs).sum(1)


def resume(model, batches, stop_after, noise_multiplier, generator):
    """Units without a gradient; killed, and resumed from a checkpoint that is a step older."""
    width = sum(p.numel() for p in model.parameters())
    rows = torch.zeros(RESUME_UNITS, width, dtype=next(model.parameters()).dtype)
    released, drawn, events = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(2):
            watching = Watching(model, stop_after if attempt == 0 else None)
            trainer = trainer_of(
                model, rows, folder, ours.random_of(generator), noise_multiplier=noise_multiplier, steps=len(batches) + 1,
                batch=RESUME_BATCH, population=RESUME_UNITS, callbacks=[watching], save_steps=stop_after - 1,
            )  # fmt: skip
            with contextlib.suppress(Killed):
                trainer.train(resume_from_checkpoint=attempt == 1)
            first = 0 if attempt == 0 else stop_after - 1
            released += watching.released
            drawn += [np.array(trainer.drawn[first + i], dtype=np.int64) for i in range(len(watching.released))]
            events = charged(trainer)
    return Run(charged=events, noise_multiplier=noise_multiplier, released=released, drawn=drawn)


def step_of_persons(model, inputs, owner, noise_multiplier, generator):
    persons = len(owner.unique())
    everybody = Told(int(torch.randint(2**62, (1,), generator=generator)), [np.arange(persons)])
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(
            model, inputs, folder, everybody, noise_multiplier=noise_multiplier, steps=1, owner=owner
        ).train()  # fmt: skip


def claim(**changes):
    return loop.claim(hardened_noise=True, **changes)


def trainer(**changes) -> Trainer:
    calls = {
        "claim": claim(), "step": step, "train": train, "sample": sample, "resume": resume, "accountant": loop.accountant,
        "model": loop.Network, "units": loop.units, "name": "sfumato.PrivateTrainer",
    }  # fmt: skip
    return Trainer(**{**calls, **changes})


def of_persons() -> Trainer:
    return trainer(claim=claim(unit="person"), step_of_persons=step_of_persons, name="sfumato.PrivateTrainer, persons")


assert math.isclose(ours.RATE, loop.EXPECTED / loop.POPULATION)
