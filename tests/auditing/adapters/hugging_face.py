"""A ``transformers.Trainer`` subclass: its own loop, its own batches; the engine makes its optimizer private."""

import tempfile

import torch
import transformers
from tests.auditing.adapters import loop, ours

from sfumato.auditing.conformance import Run, Trainer
from sfumato.privacy.engine import DifferentialPrivacyEngine


class PrivateTrainer(transformers.Trainer):
    """``model(inputs)`` gives one loss per row; ``given`` are the batches, in order, each of them one step."""

    def __init__(self, model, given, noise_multiplier, random, folder):
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(given),
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # its clipping is of the summed gradient, and after ours
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        super().__init__(model=model, args=arguments)
        self.remove_callback(transformers.PrinterCallback)
        self.given = given
        self.noise = noise_multiplier
        self.random = random
        self.engine = None

    def create_optimizer(self, model=None):
        self.engine = DifferentialPrivacyEngine(
            self.model,
            max_grad_norm=loop.C,
            noise_multiplier=self.noise,
            expected_batch_size=loop.EXPECTED,
            sampling_rate=ours.RATE,
            loss_reduction="sum",
            random=self.random,
        )
        self.optimizer = self.engine.attach(torch.optim.SGD(self.model.parameters(), lr=1.0))
        return self.optimizer

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader([{"inputs": batch} for batch in self.given], batch_size=None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["inputs"]).sum()


def train(model, batches, noise_multiplier, generator):
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(model, list(batches), noise_multiplier, ours.random_of(generator), folder)
        trainer.train()
        events = trainer.engine.state_dict()["events"]
        trainer.engine.detach()
    return Run(charged=sum(e["count"] for e in events), noise_multiplier=max(e["noise_multiplier"] for e in events))


def step(model, inputs, noise_multiplier, generator):
    train(model, [inputs], noise_multiplier, generator)


def trainer() -> Trainer:
    return Trainer(
        claim=loop.claim(hardened_noise=True), step=step, train=train, name="transformers.Trainer with our engine"
    )
