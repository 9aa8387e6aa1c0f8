"""What the server and the sites say to each other: plain values only, the same over every engine.

A round has one exchange or several; in each the server asks some sites (`Ask`) and they answer (`Reply`), or are silent.
(run, round, exchange) only ever grows, so a site recognises what was asked before, and a server what comes late.

On the wire a message is named arrays and one JSON text (`to_arrays`, `from_arrays`); what comes in is checked key by key,
since neither side has a reason to trust the other. A message holds tensors of the model and public values, never records,
never an error's traceback.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sfumato.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
    State: TypeAlias = Mapping[str, Tensor]
else:  # what is checked, without loading torch
    Json, State = Any, Mapping

FORMAT = "sfumato-federation/1"
# The types that may be sent, by torch's name -> numpy's. bfloat16 travels as its 16 bits.
_DTYPES = {
    "float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": "int16",
    "int8": "int8", "uint8": "uint8", "int16": "int16", "int32": "int32", "int64": "int64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tensors and values: what a mechanism or a way of collecting adds to a message, or keeps between two of them."""

    tensors: State = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A round that a site, or the server in its name, said no to. The message says nothing about a record."""

    round: int  # from 1; 0 is the opening
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the server asks one site.

    Attributes:
      run: the federated run; a site's ledger belongs to one.
      round: from 1; 0 is the opening, where sites release something before the first.
      exchange: from 0 within the round.
      kind: what is asked: "train", or what the way of collecting needs besides ("keys", "shares", "unmask").
      tensors: where training begins, by parameter name: those that this site holds.
      values: local steps, the mechanism's current numbers, ...
    """

    run: str
    round: int
    exchange: int
    kind: str
    tensors: State = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)

    def to_arrays(self) -> "tuple[dict[str, np.ndarray], str]":
        """(arrays, JSON text). Raises DataError for a value or a type that cannot be sent."""
        return _pack(self, {"run": self.run, "round": self.round, "exchange": self.exchange, "kind": self.kind})

    @classmethod
    def from_arrays(cls, arrays: "Mapping[str, np.ndarray]", text: str) -> "Ask":
        """Reads what ``to_arrays`` gave. Raises DataError for anything else."""
        head, tensors, values = _unpack("ask", arrays, text, _ADDRESS)
        return cls(**head, tensors=tensors, values=values)

    @property
    def bytes(self) -> int:
        """Of the tensors, without names and framing."""
        return tensor_bytes(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a site answers to the `Ask` of the same run, round, exchange and kind.

    Attributes:
      refused: why it does not take part; then there are no tensors.
    """

    site: str
    run: str
    round: int
    exchange: int
    kind: str
    tensors: State = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)
    refused: Refusal | None = None

    def to_arrays(self) -> "tuple[dict[str, np.ndarray], str]":
        """(arrays, JSON text). Raises DataError for a value or a type that cannot be sent."""
        no = self.refused
        head = {
            "site": self.site, "run": self.run, "round": self.round, "exchange": self.exchange, "kind": self.kind,
            "refused": None if no is None else {"round": no.round, "code": no.code, "message": no.message},
        }  # fmt: skip
        return _pack(self, head)

    @classmethod
    def from_arrays(cls, arrays: "Mapping[str, np.ndarray]", text: str) -> "Reply":
        """Reads what ``to_arrays`` gave. Raises DataError for anything else."""
        head, tensors, values = _unpack("reply", arrays, text, {"site": str, **_ADDRESS, "refused": dict | None})
        no = head.pop("refused")
        if no is not None:
            _check_keys("reply.refused", no, {"round": int, "code": str, "message": str})
        return cls(**head, tensors=tensors, values=values, refused=None if no is None else Refusal(**no))

    @classmethod
    def no(cls, ask: Ask, site: str, code: str, message: str) -> "Reply":
        """A refusal of ``ask``."""
        refused = Refusal(round=ask.round, code=code, message=message)
        return cls(site=site, run=ask.run, round=ask.round, exchange=ask.exchange, kind=ask.kind, refused=refused)

    @classmethod
    def to(cls, ask: Ask, site: str, part: Part) -> "Reply":
        """An answer to ``ask``."""
        return cls(
            site=site, run=ask.run, round=ask.round, exchange=ask.exchange, kind=ask.kind,
            tensors=part.tensors, values=part.values,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Of the tensors, without names and framing."""
        return tensor_bytes(self.tensors)

    def answers(self, ask: Ask) -> bool:
        return (self.run, self.round, self.exchange, self.kind) == (ask.run, ask.round, ask.exchange, ask.kind)


def tensor_bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


_ADDRESS: dict[str, Any] = {"run": str, "round": int, "exchange": int, "kind": str}


def _pack(message: Ask | Reply, head: dict[str, Any]) -> "tuple[dict[str, np.ndarray], str]":
    import torch

    arrays, dtypes = {}, {}
    for name, tensor in message.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise DataError(
                f"tensors[{name!r}] = {dtype} · must be one of {', '.join(_DTYPES)}", next="Convert it before sending."
            )
        plain = tensor.detach().cpu().contiguous()
        arrays[name] = (plain.view(torch.int16) if dtype == "bfloat16" else plain).numpy()
        dtypes[name] = dtype
    body = {"format": FORMAT, **head, "dtypes": dtypes, "values": dict(message.values)}
    try:
        return arrays, json.dumps(body, allow_nan=False, ensure_ascii=True, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"values · must be plain finite JSON values ({error})", next="Send numbers, texts and lists."
        ) from None


def _unpack(
    what: str, arrays: "Mapping[str, np.ndarray]", text: str, keys: Mapping[str, Any]
) -> "tuple[dict[str, Any], dict[str, Tensor], dict[str, Json]]":
    import torch

    try:
        body = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} · must be JSON ({error})", next="It comes from something else.") from None
    _check_keys(what, body, {"format": str, **keys, "dtypes": dict, "values": dict})
    if body["format"] != FORMAT:
        raise DataError(
            f"{what}.format = {body['format']!r} · must be {FORMAT}", next="Install the same version at every site."
        )
    for name in ("round", "exchange"):
        if body[name] < 0:
            raise DataError(f"{what}.{name} = {body[name]} · must not be below 0", next="Refuse it.")
    dtypes = body["dtypes"]
    if set(dtypes) != set(arrays):
        raise DataError(f"{what}.tensors · must be the arrays that its text names", next="Refuse it.")
    tensors = {}
    for name, dtype in dtypes.items():
        if _DTYPES.get(dtype) != str(arrays[name].dtype):
            raise DataError(
                f"{what}.tensors[{name!r}] = {arrays[name].dtype} · is said to be {dtype}", next="Refuse it."
            )
        tensor = torch.from_numpy(arrays[name].copy())
        tensors[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    return {name: body[name] for name in keys}, tensors, body["values"]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    """1e999 is a number of JSON, and infinite in float64."""
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _check_keys(what: str, values: Any, keys: Mapping[str, Any]) -> None:
    """Exactly these keys, exactly these types (a bool is not an int)."""
    if not isinstance(values, dict) or set(values) != set(keys):
        given = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{what} = {given} · must have exactly {', '.join(sorted(keys))}", next="Refuse it.")
    for key, kind in keys.items():
        value = values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise DataError(f"{what}.{key} = {type(value).__name__} · is of the wrong type", next="Refuse it.")
