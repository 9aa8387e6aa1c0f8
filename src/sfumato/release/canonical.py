"""One encoding for each JSON value, and a reader that accepts no other and no oversized input.

A signature is worth what its bytes mean: if one manifest could be written in two ways, a stranger's parser and ours
might read different things from bytes that both hash well. So a signed file is accepted only if encoding what was read
gives the same bytes again: keys sorted, no spaces, ASCII, one line feed at the end, no key twice, no NaN, no lone
surrogate.
"""

import json
import math
from typing import Any

from sfumato.errors import VerificationFailed

MAX_DEPTH = 32
MAX_VALUES = 2_000_000


def encode(value: Any) -> bytes:
    """The canonical bytes of a JSON value. Raises ValueError for NaN, infinities and what JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def encode_readable(value: Any) -> bytes:
    """Indented bytes for files that people open; covered by their hash, so another encoding is a changed file."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def decode(data: bytes, name: str) -> Any:
    """Reads JSON strictly. Raises VerificationFailed (never anything else) for whatever is not plain, bounded JSON."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise VerificationFailed(
            f"{name} · must be plain JSON ({_short(error)})", next="Ask for the bundle again."
        ) from None
    _check_bounds(value, name)
    return value


def decode_canonical(data: bytes, name: str) -> Any:
    """Reads JSON that must be in its one canonical encoding."""
    value = decode(data, name)
    if encode(value) != data:
        raise VerificationFailed(
            f"{name} · must be canonical JSON (sorted keys, no spaces, ASCII, one final line feed)",
            next="It was rewritten after it was signed: ask for the bundle again.",
        )
    return value


def decode_object(data: bytes, name: str) -> dict[str, Any]:
    """As ``decode``, and the value must be an object."""
    value = decode(data, name)
    if not isinstance(value, dict):
        raise VerificationFailed(
            f"{name} = {type(value).__name__} · must be a JSON object", next="Ask for the bundle again."
        )
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _check_bounds(value: Any, name: str) -> None:
    """Refuses deep nesting, too many values and lone surrogates; iterative, so that depth cannot exhaust the stack."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    count = 0
    while todo:
        item, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise VerificationFailed(
                f"{name} · at most {MAX_DEPTH} levels and {MAX_VALUES} values", next="This is not a bundle of ours."
            )
        if isinstance(item, str):
            if not _encodable(item):
                raise VerificationFailed(f"{name} · text must be valid Unicode", next="Ask for the bundle again.")
        elif isinstance(item, list):
            todo.extend((inner, depth + 1) for inner in item)
        elif isinstance(item, dict):
            if not all(_encodable(key) for key in item):
                raise VerificationFailed(f"{name} · keys must be valid Unicode", next="Ask for the bundle again.")
            todo.extend((inner, depth + 1) for inner in item.values())


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(error: BaseException) -> str:
    return str(error).encode("ascii", "backslashreplace").decode("ascii")[:120]
