"""What a codec is: a fixed public map between the values of one modality and tensors. Nothing of it is trained or fitted.

Three kinds, by what their tensors are:

- *continuous*: (R, D) float32, entries that vary about as the public ``scale`` says; reshaped by ``shape`` where a network wants
  rows and columns. Decoded by ``decode``.
- *tokens*: (R, L) int64 in 0 .. ``vocabulary`` - 1, and ``vocabulary`` itself where a short record has none. Decoded by ``decode``.
- *features*: (R, ...) whatever the text encoder wants; a condition only, ``decode`` raises.

Shapes: R records, D numbers, L tokens.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from sfumato.records import Modality, Record

Kind = Literal["continuous", "tokens", "features"]


class Codec(Protocol):
    """``encode`` and ``decode`` of one modality."""

    modality: ClassVar[Modality]

    @property
    def kind(self) -> Kind: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one encoded record: continuous (C, h, w) or (bands, frames) or (D,), tokens (L,), features as they are."""
        ...

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """(R, ...) and (R,) bool, False (and the row zero, or all padding) where a record lacks the modality.

        Raises DataError naming a record that does not fit.
        """
        ...

    def blank(self, rows: int) -> Tensor:
        """What ``encode`` gives for records without the modality: (R, ...)."""
        ...

    def decode(self, encoded: Tensor) -> Sequence[Any]:
        """R values as a ``Record`` holds them: str, (H, W, C) uint8, or (T,) float32 in [-1, 1]."""
        ...


class ContinuousCodec(Codec, Protocol):
    @property
    def scale(self) -> Tensor:
        """The assumed standard deviation of each entry, (D,): a public constant, fitted to nothing."""
        ...


class TokenCodec(Codec, Protocol):
    end: int | None
    """The token after which there is nothing but padding; None where all L places are always taken."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; the number itself pads short records."""
        ...

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """(first token, one past the last) of what may stand at each of the L places: public, so nobody need learn it."""
        ...

    def coordinates(self) -> Tensor | None:
        """(vocabulary, F): what is publicly known of the tokens, alike ones close together; None: nothing is."""
        ...

    def places(self) -> Tensor | None:
        """(L, G): what is publicly known of the places of the sequence, alike ones close together; None: nothing is."""
        ...
