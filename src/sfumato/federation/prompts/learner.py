"""A prompt as a site of a federation holds it: records become cached features and labels, and the prompt is a file.

Shapes: R records, V patches, E features, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import OutsideError, UsageError
from sfumato.federation.prompts.methods import PromptModel
from sfumato.federation.prompts.settings import PromptSettings
from sfumato.federation.prompts.training import IMAGE, LABEL
from sfumato.models.generative import write_json
from sfumato.models.prompt_settings import Classes
from sfumato.randomness import TestRandom
from sfumato.records import Record, UnitTable

FILE = "prompt.safetensors"
AT_ONCE = 256  # pictures that the encoders look at together


class PromptLearner(PromptModel):
    """Args:
    encoders: frozen; classes: of this site; settings: of the prompt.
    described: the settings of the model as plain values, for its file. public: sentences on where the encoders come from.
    """

    family = "prompts"
    directions: tuple[Any, ...] = ()  # nothing is generated

    def __init__(
        self,
        encoders: Any,
        classes: Classes,
        settings: PromptSettings,
        *,
        described: Callable[[], Mapping[str, Any]],
        public: Sequence[str] = (),
    ) -> None:
        super().__init__(encoders, list(classes.names.values()), settings)
        self.asked, self._described, self._public = classes, described, tuple(public)

    # -- records --

    def label(self, record: Record) -> int | None:
        """The number of its class; None where it is in none of this site's. Of that record alone."""
        said = said_class(record, self.asked)
        return list(self.asked.names).index(said) if said in self.asked.names else None

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """image (R, 1 + V, E), label (R,), of the records that have a picture and one of this site's classes."""
        return table_of(self, self.encoders, records)

    def read(self, features: Tensor) -> list[str]:
        """The name of the class that each picture is told as. Args: features: (R, 1 + V, E)."""
        return [self.classes[i] for i in self.probabilities(features).argmax(1).tolist()]

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """(R, C). Where the prompt depends on how p_L is cut, it is cut by public dice."""
        told = self.told(self.prompts(self.cut(TestRandom(0))))
        return torch.cat([self.likeness(part, told) for part in features.split(512)]).softmax(1)

    # -- what is said of it --

    def boundary(self) -> list[str]:
        home = ", ".join(self.settings.method.home)
        stays = (
            f" {home} of each site stays there: it is trained by the same charged steps, and sent to nobody."
            if home
            else ""
        )
        return [
            f"Trained: a prompt of {self.settings.tokens} vectors and nothing else.{stays}",
            *self._public,
            "Declared public: which classes each site tells apart, and their names.",
        ]

    # -- on disk --

    def save(self, folder: Path | str, *, whole: bool = False) -> None:
        """Writes the shared prompt, or with ``whole`` what is this site's own too; the encoders are not saved with it. [shell]

        Raises OutsideError where the disk does not take it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / f".{FILE}"
            save_file(self._kept(whole), scratch)
            scratch.replace(folder / FILE)
            classes = {"columns": list(self.asked.columns), "names": dict(self.asked.names)}
            write_json(folder / "sfumato.json", {**self._described(), **({"classes": classes} if whole else {})})
        except (OSError, SafetensorError) as error:
            raise OutsideError(
                f"prompt = {folder} · could not be written ({error})", next="Free some disk space, then --resume."
            ) from None

    def restore(self, folder: Path | str) -> None:
        """Takes what ``save`` wrote; what is not there stays as it was built. Raises UsageError where it is another prompt."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found, own = load_file(Path(folder) / FILE), self.trained()
            if "p_G" not in found or any(n not in own or own[n].shape != t.shape for n, t in found.items()):
                raise ValueError(f"holds {', '.join(found)}")
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(
                f"prompt = {folder} · is not a prompt of this recipe ({error})",
                next="Give the folder of a finished run.",
            ) from None
        self.load_state_dict(found, strict=False)

    def origins(self) -> dict[tuple[str, str], str]:
        return {(FILE, name): "dp-sgd" for name in self._kept(False)}

    def named_tensors(self) -> Iterator[tuple[str, str]]:
        yield from self.origins()

    def _kept(self, whole: bool) -> dict[str, Tensor]:
        home = self.settings.method.home
        return {n: p.detach().clone().contiguous() for n, p in self.trained().items() if whole or n not in home}


def said_class(record: Record, classes: Classes) -> str:
    """What a record says in the columns, facts before other metadata."""
    facts = record.metadata.get("facts") or {}
    return "+".join(str(facts.get(column, record.metadata.get(column))) for column in classes.columns)


def table_of(model: PromptLearner, encoders: Any, records: Sequence[Record]) -> UnitTable:
    kept = [(r, label) for r in records if r.image is not None and (label := model.label(r)) is not None]
    seen = looked([r for r, _ in kept], encoders)
    labels = torch.tensor([label for _, label in kept], dtype=torch.int64)
    return UnitTable({IMAGE: seen, LABEL: labels}, [r.unit for r, _ in kept])


def looked(records: Sequence[Record], encoders: Any) -> Tensor:
    """(R, 1 + V, E) features of pictures; of no records (0, 1, E)."""
    pictures = [record.image for record in records]
    parts = [encoders.look(pictures[i : i + AT_ONCE]) for i in range(0, len(pictures), AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, 1, encoders.features)
