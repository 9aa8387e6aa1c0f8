"""Conversations in JSON lines: what becomes text, picture and sound, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.data.conftest import picture

from sfumato.data.entries import Columns
from sfumato.data.messages import Messages, spoken
from sfumato.data.prepare import check, load
from sfumato.data.settings import DataSettings
from sfumato.data.sources import settings_for
from sfumato.errors import DataError


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture
def chat(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows; a.png, b.png and s.wav lie beside them."""
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(picture(seed)).save(tmp_path / name)
    soundfile.write(tmp_path / "s.wav", np.zeros(400), 8000)

    def write(*rows: Any) -> Path:
        path = tmp_path / "chat.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


GOOD = {
    "messages": [
        turn("system", "Be brief."),
        turn("user", "<image>What is it?"),
        turn("assistant", [{"type": "text", "text": "An ankle."}]),
        turn("user", "Sure?"),
        turn("assistant", "Yes."),
    ],
    "images": ["a.png"],
    "person": "p1",
    "consent": "yes",
}


def test_a_conversation_keeps_its_turns_and_fills_text_and_picture(chat):
    (record,) = Messages(chat(GOOD), columns=Columns(unit="person"))
    assert record.text == "An ankle.\nYes."
    assert record.unit == "p1"
    assert record.metadata["messages"] == GOOD["messages"]
    assert record.metadata["consent"] == "yes"
    assert [Path(path).name for path in record.metadata["images"]] == ["a.png"]
    np.testing.assert_array_equal(record.image, picture(0))
    assert "Be brief." in spoken(record.metadata)


def test_what_the_user_says_is_the_text_where_the_assistant_says_nothing(chat):
    row = {"messages": [turn("user", [{"type": "audio"}, {"type": "text", "text": "hello"}])], "audios": ["s.wav"]}
    (record,) = Messages(chat(row))
    assert (record.text, record.sample_rate, len(record.audio)) == ("hello", 8000, 400)


def test_of_several_pictures_none_is_chosen_and_all_are_looked_at(chat):
    row = {"messages": [turn("user", "<image><image>compare")], "images": ["a.png", "b.png"]}
    (record,) = Messages(chat(row))
    assert record.image is None
    assert len(record.metadata["images"]) == 2
    path = chat({**row, "images": ["a.png", "chat.jsonl"]})
    with pytest.raises(DataError, match=r"chat\.jsonl"):
        list(Messages(path))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"messages": "hello"}, "row", "must be a list of turns"),
        ({"messages": []}, "row", "must be a list of turns"),
        ({"messages": [turn("robot", "hi")]}, "row", "must be one of system"),
        ({"messages": [turn("user", 7)]}, "row", "a string or a list of parts"),
        ({"messages": [turn("user", [{"type": "video"}])]}, "row", "text .with its text., image or audio"),
        ({"messages": [turn("user", [{"type": "image", "url": "http://x/y.png"}])]}, "row", "named in images"),
        ({"images": ["a.png", "b.png"]}, "row", "1 marks for 2 files"),
        ({"images": "a.png"}, "row", "must be a list of paths"),
        ({"images": ["../a.png"]}, "outside", "inside the folder"),
        ({"images": ["/etc/hostname"]}, "outside", "inside the folder"),
        ({"images": ["gone.png"]}, "missing_file", "does not exist"),
        ({"messages": [turn("system", "only this"), turn("user", "<image>")]}, "empty_text", "must not be empty"),
        ({"person": None}, "unit", "must name the person"),
    ],
)
def test_a_bad_conversation_is_named_and_the_next_is_read(chat, change, code, words):
    source = Messages(chat({**GOOD, **change}, GOOD), columns=Columns(unit="person"))
    bad, good = source.entries()
    with pytest.raises(DataError, match=words) as refused:
        bad.read()
    assert refused.value.code == code
    assert "chat.jsonl:1" in refused.value.message
    assert good.read().text


def test_a_link_out_of_the_folder_is_refused(chat, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    Image.fromarray(picture(3)).save(elsewhere)
    (tmp_path / "link.png").symlink_to(elsewhere)
    with pytest.raises(DataError, match="link out of the folder"):
        list(Messages(chat({**GOOD, "images": ["link.png"]})))
    (tmp_path / "link.png").unlink()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (record,) = Messages(chat({**GOOD, "images": ["link.png"]}))
    assert record.image is not None


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_value_of_messages_is_read_or_is_a_data_error(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("any") / "chat.jsonl"
    path.write_text(json.dumps({"messages": value}))
    (entry,) = Messages(path).entries()
    try:
        assert entry.read().text
    except DataError as error:
        assert "chat.jsonl:1" in error.message


def test_conversations_are_loaded_and_checked_by_their_path(chat):
    rows = [{**GOOD, "person": f"p{i}", "messages": [turn("assistant", f"answer {i}")], "images": []} for i in range(4)]
    rows[0]["messages"] = [turn("user", "I am jane@example.org"), turn("assistant", "noted")]
    path = chat(*rows)
    assert settings_for(path).source == "messages"
    assert check(path)["errors"] == 0
    data = DataSettings(source="messages", path=str(path), unit_column="person", public_units=1)
    prepared = load(data, unit="person")
    assert (len(prepared.private), len(prepared.public)) == (3, 1)
    together = [*prepared.private, *prepared.public]
    assert {r.text for r in together} == {"noted", "answer 1", "answer 2", "answer 3"}
    assert prepared.card["personal_identifiers"]["e-mail addresses"] == any(r.text == "noted" for r in prepared.private)


def test_files_that_are_no_conversations_are_refused(chat, tmp_path):
    with pytest.raises(DataError, match="column messages"):
        Messages(chat({"text": "x"}))
    with pytest.raises(DataError, match="column person"):
        Messages(chat({"messages": [turn("user", "x")]}), columns=Columns(unit="person"))
    with pytest.raises(DataError, match="text_column"):
        Messages(chat(GOOD), columns=Columns(text="x"))
    with pytest.raises(DataError, match=r"must be a \.jsonl file"):
        Messages(tmp_path / "none.jsonl")
