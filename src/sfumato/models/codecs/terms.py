"""Texts as a few numbers in [-1, 1], by a public list of terms: what somebody who knows the field, and has seen none of
the records, would look for. Nothing is fitted.

Shapes: R records, A axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.models.codecs.text import words
from sfumato.models.settings import TermAxis


def encode(texts: Sequence[str | None], axes: Sequence[TermAxis]) -> tuple[Tensor, Tensor]:
    """Every axis: -1 where a ``less`` term occurs, else 1 where a ``more`` term does, else 0.

    ``less`` goes first, so that "no effusion" is not an effusion. A term is one word or several neighbouring ones.

    Returns: (R, A) float32; (R,) bool, False where a text is missing or has no word.
    """
    told = [f" {' '.join(words(text or ''))} " for text in texts]
    less, more = [_needles(axis.less) for axis in axes], [_needles(axis.more) for axis in axes]
    rows = [
        [-1.0 if _any(n, text) else 1.0 if _any(p, text) else 0.0 for n, p in zip(less, more, strict=True)]
        for text in told
    ]
    present = [bool(text.strip()) for text in told]
    return torch.tensor(rows).reshape(len(told), len(axes)), torch.tensor(present, dtype=torch.bool)


def _needles(terms: Sequence[str]) -> list[str]:
    return [f" {' '.join(words(term))} " for term in terms]


def _any(needles: Sequence[str], text: str) -> bool:
    return any(needle in text for needle in needles)
