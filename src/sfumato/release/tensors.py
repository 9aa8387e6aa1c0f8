"""The names of the tensors in a safetensors file, read from its header alone: no torch, no weights in memory.

Source: the format's description, https://github.com/huggingface/safetensors (8 bytes little-endian length, JSON header,
data without holes).
"""

import re
from typing import Any

from sfumato.errors import VerificationFailed
from sfumato.release import canonical

MAX_HEADER = 16 * 2**20  # bytes
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
_NAME = re.compile(r"[!-~]{1,512}")  # printable ASCII


def header_length(first_bytes: bytes, name: str) -> int:
    """Bytes of the header, from the file's first eight bytes."""
    length = int.from_bytes(first_bytes, "little") if len(first_bytes) == 8 else -1
    if not 2 <= length <= MAX_HEADER:
        raise VerificationFailed(f"{name} · must be a safetensors file", next="Ask for the bundle again.")
    return length


def read_header(header: bytes, data_bytes: int, name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape. Refuses holes, overlaps, unknown types and metadata, through which anything could leave.

    Args:
      header: the JSON header.
      data_bytes: what follows the header, in bytes; the tensors must fill it exactly.
    """
    entries = canonical.decode_object(header, name)
    metadata = entries.pop("__metadata__", {})
    if not (metadata == {} or metadata == {"format": "pt"}):
        raise _bad(name, "its metadata may only say the format")
    spans: list[tuple[int, int]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, entry in entries.items():
        start, end, shape = _entry(entry, f"{name}: {tensor[:80]!r}")
        if not _NAME.fullmatch(tensor):
            raise _bad(name, f"tensor name {tensor[:80]!r} must be printable ASCII")
        spans.append((start, end))
        shapes[tensor] = shape
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise _bad(name, "its tensors must follow each other without holes or overlaps")
        position = end
    if position != data_bytes:
        raise _bad(name, f"its tensors need {position} bytes, {data_bytes} are there")
    return shapes


def _entry(entry: Any, where: str) -> tuple[int, int, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(where, "needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _bad(where, f"dtype must be one of {', '.join(_BITS)}")
    if not _sizes(shape) or len(shape) > 16 or not _sizes(offsets) or len(offsets) != 2:
        raise _bad(where, "shape and data_offsets must be lists of whole numbers >= 0")
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 2**63:
            raise _bad(where, "is too large")
    if offsets[1] - offsets[0] != bits // 8:
        raise _bad(where, "data_offsets do not fit dtype and shape")
    return offsets[0], offsets[1], tuple(shape)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _bad(name: str, why: str) -> VerificationFailed:
    return VerificationFailed(f"{name} · {why}", next="Write the weights with safetensors and release again.")
