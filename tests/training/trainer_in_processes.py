"""Run by torchrun, or alone: three steps of ``PrivateTrainer`` on all units without noise; process 0 writes the weights."""

import sys
from pathlib import Path

import torch
from tests.training.small_trainers import arguments, llama, plan, texts, trainer, vector

from sfumato.randomness import SecretRandom


def main(folder: Path) -> None:
    args = arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=2,
        optim="sgd",
    )
    size = args.world_size
    private = plan(population=12, expected_batch_size=12.0, steps=3, noise_multiplier=0.0, max_grad_norm=0.5)
    made = trainer(folder, model=llama(), rows=texts(12), args=args, privacy=private, random=SecretRandom())
    made.train()
    if made.is_world_process_zero():
        torch.save(
            {"weights": vector(made.model), "processes": size, "charged": made._events[0].count}, folder / "done.pt"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
