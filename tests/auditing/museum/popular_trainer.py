"""The popular private subclass of ``transformers.Trainer``: the loop and its data loader stay, the optimizer becomes Opacus's.

Written anew after what such packages publish: batches of one size from a shuffled epoch, accounted as Poisson samples of
q = B / N; the model's own loss, a mean over all tokens of the batch, differentiated and multiplied by B to give each unit's;
no guard against NaN.

Claimed: epsilon = 4.38 for one Gaussian step with sigma = 1. In truth a unit with a very long text divides the gradients of
all others by its tokens: with B = 4 it takes 3 C away from the sum and adds C of its own, so that the noise multiplier is
1/4, epsilon 24.4. And an epoch of shuffled batches has no proof that is better than one Gaussian each.
"""

import tempfile

import torch
import transformers
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from tests.auditing.adapters import loop
from tests.auditing.adapters.opacus_engine import as_it_is

from sfumato.auditing.conformance import Run

RIGHT_ROW, ROWS = 7, {6, 7, 10, 17}  # batches of one size are never empty
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 24.38
TRUE_NOISE_MULTIPLIER = 1 / loop.EXPECTED


class ZeroGradients(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()  # the loop asks the model to, which leaves per-sample gradients


class PopularTrainer(transformers.Trainer):
    """Args: batches: what the suite wants trained on; None for the trainer's own data loader."""

    def __init__(self, model, dataset, folder, *, steps, batch, noise_multiplier, generator, batches=None):
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1.0, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        self.noise_multiplier, self.generator, self.batches = noise_multiplier, generator, batches
        super().__init__(model=GradSampleModule(model), args=arguments, train_dataset=dataset)
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(ZeroGradients())

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        self.optimizer = DPOptimizer(
            self.optimizer, noise_multiplier=self.noise_multiplier, max_grad_norm=loop.C, generator=self.generator,
            expected_batch_size=loop.EXPECTED,
        )  # fmt: skip
        return self.optimizer

    def get_train_dataloader(self):
        if self.batches is None:
            return super().get_train_dataloader()
        return torch.utils.data.DataLoader([{"inputs": batch} for batch in self.batches], batch_size=None)

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        with as_it_is():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["inputs"]).mean()


def train(model, batches, noise_multiplier, generator):
    batches = [batch for batch in batches if len(batch)]  # a data loader never gives an empty one
    if not batches:
        return Run(charged=0, noise_multiplier=noise_multiplier)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PopularTrainer(
            model, batches[0], folder, steps=len(batches), batch=len(batches[0]), noise_multiplier=noise_multiplier,
            generator=generator, batches=batches,
        )  # fmt: skip
        trainer.train()
        steps = trainer.state.global_step
        trainer.model.to_standard_module()
    for parameter in model.parameters():
        parameter.grad = None
    return Run(charged=steps, noise_multiplier=noise_multiplier)


def step(model, inputs, noise_multiplier, generator):
    train(model, [inputs], noise_multiplier, generator)


def sample(population, sampling_rate, steps, generator):
    batch, drawn = max(1, round(population * sampling_rate)), []
    rows = [{"inputs": torch.tensor([float(i)])} for i in range(population)]
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        trainer = PopularTrainer(
            torch.nn.Linear(1, 1), rows, folder, steps=steps, batch=batch, noise_multiplier=1.0, generator=generator
        )
        loader = trainer.get_train_dataloader()
        while len(drawn) < steps:
            drawn += [given["inputs"].flatten().long().numpy() for given in loader]
    return drawn[:steps]


class LanguageModel(torch.nn.Module):
    """(B, T) tokens, 0 is padding -> what Opacus takes for the (B,) losses: B times each text's part of the token mean."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)

    def forward(self, tokens):
        logits = self.head(self.embedding(tokens[:, :-1]))
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return len(tokens) * losses.sum(1) / (labels != -100).sum().clamp(min=1)


def units(count, generator):
    tokens = torch.randint(1, 11, (count, 12), generator=generator)
    ends = torch.randint(2, 13, (count, 1), generator=generator)
    return tokens * (torch.arange(12) < ends)


def wrong():
    return loop.trainer(
        name="a popular subclass of transformers.Trainer", step=step, train=train, sample=sample, resume=None,
        step_together=None, prepare=None, model=LanguageModel, units=units,
    )  # fmt: skip
