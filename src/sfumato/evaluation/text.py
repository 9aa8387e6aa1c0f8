"""What is measured on texts: the facts that they say, how varied they are, and how usual their letters are.

The reader learns from public texts only. A heart rate is read by a public rule. Texts that repeat private records word for
word are the audit's business, not measured here.
"""

import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.errors import UsageError

BUCKETS = 4096  # of hashed words and pairs of words
STEPS, RATE, DECAY = 150, 0.3, 1e-4  # of the reader's training
ORDER = 5  # letters of context of the letter model
PIECES = 200  # texts that self-similarity looks at: it compares all with all
_WORDS = re.compile(r"[^\W_]+(?:[.,]\d+)?", re.UNICODE)
_RATE = re.compile(r"(\d{2,3})\s*(?:beats|bpm|/\s*min|ударов|удара|удар)|每分钟\s*(\d{2,3})\s*次", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower case, numbers whole; scripts without spaces letter by letter."""
    found: list[str] = []
    for word in _WORDS.findall(text.lower()):
        found += list(word) if any("\u3040" <= letter <= "\u9fff" for letter in word) else [word]
    return found


def heart_rate(text: str) -> float | None:
    """Beats a minute, where the text says them."""
    found = _RATE.search(text)
    return None if found is None else float(found.group(1) or found.group(2))


# -- facts --


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """A logistic regression for each fact, on hashed words and pairs of words.

    Attributes: weights: by fact, (BUCKETS + 1, values), the last row the bias.
    """

    facts: dict[str, tuple[str, ...]]
    weights: dict[str, np.ndarray]
    texts: int  # it learnt from

    @property
    def name(self) -> str:
        digest = hashlib.sha256()
        for fact, weight in sorted(self.weights.items()):
            digest.update(f"{fact} {self.facts[fact]}\n".encode() + weight.astype("<f4").tobytes())
        return f"logistic regression on hashed words, sha256 {digest.hexdigest()}"

    def read(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The most probable value of each fact."""
        bags = features(texts)
        return {
            fact: [values[i] for i in (bags @ self.weights[fact]).argmax(1)] if len(texts) else []
            for fact, values in self.facts.items()
        }


def features(texts: Sequence[str]) -> np.ndarray:
    """Which words and pairs of neighbours occur, hashed by CRC-32, of unit length; (N, BUCKETS + 1) float32, the last one 1."""
    bags = np.zeros((len(texts), BUCKETS + 1), np.float32)
    for row, text in enumerate(texts):
        said = words(text)
        pieces = {*said, *(f"{a} {b}" for a, b in zip(said, said[1:], strict=False))}
        bags[row, [zlib.crc32(piece.encode()) % BUCKETS for piece in pieces]] = 1
    bags /= np.maximum(np.linalg.norm(bags, axis=1, keepdims=True), 1e-12)
    bags[:, -1] = 1
    return bags


def train_reader(texts: Sequence[str], facts: Mapping[str, Sequence[str | None]]) -> TextReader:
    """Learns to read ``facts`` off public ``texts``; the same texts give the same reader.

    Args: facts: by name, one value per text; None where it is not known.
    """
    from scipy.sparse import csr_matrix

    bags = csr_matrix(features(texts))
    vocabulary: dict[str, tuple[str, ...]] = {}
    weights: dict[str, np.ndarray] = {}
    for fact, values in facts.items():
        if len(values) != len(texts):
            raise UsageError(f"facts[{fact!r}] = {len(values)} values · must be one per text, {len(texts)}", next="")
        vocabulary[fact] = tuple(sorted({value for value in values if value is not None}))
        if not vocabulary[fact]:
            raise UsageError(f"facts[{fact!r}] · no text has a value", next="Leave this fact out.")
        told = [row for row, value in enumerate(values) if value is not None]
        target = np.array([[values[row] == value for value in vocabulary[fact]] for row in told], np.float32)
        weights[fact] = _regression(bags[told], target)
    if not weights:
        raise UsageError("facts = {} · a reader needs at least one fact to read", next="Measure variety only.")
    return TextReader(facts=vocabulary, weights=weights, texts=len(texts))


def _regression(inputs: Any, target: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression by Adam from zero. Args: inputs (N, D) sparse, target (N, V) of 0 and 1."""
    weight = np.zeros((inputs.shape[1], target.shape[1]), np.float32)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    backward = inputs.T.tocsr()
    for step in range(1, STEPS + 1):
        logits = inputs @ weight
        chance = np.exp(logits - logits.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        gradient = backward @ (chance - target) / len(target) + DECAY * weight
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return weight.astype(np.float32)


# -- variety --


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """The share of different ones among all n-grams of words (Li et al. 2016, "distinct-n"). 0 where there is none.

    It falls with the number of texts: compare equally many.
    """
    grams = Counter(gram for said in texts for gram in _grams(words(said), n))
    return len(grams) / sum(grams.values()) if grams else 0.0


def self_similarity(texts: Sequence[str], *, seed: int = 0, pieces: int = PIECES) -> np.ndarray:
    """How much of each text another of the set says too: for each the largest BLEU-like score among the others, (N,).

    Geometric mean of the clipped precisions of 1- to 4-grams, without brevity penalty or smoothing; after self-BLEU (Zhu et
    al. 2018). Differs: the best single other text instead of all as references, and at most ``pieces`` texts, drawn by ``seed``.
    1 means that every text occurs twice.
    """
    chosen = np.random.default_rng(seed).permutation(len(texts))[:pieces]
    said = [words(str(texts[i])) for i in chosen]
    counts = [[Counter(_grams(one, n)) for n in range(1, 5)] for one in said]
    best = np.zeros(len(chosen))
    for i, mine in enumerate(counts):
        orders = [n for n in range(4) if mine[n]]
        for j, other in enumerate(counts):
            if i == j or not orders:
                continue
            logs = 0.0
            for n in orders:
                shared = sum((mine[n] & other[n]).values())
                if not shared:
                    logs = -math.inf
                    break
                logs += math.log(shared / mine[n].total())
            best[i] = max(best[i], math.exp(logs / len(orders)))
    return best


def rouge_l(made: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE-L with equal weights)."""
    a, b = words(made), words(reference)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            here = row[j]
            row[j] = before + 1 if x == y else max(row[j], row[j - 1])
            before = here
    return 2 * row[-1] / (len(a) + len(b))


def _grams(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


# -- letters --


class LetterModel:
    """Bytes given the ``ORDER`` before them, interpolated (Witten & Bell 1991, method C): a public judge of how usual a text is."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = len(texts)
        self._counts: list[dict[bytes, Counter[int]]] = [{} for _ in range(ORDER + 1)]
        digest = hashlib.sha256()
        for text in texts:
            raw = _padded(text)
            digest.update(raw + b"\0")
            for place in range(ORDER, len(raw)):
                for order in range(ORDER + 1):
                    self._counts[order].setdefault(raw[place - order : place], Counter())[raw[place]] += 1
        self._totals = [{context: seen.total() for context, seen in table.items()} for table in self._counts]
        self.name = f"letter model of order {ORDER} on {self.texts} public texts, sha256 {digest.hexdigest()}"

    def bits_per_byte(self, text: str) -> float:
        """Of the text and its end, UTF-8; an empty text costs what its end does."""
        raw = _padded(text)
        bits = 0.0
        for place in range(ORDER, len(raw)):
            chance = 1 / 256
            for order in range(ORDER + 1):
                context = raw[place - order : place]
                seen = self._counts[order].get(context)
                if seen is None:
                    break
                kinds, total = len(seen), self._totals[order][context]
                chance = (seen[raw[place]] + kinds * chance) / (total + kinds)
            bits -= math.log2(chance)
        return bits / (len(raw) - ORDER)


def _padded(text: str) -> bytes:
    return b"\n" * ORDER + text.encode("utf-8", errors="replace") + b"\n"
