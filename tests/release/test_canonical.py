"""One encoding for each value, and no other is read."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import VerificationFailed
from sfumato.release import canonical

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=15,
)


@settings(deadline=None, derandomize=True)
@given(values)
def test_what_is_encoded_is_read_back_and_encodes_to_the_same_bytes(value: Any) -> None:
    data = canonical.encode(value)
    assert canonical.decode_canonical(data, "x") == value
    assert canonical.encode(canonical.decode(data, "x")) == data
    assert canonical.decode(canonical.encode_readable(value), "x") == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"b":1,"a":2}\n',
        b'{"a": 1}\n',
        b'{"a":1}',
        b'{"a":1}\n\n',
        b'{"a":1.0e0}\n',
        b'"\xc3\xa4"\n',
        b'"\\u00E4"\n',
        b"-0\n",
        b"1E5\n",
        b'{"a":1,"a":1}\n',
    ],
)
def test_another_encoding_is_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        canonical.decode_canonical(data, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"[1e400]",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'"\\ud800"',
        b'{"\\ud800":1}',
        b"'a'",
        b"{}{}",
        b'{"a":1,"a":2}',
        b"[" * 100_000,
        b"[" * 33 + b"]" * 33,
        b'{"a":' * 200_000,
        b"1" * 5_000,
        b"\x00",
    ],
)
def test_what_is_not_plain_bounded_json_is_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        canonical.decode(data, "x")


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "MAX_VALUES", 1_000)
    with pytest.raises(VerificationFailed, match="1000 values"):
        canonical.decode(json.dumps([0] * 1_001).encode(), "x")


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError):
        canonical.encode(float("nan"))


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = canonical.decode(data, "x")
    except VerificationFailed:
        return
    assert json.loads(data) == value
