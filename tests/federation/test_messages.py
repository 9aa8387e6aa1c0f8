import json

import numpy as np
import pytest
import torch

from sfumato.errors import DataError
from sfumato.federation.messages import Ask, Part, Refusal, Reply

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.zeros(0, 4),
}
ASK = Ask(run="r", round=2, exchange=1, kind="train", tensors=TENSORS, values={"steps": 3, "told": {"clip": 0.5}})


def through_the_wire(message):
    arrays, text = message.to_arrays()
    return type(message).from_arrays({name: np.array(array) for name, array in arrays.items()}, text)


@pytest.mark.parametrize(
    "message",
    [
        ASK,
        Reply.to(ASK, "site é", Part(tensors=TENSORS, values={"steps": 3})),
        Reply.no(ASK, "s", "site_limit", "no more"),
    ],
)
def test_what_is_sent_arrives_bit_for_bit(message):
    back = through_the_wire(message)
    assert type(back) is type(message)
    for name in ("run", "round", "exchange", "kind", "values"):
        assert getattr(back, name) == getattr(message, name)
    assert set(back.tensors) == set(message.tensors)
    for name, tensor in message.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert back.tensors[name].equal(tensor)
    assert back.bytes == message.bytes
    if isinstance(message, Reply):
        assert (back.site, back.refused) == (message.site, message.refused)


def test_bytes_are_of_the_tensors():
    assert ASK.bytes == 6 * 4 + 2 * 2 + 8


def test_an_answer_is_known_by_run_round_exchange_and_kind():
    reply = Reply.to(ASK, "s", Part())
    assert reply.answers(ASK)
    for changed in ({"run": "x"}, {"round": 1}, {"exchange": 0}, {"kind": "keys"}):
        assert not reply.answers(Ask(**{"run": "r", "round": 2, "exchange": 1, "kind": "train", **changed}))
    assert Reply.no(ASK, "s", "c", "m").refused == Refusal(round=2, code="c", message="m")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other/1"},
        {"round": -1},
        {"round": True},
        {"round": 1.0},
        {"exchange": -1},
        {"kind": None},
        {"values": []},
        {"dtypes": {"a": "float32"}},
        {"dtypes": {"a": "float32", "b": "float32", "c": "int64", "d": "float32"}},
        {"dtypes": {"a": "float64", "b": "bfloat16", "c": "int64", "d": "float32"}},
        {"extra": 1},
    ],
)
def test_what_does_not_fit_is_refused(change):
    arrays, text = ASK.to_arrays()
    with pytest.raises(DataError):
        Ask.from_arrays(arrays, json.dumps({**json.loads(text), **change}))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"values": NaN}', ASK.to_arrays()[1].replace("0.5", "1e999"), "[" * 100_000]
)
def test_what_is_no_message_is_refused(text):
    with pytest.raises(DataError):
        Reply.from_arrays({}, text)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(DataError, match="complex64"):
        Ask(run="r", round=1, exchange=0, kind="k", tensors={"a": torch.zeros(1, dtype=torch.complex64)}).to_arrays()
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(DataError, match="plain finite"):
            Ask(run="r", round=1, exchange=0, kind="k", values={"v": value}).to_arrays()  # pyright: ignore
