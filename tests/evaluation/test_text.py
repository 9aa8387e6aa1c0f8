"""Texts: facts, variety, letters."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from sfumato.data.clinic import Clinic
from sfumato.errors import UsageError
from sfumato.evaluation import agreement, text


@pytest.fixture(scope="module")
def histories():
    return list(Clinic(patients=220, audio=True, public=True, languages=("en", "ru", "zh")))


def test_the_reader_reads_what_the_histories_say():
    histories = list(Clinic(patients=160, public=True))
    half = len(histories) // 2
    facts = {name: [r.metadata["facts"][name] for r in histories] for name in ("side", "zone", "effusion", "heart")}
    texts = [r.text for r in histories]
    reader = text.train_reader(texts[:half], {name: values[:half] for name, values in facts.items()})
    read = reader.read(texts[half:])
    for name, values in facts.items():
        assert agreement.kappa(values[half:], read[name])[0] > 0.8
    again = text.train_reader(texts[:half], {name: values[:half] for name, values in facts.items()})
    assert reader.name == again.name and len(reader.name.split("sha256 ")[1]) == 64
    assert reader.read([]) == {name: [] for name in facts}


def test_values_that_are_not_known_teach_nothing():
    texts = ["left side", "right side", "left", "right"] * 3
    known = ["left", "right", None, None] * 3
    reader = text.train_reader(texts, {"side": known})
    assert reader.read(["left", "right side"])["side"] == ["left", "right"]
    with pytest.raises(UsageError, match="no text has a value"):
        text.train_reader(["a"], {"side": [None]})
    with pytest.raises(UsageError, match="one per text"):
        text.train_reader(["a"], {"side": ["x", "y"]})
    with pytest.raises(UsageError, match="at least one fact"):
        text.train_reader(["a"], {})


def test_heart_rates_are_read_in_every_language(histories):
    assert {r.metadata["language"] for r in histories} == {"en", "ru", "zh"}
    assert all(text.heart_rate(r.text) == r.metadata["heart_rate"] for r in histories)
    assert text.heart_rate("a 65-year-old, 4.1 cm") is None


def test_distinct_counts_pairs_of_words():
    assert text.distinct(["a b c", "a b d"]) == 3 / 4
    assert text.distinct(["one", ""]) == 0
    assert text.words("A 4.1 cm, round-ish 结节") == ["a", "4.1", "cm", "round", "ish", "结", "节"]


def test_self_similarity_is_the_best_bleu_like_score_of_another():
    """Against every other text, by definition."""
    texts = ["a b c d e", "a b c d f", "x y z u v", "a b c d e"]
    found = text.self_similarity(texts)

    def score(mine, other):
        precisions = []
        for n in range(1, 5):
            a = Counter(tuple(mine[i : i + n]) for i in range(len(mine) - n + 1))
            b = Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
            precisions.append(sum((a & b).values()) / sum(a.values()))
        return math.prod(precisions) ** (1 / 4)

    said = [t.split() for t in texts]
    expected = [max(score(a, b) for j, b in enumerate(said) if j != i) for i, a in enumerate(said)]
    assert sorted(found) == pytest.approx(sorted(expected))
    assert sorted(expected)[0] == 0 and sorted(expected)[-2:] == [1, 1]


def test_rouge_is_the_longest_common_subsequence():
    def brute(a, b):
        a, b = a.split(), b.split()
        longest = max(
            len(s)
            for n in range(len(a) + 1)
            for s in itertools.combinations(a, n)
            if all(any(w == v for v in rest) for rest in [iter(b)] for w in s)
        )
        return 2 * longest / (len(a) + len(b))

    for a, b in (("a b c d", "b x d a"), ("a a b", "b a a"), ("x", "y"), ("a b c", "a b c")):
        assert text.rouge_l(a, b) == pytest.approx(brute(a, b))
    assert text.rouge_l("", "a") == 0


def test_letters_sum_to_one_and_usual_texts_are_cheap(histories):
    english = [r.text for r in histories if r.metadata["language"] == "en"]
    model = text.LetterModel(english[:60])
    for context in ("", "the l", "zz"):
        # The chance of each next byte, by the difference of two codings.
        def cost(said):
            return model.bits_per_byte(said) * (len(said.encode()) + 1)

        end = cost(context)
        total = 2 ** -(end - _cost_without_end(model, context))
        for byte in range(32, 127):
            total += 2 ** -(_cost_without_end(model, context + chr(byte)) - _cost_without_end(model, context))
        assert total <= 1 + 1e-9
        assert total > 0.95  # the rest are bytes that no key has
    usual = np.mean([model.bits_per_byte(t) for t in english[60:]])
    letters = list("".join(english[60:]))
    np.random.default_rng(0).shuffle(letters)
    assert usual < 1.5 < 3 < model.bits_per_byte("".join(letters)[:2000])
    assert model.bits_per_byte("") > 0


def _cost_without_end(model, said):
    """Bits of the bytes alone."""
    raw, bits = text._padded(said)[:-1], 0.0
    for place in range(text.ORDER, len(raw)):
        chance = 1 / 256
        for order in range(text.ORDER + 1):
            seen = model._counts[order].get(raw[place - order : place])
            if seen is None:
                break
            chance = (seen[raw[place]] + len(seen) * chance) / (seen.total() + len(seen))
        bits -= math.log2(chance)
    return bits
