"""What models that draw pictures of texts have in common with the families: they can be asked as those can."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sfumato.errors import UsageError
from sfumato.models.generative import Direction
from sfumato.models.settings import Sampling
from sfumato.records import Modality, Record, generated


class TextToImage(ABC):
    """``sample`` and ``directions`` by ``generate``."""

    learns_from_rows: ClassVar[bool] = (
        True  # training on a few rows changes what it knows of them: an audit's control does
    )
    directions: tuple[Direction, ...] = (Direction(("text",), ("image",)),)

    @abstractmethod
    def generate(self, texts: Sequence[str | None], *, seed: int, sampling: Sampling | None = None) -> np.ndarray:
        """Pictures for texts (None: told nothing), (N, H, W, C) uint8."""

    def sample(
        self,
        given: Sequence[Record],
        wanted: Sequence[Modality],
        *,
        seed: int,
        sampling: Sampling | None = None,
    ) -> list[Record]:
        """For each record a picture of its text, as ``Generative.sample``. Raises UsageError for anything else."""
        told = [name for name in ("image", "audio") for record in given if getattr(record, name) is not None]
        if tuple(wanted) != ("image",) or set(told) - {"image"}:
            raise UsageError(
                f"wanted = {'+'.join(wanted)}, told {'+'.join(['text', *dict.fromkeys(told)])} · this model knows text→image",
                next="Ask for a picture of a text, or train a family that has the other.",
            )
        pictures = self.generate([record.text for record in given], seed=seed, sampling=sampling)
        return [generated(row, {"image": picture}, None) for row, picture in enumerate(pictures)]
