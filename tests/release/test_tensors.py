"""Names of tensors are read from the header alone, and only from a file without room for anything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sfumato.errors import VerificationFailed
from sfumato.release import provenance, tensors


def test_names_and_shapes_are_those_that_the_library_wrote(tmp_path: Path) -> None:
    kinds = [np.float32, np.float16, np.int64, np.uint8, np.float64, np.bool_]
    arrays = {f"layer.{index}": np.zeros((index, 3), kind) for index, kind in enumerate(kinds)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert provenance.tensor_names(tmp_path / "x.safetensors") == {name: array.shape for name, array in arrays.items()}


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry()}, 9),
        ({"a": entry()}, 7),
        ({"a": entry(), "b": entry()}, 8),
        ({"a": entry(), "b": entry(data_offsets=[12, 20])}, 20),
        ({"a": entry(dtype="F31")}, 8),
        ({"a": entry(dtype=4)}, 8),
        ({"a": entry(shape=[3])}, 8),
        ({"a": entry(shape=[-2])}, 8),
        ({"a": entry(shape=[2.0])}, 8),
        ({"a": entry(shape=[True, 2])}, 8),
        ({"a": entry(data_offsets=[0])}, 8),
        ({"a": entry(extra=1)}, 8),
        ({"a": entry(shape=[2**40, 2**40])}, 8),
        ({"a": []}, 0),
        ({"__metadata__": {"note": "who was in it"}, "a": entry()}, 8),
        ({"__metadata__": "x", "a": entry()}, 8),
        ({"ä": entry()}, 8),
        ({"": entry()}, 8),
        ([], 0),
    ],
)
def test_holes_overlaps_metadata_and_nonsense_are_refused(header: Any, data: int) -> None:
    with pytest.raises(VerificationFailed):
        tensors.read_header(json.dumps(header).encode(), data, "x")


@pytest.mark.parametrize("first", [b"", b"\x00" * 8, b"\xff" * 8, (2**30).to_bytes(8, "little"), b"1234567"])
def test_a_false_length_is_refused(first: bytes) -> None:
    with pytest.raises(VerificationFailed):
        tensors.header_length(first, "x")


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=120), st.integers(0, 100))
def test_any_header_is_read_or_refused(header: bytes, data: int) -> None:
    try:
        names = tensors.read_header(header, data, "x")
    except VerificationFailed:
        return
    assert isinstance(names, dict)
