"""What both starts before the private steps share: a training of its own in the run's folder, and the weights it ends with. [shell]

Resumable at every boundary: the training has checkpoints of its own, its end is written whole or not at all, and once the
private steps have a checkpoint nothing of it is looked at again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import releasing
from sfumato.errors import OutsideError
from sfumato.privacy.plan import NotPrivate
from sfumato.recipe import Recipe
from sfumato.training.folder import RunFolder
from sfumato.training.settings import TrainingSettings

MODEL = "model.safetensors"  # the weights that the private steps begin at


@dataclass(frozen=True, slots=True)
class Start:
    """RUN/``folder``.

    Attributes:
      said: what progress calls it.
      unspent: why it costs no privacy, in a word.
    """

    run: RunFolder
    folder: str
    said: str
    unspent: str

    @property
    def path(self) -> Path:
        return self.run.path / self.folder

    @property
    def weights(self) -> Path:
        return self.path / MODEL

    @property
    def there(self) -> bool:
        return self.weights.is_file()

    def load(self, model: Any) -> None:
        """The weights that the private steps begin at."""
        from safetensors.torch import load_file

        model.load_state_dict(load_file(self.weights))

    def train(
        self,
        name: str,
        model: Any,
        table: Any,
        settings: TrainingSettings,
        recipe: Recipe,
        progress: Callable[[str], None],
    ) -> bool:
        """Trains on what nobody gave who is protected, from a checkpoint of its own if there is one. False where Ctrl-C ended it."""
        from sfumato.training import loop, watch

        batch = min(settings.expected_batch_size, table.num_units)
        trained = loop.train(
            model,
            table,
            NotPrivate(population=table.num_units, expected_batch_size=float(batch), steps=settings.steps),
            settings,
            recipe.performance,
            checkpoints=self.path / name,
            watchers=[watch.Line(lambda line: progress(f"{self.said}, {name}: {line}"), unspent=self.unspent)],
        )
        return trained.stopped != "interrupted"

    def save(self, model: Any) -> None:
        """There whole, or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.weights
        scratch = path.with_name(f".{MODEL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, scratch)
            releasing.sync(scratch)
            scratch.replace(path)
            releasing.sync(path.parent)
        except (OSError, SafetensorError) as error:  # a full disk is an OSError to some, and not to safetensors
            raise OutsideError(
                f"{path} · could not be written ({error})", next="Free some disk space and run again with --resume."
            ) from None


def steps_have_begun(run: RunFolder) -> bool:
    """The private steps have a checkpoint: it holds everything."""
    return (run.checkpoints / "last" / "state.json").is_file()
