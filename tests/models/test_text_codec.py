"""Texts to hashed features: nothing is fitted, in any language."""

import zlib

import pytest
import torch

from sfumato.models.codecs import text


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("No effusion, heart NOT enlarged.", ["no", "effusion", "heart", "not", "enlarged"]),
        ("Узел слева, 12 мм; выпота нет", ["узел", "слева", "12", "мм", "выпота", "нет"]),
        ("左肺上叶结节", ["左", "肺", "上", "叶", "结", "节"]),
        ("X光片 shows 结节", ["x", "光", "片", "shows", "结", "节"]),
        ("snake_case", ["snake", "case"]),
        ("", []),
    ],
)
def test_words(sentence, expected):
    assert text.words(sentence) == expected


def test_features_are_words_and_neighbouring_pairs_each_once():
    found = text.features("left left lung", 97)
    expected = {zlib.crc32(feature.encode()) % 97 for feature in ("left", "lung", "left left", "left lung")}
    assert set(found) == expected
    assert len(found) == len(expected)


def test_the_order_of_words_matters_in_every_language():
    for a, b in (("left large right small", "right large left small"), ("左大右小", "右大左小")):
        assert set(text.features(a, 4096)) != set(text.features(b, 4096))


def test_no_text_changes_how_another_is_encoded():
    """Nothing is fitted to the table: neither the features nor its width tell of the other texts."""
    alone, _ = text.encode(["узел слева"], 256)
    among, present = text.encode(["a", "узел слева", "b " * 400, None, "..."], 256)
    assert alone[0].equal(among[1])
    assert among.shape == (5, text.MOST_FEATURES)
    assert present.tolist() == [True, True, True, False, False]


def test_long_texts_are_cut_and_padding_is_no_feature():
    many = " ".join(f"word{i}" for i in range(2_000))
    table, present = text.encode([many, "one"], 2**16)  # more buckets than int16 holds
    assert table.dtype == torch.int32
    assert present.all()
    assert (table[0] < 2**16).all()
    assert (table[1] < 2**16).sum() == 1


def test_bags_have_unit_length_and_missing_texts_are_zero():
    table, present = text.encode(["left lung nodule", None], 64)
    bag = text.bag(table, 64)
    assert bag.shape == (2, 64)
    assert bag[0].norm().item() == pytest.approx(1.0)
    assert (bag[0] > 0).sum() == len(set(text.features("left lung nodule", 64)))
    assert not bag[1].any()
    assert present.tolist() == [True, False]


def test_an_empty_table_has_no_rows():
    table, present = text.encode([], 64)
    assert text.bag(table, 64).shape == (0, 64)
    assert present.shape == (0,)
