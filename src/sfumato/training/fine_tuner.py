"""``FineTuner``: a ``PrivateTrainer`` for what ``models.pretrained`` loads, from records of messages. [shell]"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato.models.pretrained import Pretrained
from sfumato.training.trainer import PrivateTrainer


class FineTuner(PrivateTrainer):
    """Trains a ``Pretrained`` on records (``models.messages``). The claim is that of ``PrivateTrainer``.

        tuner = FineTuner(pretrained.load("llama"), records, args=arguments, privacy=PrivacySettings(epsilon=8.0))
        tuner.train()
        tuner.save_model("adapter")

    ``unit`` names an entry of the records that says whose each is. Other arguments are those of ``PrivateTrainer``; columns
    that the model does not know are kept (``remove_unused_columns``), since a record is not what the model reads.
    """

    def __init__(
        self, pretrained: Pretrained, records: Sequence[Mapping[str, Any]], *, args: Any, **named: Any
    ) -> None:
        self.pretrained = pretrained
        args.remove_unused_columns = False
        super().__init__(
            model=pretrained.model, args=args, train_dataset=records, data_collator=pretrained.collate, **named  # pyright: ignore
        )  # fmt: skip

    def compute_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        return self.pretrained.losses(model, inputs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the model's own library writes it; the loop's own checkpoints are the trainer's."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            self.pretrained.save(folder)
            self._write_claim(str(folder))
