"""Text to numbers without a fitted vocabulary: words and pairs of words, hashed into buckets.

Nothing here is learnt from data, so nothing here can leak: the hash is public and fixed.
Shapes: R records, L = MOST_FEATURES, V buckets.
"""

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Han characters and kana are words of one character; elsewhere a word is a run of letters or digits.
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W_぀-ヿ㐀-䶿一-鿿]+")
MOST_FEATURES = 256  # of one text; a constant, so that a table's width says nothing of the texts in it


def words(text: str) -> list[str]:
    """Lower-cased words.

    >>> words("No effusion, heart not enlarged.")
    ['no', 'effusion', 'heart', 'not', 'enlarged']
    """
    return _WORD.findall(text.lower())


@lru_cache(maxsize=200_000)
def _bucket(feature: str, buckets: int) -> int:
    return zlib.crc32(feature.encode()) % buckets


def features(text: str, buckets: int) -> list[int]:
    """Buckets of a text's words and neighbouring pairs, each once; at most ``MOST_FEATURES``, first come first."""
    found = words(text)
    pairs = [f"{a} {b}" for a, b in pairwise(found)]
    return list(dict.fromkeys(_bucket(f, buckets) for f in found + pairs))[:MOST_FEATURES]


def encode(texts: Sequence[str | None], buckets: int) -> tuple[Tensor, Tensor]:
    """Texts as padded feature lists.

    Returns: (R, L) int16 or int32 buckets, padded with ``buckets``; (R,) bool, False where a text is missing or has no word.
    """
    lists = [features(text, buckets) if text else [] for text in texts]
    table = np.full((len(lists), MOST_FEATURES), buckets, dtype=np.int16 if buckets < 2**15 else np.int32)
    for row, found in zip(table, lists, strict=True):
        row[: len(found)] = found
    return torch.from_numpy(table), torch.tensor([bool(found) for found in lists], dtype=torch.bool)


def bag(table: Tensor, buckets: int) -> Tensor:
    """Feature lists as bags of unit length. Args: (R, L). Returns: (R, V) float32, zero rows for empty texts."""
    full = torch.zeros(table.shape[0], buckets + 1, device=table.device)
    full.scatter_(1, table.long(), 1.0)
    dense = full[:, :buckets]
    return dense / dense.norm(dim=1, keepdim=True).clamp(min=1.0)
